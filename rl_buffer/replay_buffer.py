"""`ReplayBuffer`: a table of one process, which needs no server.

    add -> StepHistory --a chunk of items--> rows of this process --commit--> ReplayTableState
                                                                                   | draw
                                     batch on `device` <-- gather <----------------+

The same history, row layout, ring, samplers and batches serve the tables of a server; only the way to them differs.
"""

import json
import os
from collections.abc import Mapping
from typing import Any

import msgspec
import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from rl_buffer import huge_pages
from rl_buffer.batches import Batch
from rl_buffer.buffer_arguments import spec_from_arguments
from rl_buffer.buffer_files import FileReader, write_file
from rl_buffer.episode_ends import autoreset_mode
from rl_buffer.errors import Closed, InvalidInput
from rl_buffer.gather import Gatherer
from rl_buffer.inputs import as_count
from rl_buffer.local_rows import LocalRows
from rl_buffer.replay_input import CopyRows, ReplayInput
from rl_buffer.replay_table import ReplayTableState
from rl_buffer.samplers import Prioritized, Uniform
from rl_buffer.spec import Field, FieldTree, RowLayout, TransitionSpec
from rl_buffer.stats_tracker import StatsTracker
from rl_buffer.tables import ReplayTable

# Steps move from the history to the rows together, because each move costs some 40 us, whatever is in it; at the latest
# when somebody looks. Of more bytes than a second-level cache keeps they come back from the third.
_CHUNK_STEPS = 64
_CHUNK_NBYTES = 512 << 10


