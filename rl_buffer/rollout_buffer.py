"""`RolloutBuffer`: the rollout of an on-policy learner, such as PPO, in one process.

    add * buffer_size -> compute_returns_and_advantages -> get, for each epoch -> reset

The rollout is one block of memory that NumPy writes; once it is computed the block is copied to the store device, at
once, and minibatches are gathered there.
"""

import os
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from rl_buffer.batches import leaf_views
from rl_buffer.buffer_arguments import spec_from_arguments
from rl_buffer.buffer_files import FileReader, write_file
from rl_buffer.episode_ends import autoreset_mode
from rl_buffer.errors import InvalidInput
from rl_buffer.gae import explained_variance
from rl_buffer.inputs import as_count
from rl_buffer.rollout_batches import RolloutBatch, RolloutRows, is_handed_out
from rl_buffer.rollout_fragment import RolloutFragment
from rl_buffer.spec import RowLayout
from rl_buffer.stats_tracker import StatsTracker


class RolloutBuffer:
    """One rollout of `buffer_size` STEPS PER ENVIRONMENT: `buffer_size * num_envs` transitions in all.

    `len()` is in the same unit, steps per environment; `num_transitions` counts all environments. Not for several
    threads.
    """

    def __init__(
        self,
        buffer_size: int,
        num_envs: int = 1,
        obs_shape: Any = None,
        action_shape: Any = None,
        *,
        observation_space: Any = None,
        action_space: Any = None,
        obs_dtype: Any = None,
        action_dtype: Any = None,
        gamma: float = 0.99,
        gae_lambda: float = 0.95,
        device: torch.device | str = "cpu",
        store_device: torch.device | str | None = None,
        stats_tracker: StatsTracker | None = None,
        seed: int | None = None,
        autoreset: Any = None,
        restart_when_full: bool = False,
        normalize_advantages: bool = False,
    ) -> None:
        """Take the memory of one rollout; shapes or spaces say of what, as in `spec_from_arguments`.

        Args:
            buffer_size: steps per environment, T.
            num_envs: environments, E.
            obs_shape: of one environment: an int, a tuple, or a mapping of names to shapes.
            action_shape: likewise.
            observation_space: of one environment, instead of the shapes.
            action_space: likewise.
            obs_dtype: None is float32 with shapes, and the space's own with spaces.
            action_dtype: likewise.
            gamma: discount per step, 0..1.
            gae_lambda: of generalized advantage estimation, 0..1.
            device: where minibatches go.
            store_device: where a computed rollout is kept; None is `device`. "cpu" saves memory of the GPU and costs a
                copy per minibatch.
            stats_tracker: is updated by `add`, for `num_envs` environments.
            seed: of the permutations; None draws one.
            autoreset: `envs.metadata["autoreset_mode"]`, or "next_step", "same_step" or "disabled"; None takes every
                row for a step that happened.
            restart_when_full: an `add` to a full rollout drops it and starts the next.
            normalize_advantages: what `get` does unless told otherwise.

        Raises:
            InvalidInput: a value is out of range or of the wrong kind, by name.
        """
        self.buffer_size = as_count("buffer_size", buffer_size)
        self.num_envs = as_count("num_envs", num_envs)
        self.device = torch.device(device)
        self.store_device = self.device if store_device is None else torch.device(store_device)
        self.stats_tracker = stats_tracker
        self.restart_when_full = restart_when_full
        self.normalize_advantages = normalize_advantages
        self.spec = spec_from_arguments(
            obs_shape, action_shape, observation_space, action_space, obs_dtype, action_dtype
        )
        if stats_tracker is not None and stats_tracker.num_envs != self.num_envs:
            raise InvalidInput(f"stats_tracker is for {stats_tracker.num_envs} environments, not for {self.num_envs}")
        if seed is not None and (not isinstance(seed, int | np.integer) or seed < 0):
            raise InvalidInput(f"seed must be an integer >= 0 or None, got {seed!r}")
        self._generator = np.random.default_rng(seed)
        self._fragment = RolloutFragment(
            self.buffer_size,
            self.num_envs,
            gamma=gamma,
            gae_lambda=gae_lambda,
            autoreset=autoreset_mode(autoreset),
        )
        layout = RowLayout(self.spec.rollout_fields(self.buffer_size, self.num_envs))
        self._identity = {
            "rollout_layout": layout.digest,
            "num_envs": self.num_envs,
            "buffer_size": self.buffer_size,
            "gamma": gamma,
            "gae_lambda": gae_lambda,
            "autoreset": autoreset_mode(autoreset),
        }
        is_on_cpu = self.store_device.type == "cpu"
        self._block = torch.zeros(
            (1, layout.stride_nbytes // 8), dtype=torch.int64, pin_memory=self.store_device.type == "cuda"
        )
        self._views = {path: view[0] for path, view in layout.view(self._block.numpy(), 1).items()}
        self._store = self._block if is_on_cpu else torch.empty_like(self._block, device=self.store_device)
        self._leaves = {
            path: leaf[0].flatten(0, 1) for path, leaf in leaf_views(layout, self._store).items() if is_handed_out(path)
        }
        self._happened = np.empty(0, np.int64)  # rows step * E + env to hand out
        # Counts changes of the rollout, so that neither `get` nor an unfinished epoch mixes two states of it.
        self._version = 0
        self._computed_version = -1
        self._fragment.begin(self._views)

    def add(
        self,
        obs: Any,
        action: Any,
        reward: ArrayLike,
        done: ArrayLike,
        value: ArrayLike,
        log_prob: ArrayLike,
        truncated: ArrayLike | None = None,
        terminated: ArrayLike | None = None,
        final_values: ArrayLike | None = None,
        mask: ArrayLike | None = None,
        metrics: Mapping[str, ArrayLike] | None = None,
        done_reasons: Mapping[str, ArrayLike] | None = None,
    ) -> None:
        """Take one step of all E environments: what `step` was called with, and what it returned.

        Scalars per environment are (E,) or (E, 1), for E = 1 also a plain number; arrays or tensors on any device,
        with or without grad. Everything is copied. An episode ends where done | truncated | terminated, at THIS step:
        `done` is not the flag that was known before it.

        Args:
            obs: [E, *obs_shape], or a mapping of such arrays for dictionary observations; E = 1 may leave E out.
            action: [E, *action_shape], likewise.
            reward: float, finite.
            done: bool or 0/1.
            value: float, V(obs).
            log_prob: float, log pi(action | obs).
            truncated: bool or 0/1; None is False.
            terminated: bool or 0/1; None is done and not truncated. It alone stops the bootstrap.
            final_values: float, V(true final obs), read where the episode is truncated; NaN where unknown. In next_step
                mode the dummy step's `value` brings it.
            mask: bool or 0/1; False where no step happened. In next_step mode the dummies are known without it.
            metrics: key -> (E,), for the StatsTracker.
            done_reasons: key -> (E,) bool, likewise.

        Raises:
            InvalidInput: the rollout is full, or a wrong shape, dtype, NaN or infinity, by name. Nothing has changed.
        """
        if self.is_full and not self.restart_when_full:
            raise InvalidInput(
                f"the rollout has all of its {self.buffer_size} steps: compute_returns_and_advantages(), get(), then "
                "reset(); or construct it with restart_when_full=True"
            )
        if self.stats_tracker is None and (metrics is not None or done_reasons is not None):
            raise InvalidInput("metrics and done_reasons need a stats_tracker; the buffer was made without one")
        dropped = self._begin_again() if self.is_full else {}
        try:
            staged = self._fragment.stage(
                obs, action, reward, done, value, log_prob, truncated, terminated, final_values, mask
            )
            if self.stats_tracker is not None:
                self.stats_tracker.update(
                    staged.rewards, staged.ended, metrics=metrics, done_reasons=done_reasons, mask=staged.mask
                )
        except BaseException:
            self._take_back(dropped)
            raise
        self._fragment.accept(staged)
        self._version += 1

    def compute_returns_and_advantages(self, last_values: ArrayLike, last_dones: ArrayLike | None = None) -> None:
        """Run GAE (`gae.generalized_advantages`) over the steps so far; the rollout need not be full.

        Args:
            last_values: (E,) or (E, 1), V(obs after the last step); not read where the last step terminated. In the
                modes next_step and disabled that obs is the final one of an episode truncated there; in the others
                such a step needs `final_values`.
            last_dones: the `done` of the last step once more, and may be left out. What was added counts; a
                difference is warned of.

        Raises:
            InvalidInput: no step was added, a wrong shape or value, or the value after a truncated step is unknown.
        """
        self._fragment.finish(last_values, last_dones)
        self._version += 1
        self._publish()

    def get(
        self, batch_size: int | None = None, shuffle: bool = True, normalize_advantages: bool | None = None
    ) -> Iterator[RolloutBatch]:
        """Hand out every step that happened exactly once: one epoch, in minibatches on `device`.

        Args:
            batch_size: steps per minibatch, the last may be smaller; None gives all in one.
            shuffle: in an order drawn anew at each call; otherwise by (step, environment).
            normalize_advantages: (A - mean) / (std + 1e-8) over each minibatch; None does as the constructor says.
                The std is that of a sample (n - 1), as in PPO implementations in torch, which makes NaN of a
                minibatch of one: here its one advantage becomes 0, as the mean is all that is known.

        Raises:
            InvalidInput: nothing is computed since the last change, nothing happened, or batch_size is out of range;
                all at the call. While iterating: the rollout has changed since the call.
        """
        self._require_computed("get()")
        normalize = self.normalize_advantages if normalize_advantages is None else normalize_advantages
        version = self._version
        rows = RolloutRows(self._leaves, self._happened, self.device, lambda: self._version == version)
        return rows.epoch(batch_size, self._generator if shuffle else None, normalize)

    def reset(self) -> None:
        """Drop the steps and start the next rollout; environments go on where they are."""
        self._fragment.begin(self._views)
        self._version += 1

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the rollout and the random state to one file (safetensors, no pickle); replaces it atomically.

        Raises:
            OSError: it cannot be written; a file that was there stays.
        """
        values = {
            "num_filled": len(self),
            "computed": self._computed_version == self._version,
            "rng": self._generator.bit_generator.state,
        }
        write_file(path, {"rollout": self._block.numpy(), **self._fragment.carried_over()}, self._identity | values)

    def load(self, path: str | os.PathLike[str]) -> None:
        """Go on from what a buffer of the same arguments saved. The StatsTracker stays as it is; devices may differ.

        Raises:
            FileNotFoundError: there is no such file.
            InvalidInput: it is no such file, or of a buffer with other arguments. Nothing has changed.
        """
        with FileReader(path) as file:
            file.require(self._identity)
            block = file.array("rollout")
            if block.shape != tuple(self._block.shape) or block.dtype != np.int64:
                raise InvalidInput(f"{os.fspath(path)} holds a rollout of {block.dtype}{list(block.shape)}")
            generator = np.random.default_rng()
            generator.bit_generator.state = file.description["rng"]
            computed = bool(file.description["computed"])
            carried = {name: file.array(name) for name in ("previous_ended", "last_done")}
            self._fragment.carry_over(carried, int(file.description["num_filled"]))  # the last that can refuse
        self._block.numpy()[...] = block
        self._generator = generator
        self._version += 1
        if computed:
            self._publish()

    @property
    def explained_variance(self) -> float:
        """1 - Var(returns - values) / Var(returns) of the computed rollout; NaN where the returns do not vary.

        Raises:
            InvalidInput: nothing is computed since the last change.
        """
        self._require_computed("explained_variance")
        views = self._views
        return explained_variance(views["values"], views["returns"], views["mask"])

    @property
    def num_transitions(self) -> int:
        """Steps that happened, of all environments together. O(T * E)."""
        return int(np.count_nonzero(self._views["mask"][: len(self)]))

    @property
    def is_full(self) -> bool:
        """Whether every step is there."""
        return self._fragment.is_full

    def __len__(self) -> int:
        """Steps PER ENVIRONMENT so far, those that did not happen included."""
        return self._fragment.num_filled

    def _publish(self) -> None:
        """Let `get` see the computed rollout."""
        self._happened = np.flatnonzero(self._views["mask"])
        if self._store is not self._block:
            self._store.copy_(self._block)  # waits: the next rollout is written into the same pinned memory
        self._computed_version = self._version

    def _require_computed(self, call: str) -> None:
        if self._computed_version != self._version:
            raise InvalidInput(f"{call} needs compute_returns_and_advantages() after the last add() or reset()")

    def _begin_again(self) -> dict[str, NDArray[Any]]:
        """Go to the first row, and return what stands there: the next step may yet be refused."""
        first_row = {path: view[0].copy() for path, view in self._views.items()}
        self._fragment.begin(self._views)
        return first_row

    def _take_back(self, first_row: Mapping[str, NDArray[Any]]) -> None:
        if first_row:
            for path, values in first_row.items():
                self._views[path][0] = values
            self._fragment.num_filled = self.buffer_size
