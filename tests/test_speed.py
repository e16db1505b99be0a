"""A guard against becoming slow: ratios of CPU time in one run, taken in turns, the least of many, with wide margins.

Each limit is three times or more of what was measured (6.7, 3.0 and 1.3 on a busy machine), so that only a change of
kind reaches it: a loop in Python over a batch, a round trip on the hot path, a copy of a whole table.
"""

import time

import numpy as np
import pytest
import torch

import rl_buffer as rb

pytestmark = pytest.mark.timeout(240)

OBS, ACTION, BATCH_SIZE, NUM_ENVS = 17, 6, 256, 64
NAMES = ("obs", "action", "reward", "done", "next_obs")


def least_cpu_s(*calls, num_turns=60, num_calls=10):
    """Of each function the least CPU time of this thread, in seconds, of so many turns."""
    least = [np.inf] * len(calls)
    for _ in range(num_turns):
        for number, call in enumerate(calls):
            started_s = time.thread_time()
            for _ in range(num_calls):
                call()
            least[number] = min(least[number], (time.thread_time() - started_s) / num_calls)
    return least


def steps(num_rows):
    random = np.random.default_rng(0)
    obs, next_obs = (random.random((num_rows, OBS), np.float32) for _ in range(2))
    action, reward = random.random((num_rows, ACTION), np.float32), random.random(num_rows, np.float32)
    return dict(zip(NAMES, (obs, action, reward, np.zeros(num_rows, np.bool_), next_obs), strict=True))


@pytest.fixture
def buffer():
    size = 65_536
    buffer = rb.PrioritizedReplayBuffer(size // NUM_ENVS, NUM_ENVS, OBS, ACTION, alpha=0.6, beta=0.4, seed=0)
    columns = dict(
        zip(("observations", "actions", "rewards", "dones", "next_observations"), steps(size).values(), strict=True)
    )
    buffer.extend(columns, np.random.default_rng(0).random(size))
    return buffer


def test_a_prioritized_get_takes_less_than_twenty_raw_gathers_of_its_rows(buffer):
    rows = buffer._rows.block
    numbers, gathered = torch.randint(len(rows), (BATCH_SIZE,)), torch.empty_like(rows[:BATCH_SIZE])
    get, gather = least_cpu_s(
        lambda: buffer.get(BATCH_SIZE), lambda: torch.index_select(rows, 0, numbers, out=gathered)
    )
    assert get / gather < 20, f"{get * 1e6:.1f} us against {gather * 1e6:.1f}"


def test_an_add_takes_less_than_ten_times_as_long_as_assigning_its_columns(buffer):
    step = steps(NUM_ENVS)
    stored = {name: np.empty((1024, *column.shape), column.dtype) for name, column in step.items()}

    def assign():
        for name, column in step.items():
            stored[name][7] = column

    add, assigned = least_cpu_s(lambda: buffer.add(**step), assign)
    assert add / assigned < 10, f"{add * 1e6:.1f} us against {assigned * 1e6:.1f}"


def test_a_served_sample_and_update_costs_the_learner_less_than_five_times_one_in_process(buffer, serve, connect):
    spec = rb.TransitionSpec(obs=rb.Field((OBS,)), action=rb.Field((ACTION,)))
    client = connect(serve(rb.ReplayTable(spec, capacity=10_000, sampler=rb.Prioritized(alpha=0.6), seed=0)))
    with client.writer("replay", num_envs=NUM_ENVS, autoreset=None) as writer:
        for _ in range(40):
            writer.add(**steps(NUM_ENVS))
    td_errors = torch.rand(BATCH_SIZE)
    with client.sampler("replay", batch_size=BATCH_SIZE, beta=0.4) as sampler:
        served, local = least_cpu_s(
            lambda: sampler.update_priorities(sampler.sample(timeout_s=60.0), td_errors),
            lambda: buffer.update_priorities(buffer.get(BATCH_SIZE), td_errors),
        )
    assert served / local < 5, f"{served * 1e6:.1f} us against {local * 1e6:.1f}"