class ReplayBuffer(ReplayInput):
    """The last transitions of E environments, sampled uniformly with replacement. Not for several threads.

    UNITS: `buffer_size` is in steps PER ENVIRONMENT, and so is `len()`; `num_transitions` counts all environments.
    The buffer holds buffer_size * num_envs transitions. With `sequence_length` the unit is a sequence, not a step.

    Once full, the oldest transition goes for each new one. With n_step > 1 a transition can be sampled as soon as
    its n steps are there, or its episode has ended.
    """

    _sampler: Uniform | Prioritized = Uniform()
    _eta = 0.9

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
        n_step: int = 1,
        gamma: float | None = None,
        stats_tracker: StatsTracker | None = None,
        device: str | torch.device = "cpu",
        store_device: str | torch.device | None = None,
        seed: int | None = None,
        autoreset: Any = None,
        extras: Mapping[str, Field] | None = None,
        sequence_length: int | None = None,
        burn_in: int = 0,
        overlap: int = 0,
        pad_short_episodes: bool = True,
        recurrent_state: FieldTree = None,
    ) -> None:
        """Reserve the memory.

        Args:
            buffer_size: steps per environment (sequences per environment, where `sequence_length` is given).
            num_envs: environments E that `add` steps at once.
            obs_shape: of one observation; an int, a tuple, or a (nested) mapping for dictionary observations.
            action_shape: of one action.
            observation_space: of ONE environment, instead of `obs_shape`; Box, Discrete, MultiDiscrete, MultiBinary
                or (nested) Dict.
            action_space: of ONE environment, instead of `action_shape`.
            obs_dtype: NumPy or torch dtype, or a mapping as `obs_shape`; default float32, or the space's own. Images
                of uint8 stay uint8, `next_observations` too.
            action_dtype: likewise.
            n_step: reward steps summed per transition.
            gamma: discount factor in [0, 1]; needed for n_step > 1, sequences and `batch.discounts`.
            stats_tracker: is told of every step by `add`; nothing else needs to be called.
            device: where batches are.
            store_device: where the rows are, by default `device`. On a GPU, sampling stays there; only drawn row
                numbers go from the CPU to it.
            seed: of sampling; None draws one.
            autoreset: how the environments reset ("next_step", "same_step", "disabled"), to leave out dummy steps and
                to find true final observations; None stores every step as it is given.
            extras: further Fields of each transition, by name.
            sequence_length: trained steps per sequence; None stores single transitions.
            burn_in: steps before the trained ones.
            overlap: trained steps shared with the sequence before.
            pad_short_episodes: keep episodes shorter than `sequence_length`.
            recurrent_state: Field or mapping of Fields of the policy's state, which `add` is then given with each step.

        Raises:
            InvalidInput: a value is out of range, or neither or both of shapes and spaces are given.
            NotEnoughMemory: the machine cannot hold the buffer.
        """
        buffer_size, num_envs = as_count("buffer_size", buffer_size), as_count("num_envs", num_envs)
        if gamma is None and (n_step > 1 or sequence_length is not None):
            raise InvalidInput(f"n_step = {n_step} and sequence_length = {sequence_length} need gamma=, such as 0.99")
        if stats_tracker is not None and stats_tracker.num_envs != num_envs:
            raise InvalidInput(f"stats_tracker has num_envs {stats_tracker.num_envs}, the buffer has {num_envs}")
        spec = spec_from_arguments(
            obs_shape, action_shape, observation_space, action_space, obs_dtype, action_dtype, extras
        )
        table = ReplayTable(
            TransitionSpec(spec.obs, spec.action, spec.extras, recurrent_state),
            capacity=buffer_size * num_envs,
            sampler=self._sampler,
            n_step=n_step,
            gamma=1.0 if gamma is None else gamma,
            seed=seed,
            sequence_length=sequence_length,
            burn_in=burn_in,
            overlap=overlap,
            pad_short_episodes=pad_short_episodes,
            eta=self._eta,
        )
        step_nbytes = num_envs * RowLayout(spec.transition_fields()).stride_nbytes
        chunk_steps = max(1, min(_CHUNK_STEPS, _CHUNK_NBYTES // step_nbytes))
        super().__init__(table, num_envs, autoreset_mode(autoreset), chunk_steps, stats_tracker)
        self.table = table = msgspec.structs.replace(table, headroom=self._history.max_items)
        self.buffer_size = buffer_size
        self.device = torch.device(device)
        self.store_device = self.device if store_device is None else torch.device(store_device)
        self._has_gamma = gamma is not None
        self._closed = False
        self._rows = LocalRows(table.layout, table.num_rows, self.store_device, self._history.max_items)
        self._state = ReplayTableState(table, huge_pages.zeros(table.num_rows, np.int64))
        hidden = () if self._has_gamma else ("discounts",)
        self._gatherer = Gatherer(table, self._rows.block, self.device, hidden=hidden)

    def __len__(self) -> int:
        """Steps PER ENVIRONMENT that can be sampled (rounded down), in the unit of `buffer_size`."""
        return self.num_transitions // self.num_envs

    @property
    def num_transitions(self) -> int:
        """Transitions (or sequences) of all environments that can be sampled."""
        self.flush()
        return len(self._state)

    def get(self, batch_size: int) -> Batch:
        """Draw a batch uniformly, with replacement.

        Args:
            batch_size: 1 .. num_transitions.

        Returns:
            A `ReplayBatch` on `device`, or a `SequenceBatch`. It is the caller's to keep.

        Raises:
            InvalidInput: fewer transitions are there.
        """
        self._require_items(batch_size)
        self._gatherer.gather(self._state.draw_rows(batch_size))
        return self._gatherer.hand_out({})

    def sample(self, batch_size: int) -> Batch:
        """Another name of `get`."""
        return self.get(batch_size)

    def on_reset(self, mask: ArrayLike | None = None) -> None:
        """See `ReplayInput.on_reset`; the windows that end here can be sampled at once."""
        super().on_reset(mask)
        self._move_items(close=False)

    def clear(self) -> None:
        """Forget all transitions, and the steps that are not transitions yet."""
        self._history.emitted(self._history.complete(close=True))
        self._new_steps = 0
        self._state.clear()

    def flush(self) -> None:
        """Nothing needs it: every method does it first. It is here because a writer has it."""
        if self._new_steps:
            self._move_items(close=False)

    def close(self) -> None:
        """Say that no more steps will come: unfinished n-step windows and sequences are stored as shorter ones."""
        if not self._closed:
            self._move_items(close=True)
            self._closed = True

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write everything but the StatsTracker to one file (safetensors, no pickle); replaces it atomically.

        Raises:
            OSError: it cannot be written; a file that was there stays.
        """
        self.flush()
        arrays, values = self._state.state()
        steps, steps_values = self._history.state()
        # Rows are taken in order, so those never used are at the end.
        used = int(arrays["committed"].max(initial=-1)) + 1
        write_file(
            path,
            {"rows": self._rows.first(used)}
            | {f"table/{name}": array for name, array in arrays.items()}
            | {f"steps/{name}": array for name, array in steps.items()},
            self._identity() | {"table": values, "steps": steps_values},
        )

    def load(self, path: str | os.PathLike[str]) -> None:
        """Go on from what a buffer of the same arguments saved: contents, priorities, open windows, random state.

        The StatsTracker stays as it is. Devices and seed may differ. If the environments were reset since, call
        `on_reset()`, or an n-step window that was open joins two episodes.

        Raises:
            FileNotFoundError: there is no such file.
            InvalidInput: it is no such file, or of a buffer with other arguments. Nothing has changed.
        """
        with FileReader(path) as file:
            file.require(self._identity())
            loaded = ReplayTableState(self.table, huge_pages.zeros(self.table.num_rows, np.int64))
            try:
                used, words = file.shape("rows")
                if words != self._rows.block.shape[1] or used > self.table.num_rows:
                    raise InvalidInput(f"rows are {[used, words]}, expected up to {list(self._rows.block.shape)}")
                loaded.restore(file.arrays("table/"), file.description["table"])
                self._history.restore(file.arrays("steps/"), file.description["steps"])
            except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
                raise InvalidInput(f"{os.fspath(path)} does not hold the state of a buffer: {error!r}") from error
            self._rows.fill(used, lambda start, stop: file.array("rows", start, stop))
            self._state = loaded
        self._new_steps = 0

    def _identity(self) -> dict[str, Any]:
        """What two buffers must have in common for one to load the file of the other."""
        config: dict[str, Any] = msgspec.to_builtins(self.table, str_keys=True)
        del config["seed"]
        config |= {"num_envs": self.num_envs, "autoreset": self.autoreset, "gamma_given": self._has_gamma}
        # Mappings are equal in any order, but rows are laid out in theirs.
        config["leaves"] = list(self.table.layout.fields)
        identity: dict[str, Any] = json.loads(json.dumps(config))  # as it is read back: lists, not tuples
        return identity

    def _require_items(self, batch_size: int) -> None:
        """Make all items of the steps so far; raise InvalidInput if they are fewer than the batch has."""
        if self._new_steps:
            self._move_items(close=False)
        num_items = self._state.allocator.num_committed
        if as_count("batch_size", batch_size) > num_items:
            raise InvalidInput(f"batch_size is {batch_size}, but the buffer holds {num_items} transitions")

    def _make_room(self) -> None:
        if self._closed:
            raise Closed("this buffer was closed")

    def _chunk_is_full(self) -> None:
        self._move_items(close=False)

    def _move_items(self, *, close: bool) -> None:
        complete = self._history.complete(close=close)
        items = complete
        if len(items) > self.table.capacity:  # the first would be evicted by the last
            items = complete[-self.table.capacity :]
        if len(items):
            td_errors = self._history.td_errors(items)
            self._commit(len(items), lambda views, rows: self._history.copy_rows(items, views, rows), td_errors)
        self._history.emitted(complete)
        self._new_steps = 0

    def _commit(self, num_rows: int, copy_rows: CopyRows, td_errors: NDArray[np.float64] | None) -> None:
        rows = self._state.allocator.reserve(num_rows)
        self._rows.write(rows, copy_rows)
        self._state.commit(rows, td_errors)
