"""Replay buffers of several libraries behind one interface, and made-up steps to fill them with.

A peer is imported when a buffer of it is made, so any of them may be missing.
"""

import importlib
import logging
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

import rl_buffer as rb
from benchmarks.measure import OURS
from rl_buffer.storage import available_memory_nbytes

BATCH_SIZE = 256
SERVED = "rl_buffer, served"
_OBS_SIZE, _ACTION_SIZE = 17, 6
_ALPHA, _BETA = 0.6, 0.4
_N_STEP, _GAMMA = 3, 0.99  # of the served table
_FILL_ROWS = 1 << 14
_NBYTES_PER_TRANSITION = 300  # 230 for ours with its tree, 190 for cpprb, and some to spare

_NAMES = ("observations", "actions", "rewards", "dones", "next_observations")
# Columns obs, action, reward, done, next_obs: [N, size] or [N].
Columns = list[NDArray[Any]]


@dataclass
class Buffer:
    """A buffer of some library.

    add: takes one step in the form that `step` gives it.
    fill: takes Columns and their priorities [N], None for a uniform buffer.
    get: draws a batch of 256.
    step: turns obs, action, reward, done, next_obs into what `add` takes, outside of what is timed.
    update: sets the priorities of a batch of `get`.
    rows: the memory that a batch is gathered from, one row for each transition; ours only.
    close: ends what is more than memory.
    """

    add: Callable[[Any], Any]
    fill: Callable[[Columns, NDArray[np.float32] | None], Any]
    get: Callable[[], Any] | None = None
    step: Callable[..., Any] = lambda *values: values
    update: Callable[[Any], Any] | None = None
    rows: torch.Tensor | None = None
    close: Callable[[], object] = lambda: None


def _rl_buffer(size: int, num_envs: int, prioritized: bool) -> Buffer:
    options: dict[str, Any] = {"alpha": _ALPHA, "beta": _BETA} if prioritized else {}
    kind = rb.PrioritizedReplayBuffer if prioritized else rb.ReplayBuffer
    buffer = kind(size // num_envs, num_envs, _OBS_SIZE, _ACTION_SIZE, **options)
    td_errors = torch.rand(BATCH_SIZE)
    return Buffer(
        add=lambda step: buffer.add(*step),
        get=lambda: _looked_at(buffer.get(BATCH_SIZE)),
        fill=lambda columns, priorities: buffer.extend(dict(zip(_NAMES, columns, strict=True)), priorities),
        update=lambda batch: buffer.update_priorities(batch, td_errors),
        rows=buffer._rows.block,
    )


def _looked_at(batch: rb.ReplayBatch) -> rb.ReplayBatch:
    """With the tensors that a learner uses: a batch makes each when it is looked at, and others hand out all."""
    _ = (batch.observations, batch.actions, batch.rewards, batch.dones, batch.next_observations, batch.weights)
    return batch


def _cpprb(size: int, num_envs: int, prioritized: bool) -> Buffer:
    import cpprb

    obs, action = {"shape": _OBS_SIZE}, {"shape": _ACTION_SIZE}
    fields = {"obs": obs, "act": action, "rew": {}, "done": {}, "next_obs": obs}
    options = {"alpha": _ALPHA} if prioritized else {}
    buffer = (cpprb.PrioritizedReplayBuffer if prioritized else cpprb.ReplayBuffer)(size, fields, **options)
    draw_options = {"beta": _BETA} if prioritized else {}
    priorities = np.random.default_rng(0).random(BATCH_SIZE, np.float32)

    def step(*values: Any) -> dict[str, Any]:
        return dict(zip(("obs", "act", "rew", "done", "next_obs"), values, strict=True))

    return Buffer(
        add=lambda step: buffer.add(**step),
        get=lambda: buffer.sample(BATCH_SIZE, **draw_options),
        fill=lambda columns, p: buffer.add(**step(*columns), **({} if p is None else {"priorities": p})),
        step=step,
        update=lambda batch: buffer.update_priorities(batch["indexes"], priorities),
    )


def _sb3(size: int, num_envs: int, prioritized: bool) -> Buffer:
    from gymnasium.spaces import Box
    from stable_baselines3.common.buffers import ReplayBuffer

    obs, action = (Box(-1, 1, (length,), np.float32) for length in (_OBS_SIZE, _ACTION_SIZE))
    buffer = ReplayBuffer(size, obs, action, device="cpu", n_envs=num_envs)
    infos: list[dict[str, Any]] = [{} for _ in range(num_envs)]

    def fill(columns: Columns, _: object) -> None:
        # Its add takes one step at a time, 7 s for a million of them.
        start, stop = buffer.pos, min(buffer.pos + len(columns[0]) // num_envs, buffer.buffer_size)
        stored = (buffer.observations, buffer.actions, buffer.rewards, buffer.dones, buffer.next_observations)
        for target, column in zip(stored, columns, strict=True):
            target[start:stop] = column[: (stop - start) * num_envs].reshape(stop - start, num_envs, *column.shape[1:])
        buffer.pos, buffer.full = stop % buffer.buffer_size, stop == buffer.buffer_size

    return Buffer(
        add=lambda step: buffer.add(*step, infos),
        get=lambda: buffer.sample(BATCH_SIZE),
        fill=fill,
        step=lambda obs, action, reward, done, next_obs: (obs, next_obs, action, reward, done),
    )


def _torchrl(size: int, num_envs: int, prioritized: bool) -> Buffer:
    with warnings.catch_warnings(action="ignore"):
        from tensordict import TensorDict
        from torchrl.data import LazyTensorStorage, TensorDictPrioritizedReplayBuffer, TensorDictReplayBuffer

    logging.getLogger("torchrl").setLevel(logging.WARNING)
    storage = {"storage": LazyTensorStorage(size), "batch_size": BATCH_SIZE}
    if prioritized:
        importlib.import_module("torchrl._torchrl")  # in C++: fails with any torch but the one it was compiled for
        buffer = TensorDictPrioritizedReplayBuffer(alpha=_ALPHA, beta=_BETA, **storage)
    else:
        buffer = TensorDictReplayBuffer(**storage)
    new_priorities = torch.rand(BATCH_SIZE)

    def step(*values: Any) -> dict[str, torch.Tensor]:
        names = ("obs", "action", "reward", "done", "next_obs")
        return {name: torch.as_tensor(value) for name, value in zip(names, values, strict=True)}

    def fill(columns: Columns, priorities: NDArray[np.float32] | None) -> None:
        rows = buffer.extend(TensorDict(step(*columns), batch_size=[len(columns[0])]))
        if priorities is not None:
            buffer.update_priority(rows, torch.from_numpy(priorities))

    return Buffer(
        add=lambda step: buffer.add(TensorDict(step)),
        get=buffer.sample,
        fill=fill,
        step=step,
        update=lambda batch: buffer.update_priority(batch["index"], new_priorities),
    )


def _served(size: int, num_envs: int, prioritized: bool) -> Buffer:
    """An actor's writer, with n-step transitions."""
    spec = rb.TransitionSpec(obs=rb.Field((_OBS_SIZE,)), action=rb.Field((_ACTION_SIZE,)))
    sampler = rb.Prioritized(alpha=_ALPHA) if prioritized else rb.Uniform()
    table = rb.ReplayTable(spec, size, sampler, n_step=_N_STEP, gamma=_GAMMA, seed=0)
    server = rb.BufferServer({"replay": table}).start()
    client = rb.connect(server.address)
    writer = client.writer("replay", num_envs=num_envs, autoreset=None)

    def fill(columns: Columns, priorities: NDArray[np.float32] | None) -> None:
        batch = dict(zip(_NAMES, columns, strict=True))
        n_steps = np.full(len(columns[0]), _N_STEP, np.int32)
        writer.extend(batch | {"n_steps": n_steps, "discounts": _GAMMA**n_steps * ~batch["dones"]}, priorities)

    def close() -> None:
        client.close()
        server.stop()

    return Buffer(add=lambda step: writer.add(*step), fill=fill, close=close)


PRIORITIZED = {OURS: _rl_buffer, "cpprb": _cpprb, "torchrl": _torchrl}
UNIFORM = PRIORITIZED | {"SB3": _sb3}
OF_MANY_ENVS = {OURS: _rl_buffer, SERVED: _served, "cpprb": _cpprb, "SB3": _sb3}  # SB3's is never prioritized
WRITABLE = UNIFORM | {SERVED: _served}


def full_buffer(name: str, size: int, num_envs: int, *, prioritized: bool) -> Buffer | str:
    """A full buffer, with random priorities if it is prioritized; or why there is none."""
    if size * _NBYTES_PER_TRANSITION > available_memory_nbytes():
        return "not enough memory"
    try:
        buffer = WRITABLE[name](size, num_envs, prioritized)
    except ModuleNotFoundError:
        return "not installed"
    except ImportError:
        return "not for this torch"
    random = np.random.default_rng(0)
    for start in range(0, size, _FILL_ROWS):
        num_rows = min(_FILL_ROWS, size - start)
        buffer.fill(_columns(random, num_rows), random.random(num_rows, np.float32) if prioritized else None)
    return buffer


def made_up_steps(num_steps: int, num_envs: int) -> Iterator[tuple[Any, ...]]:
    """What environments return: arrays; the reward and the flag of a single environment are plain numbers."""
    columns = _columns(np.random.default_rng(1), num_steps * num_envs)
    if num_envs == 1:
        return zip(*(column.tolist() if column.ndim == 1 else column for column in columns), strict=True)
    return zip(*(column.reshape(num_steps, num_envs, *column.shape[1:]) for column in columns), strict=True)


def _columns(random: np.random.Generator, num_rows: int) -> Columns:
    """One step in a hundred ends its episode."""
    obs, next_obs = (random.random((num_rows, _OBS_SIZE), np.float32) for _ in range(2))
    action, reward = random.random((num_rows, _ACTION_SIZE), np.float32), random.random(num_rows, np.float32)
    return [obs, action, reward, random.random(num_rows) < 0.01, next_obs]
