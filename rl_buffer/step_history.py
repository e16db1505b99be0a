"""The last steps of E environments, of which a table's items are made: staged in ordinary memory, copied out.

    stage -> (the caller may still refuse) -> accept -> complete -> copy_rows -> emitted
                                                  ^ what is still open is carried over

Items are n-step transitions (`transition_history`) or sequences (`sequence_history`); both are complete only some
steps later. Knows tables and autoreset modes, but neither rows' numbers nor servers. No torch.
"""

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sized
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from rl_buffer.episode_ends import Autoreset, final_observation
from rl_buffer.errors import InvalidInput
from rl_buffer.inputs import as_flags, as_numpy, copy_array, copy_numbers, copy_tree
from rl_buffer.samplers import Prioritized
from rl_buffer.spec import leaves_below
from rl_buffer.tables import ReplayTable

_LOG = logging.getLogger("rl_buffer")
_UNKNOWN = np.nan
_STAGED = ("observations", "next_observations", "actions", "extras", "recurrent_states")

Items = TypeVar("Items", bound=Sized)


class StagedStep(NamedTuple):
    """A step that has been copied in and not yet accepted; everything is [E]."""

    rewards: NDArray[np.float64]
    ended: NDArray[np.bool_]
    terminated: NDArray[np.bool_]
    truncated: NDArray[np.bool_]
    dummy: NDArray[np.bool_] | None  # next_step mode: where nothing happened; None: nowhere


class StepHistory(ABC, Generic[Items]):
    """The last steps of E environments, the oldest first: every input of `add`, and what became of it.

    Arrays are [capacity, E, ...]; the first `num_steps` rows are filled.
    """

    def __init__(self, table: ReplayTable, num_envs: int, autoreset: Autoreset | None, capacity: int) -> None:
        self.num_steps = 0
        self.capacity = capacity
        self._table = table
        self._num_envs = num_envs
        self._autoreset = autoreset
        staged = table.spec.transition_fields() | table.spec.recurrent_fields()
        self._leaves = {
            path: np.zeros((capacity, num_envs, *field.shape), field.dtype)
            for path, field in staged.items()
            if path.split("/")[0] in _STAGED
        }
        self._obs, self._next_obs, self._actions, self._recurrent_states = (
            leaves_below(name, self._leaves)
            for name in ("observations", "next_observations", "actions", "recurrent_states")
        )
        shape = (capacity, num_envs)
        self._rewards = np.zeros(shape)
        self._terminated = np.zeros(shape, np.bool_)
        self._truncated = np.zeros(shape, np.bool_)
        self._cut = np.zeros(shape, np.bool_)  # nothing is joined across: ends and manual resets
        self._dummy = np.zeros(shape, np.bool_)  # next_step mode: the step after an end did not happen
        self._startable = np.zeros(shape, np.bool_)  # real, and not emitted yet
        self._q_taken = np.full(shape, _UNKNOWN)
        self._state_values = np.full(shape, _UNKNOWN)
        self._final_values = np.full(shape, _UNKNOWN)
        self._priorities = np.full(shape, _UNKNOWN)
        arrays = [array for array in vars(self).values() if isinstance(array, np.ndarray)]
        self._arrays = [*self._leaves.values(), *arrays]
        self._previous_ended = np.zeros(num_envs, np.bool_)
        self._nowhere = np.zeros(num_envs, np.bool_)
        # Of the last ends, in the first leaf of the observation: to notice that environments reset in another way.
        first_leaf = next(iter(self._next_obs.values()))
        self._final_obs = np.zeros_like(first_leaf[0])
        self._final_moved = np.zeros(num_envs, np.bool_)
        self._checks_resets = autoreset in (None, "next_step")
        self._any_values = False  # whether any step came with values or a priority; such a table computes priorities

    @property
    def is_full(self) -> bool:
        """Whether `stage` has no place."""
        return self.num_steps == self.capacity

    def stage(
        self,
        obs: Any,
        action: Any,
        reward: Any,
        done: Any,
        next_obs: Any,
        truncated: Any,
        terminated: Any,
        priority: Any,
        q_taken: Any,
        state_value: Any,
        final_value: Any,
        extras: Mapping[str, Any] | None,
        infos: Any,
        recurrent_state: Any,
    ) -> StagedStep:
        """Copy in what `ReplayWriter.add` was given; until `accept`, nothing has happened.

        Raises:
            InvalidInput: a wrong shape, dtype or value, by name.
        """
        step = self.num_steps
        copy_tree("obs", self._obs, step, obs)
        copy_tree("next_obs", self._next_obs, step, next_obs)
        copy_tree("action", self._actions, step, action)
        self._stage_extras(extras)
        if recurrent_state is not None or self._recurrent_states:
            self._stage_recurrent_state(recurrent_state)
        rewards = self._rewards[step]
        copy_numbers("reward", rewards, reward)
        flags = as_flags("done", done, self._num_envs)
        if truncated is None and terminated is None:  # 1 us less
            ended = terminateds = flags.copy()
            truncateds = self._nowhere
        else:
            truncateds = as_flags("truncated", truncated, self._num_envs)
            if terminated is None:
                terminateds = flags & ~truncateds
            else:
                terminateds = as_flags("terminated", terminated, self._num_envs)
                truncateds = truncateds | (flags & ~terminateds)  # what ended and did not terminate
            ended = flags | truncateds | terminateds
        self._stage_values(priority, q_taken, state_value, final_value)
        if final_value is not None:  # perhaps given for all environments: elsewhere it is not the value that is meant
            self._final_values[step][~ended] = _UNKNOWN
        if self._autoreset == "same_step":
            self._stage_final_observations(ended, infos)
        any_ended = np.count_nonzero(self._previous_ended)
        if any_ended and self._checks_resets:
            self._check_resets(rewards)
        if self._autoreset != "next_step" or not any_ended:
            return StagedStep(rewards, ended, terminateds, truncateds, None)
        dummy = self._previous_ended
        rewards[dummy] = 0.0
        return StagedStep(rewards, ended & ~dummy, terminateds & ~dummy, truncateds & ~dummy, dummy)

    def accept(self, staged: StagedStep) -> None:
        """Take the staged step for good."""
        step = self.num_steps
        self._terminated[step] = staged.terminated
        self._truncated[step] = staged.truncated
        self._cut[step] = staged.ended
        self._dummy[step] = False if staged.dummy is None else staged.dummy
        self._startable[step] = True if staged.dummy is None else ~staged.dummy
        self._previous_ended = staged.ended
        if self._checks_resets and np.count_nonzero(staged.ended):
            obs, next_obs = next(iter(self._obs.values()))[step], next(iter(self._next_obs.values()))[step]
            self._final_obs[...] = next_obs
            self._final_moved[...] = _differs(obs, next_obs)
        self.num_steps += 1

    def _check_resets(self, rewards: NDArray[np.float64]) -> None:
        """Say, once, that a step after an end does not look like `autoreset`: rows would be wrong or missing."""
        goes_on = ~_differs(next(iter(self._obs.values()))[self.num_steps], self._final_obs)
        if self._autoreset is None:
            suspicious = self._previous_ended & goes_on & self._final_moved & (rewards == 0)
            what = (
                "the step after its end begins at the final observation and has reward 0: a dummy step of environments "
                "that reset in next_step mode, stored as a real one. Pass autoreset='next_step', or what "
                "envs.metadata['autoreset_mode'] says"
            )
        else:
            suspicious = self._previous_ended & ~goes_on
            what = (
                "the step after its end is left out as a dummy of next_step mode, but does not begin at the final "
                "observation. If you reset environments by hand, pass autoreset=None or call on_reset()"
            )
        if np.count_nonzero(suspicious):
            self._checks_resets = False
            # Logged: it is a guess, and must not end a run where warnings are errors.
            _LOG.warning("environment %d: %s", suspicious.argmax(), what)

    def cut(self, mask: NDArray[np.bool_]) -> None:
        """Environments in `mask` [E] were reset by hand: their next step is a real one and joins nothing before."""
        if self.num_steps:
            self._cut[self.num_steps - 1] |= mask
        self._previous_ended = self._previous_ended & ~mask

    @property
    @abstractmethod
    def max_items(self) -> int:
        """The most items that can be complete at once."""

    @abstractmethod
    def complete(self, *, close: bool) -> Items:
        """The items that are complete, the oldest first; with `close` the unfinished ones too, as they are."""

    @abstractmethod
    def td_errors(self, items: Items) -> NDArray[np.float64] | None:
        """Initial TD errors [N] of the items, NaN where unknown; None where no priorities are in play."""

    @abstractmethod
    def copy_rows(self, items: Items, views: Mapping[str, NDArray[Any]], rows: NDArray[np.int64]) -> None:
        """Write the items into `rows` [N] of the leaf views of a table."""

    @abstractmethod
    def emitted(self, items: Items) -> None:
        """Forget what `complete` returned last, and every step that nothing needs any more."""

    def state(self) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
        """Arrays and JSON values from which `restore` goes on."""
        return dict(self._named_arrays()), {"num_steps": self.num_steps, "any_values": self._any_values}

    def restore(self, arrays: Mapping[str, NDArray[Any]], values: Mapping[str, Any]) -> None:
        """Take over what `state` returned, for the same table, environments and capacity.

        Raises:
            InvalidInput: it does not fit. Nothing changes.
        """
        own = dict(self._named_arrays())
        for name, array in own.items():
            if name not in arrays or (arrays[name].shape, arrays[name].dtype) != (array.shape, array.dtype):
                raise InvalidInput(f"the steps of a saved buffer lack {name!r} as {array.dtype}{list(array.shape)}")
        num_steps, any_values = int(values["num_steps"]), bool(values["any_values"])
        if not 0 <= num_steps <= self.capacity:
            raise InvalidInput(f"a saved buffer has {num_steps} steps, expected 0..{self.capacity}")
        for name, array in own.items():
            array[...] = arrays[name]
        self.num_steps, self._any_values = num_steps, any_values

    def _named_arrays(self) -> Iterator[tuple[str, NDArray[Any]]]:
        for path, leaf in self._leaves.items():
            yield f"leaves/{path}", leaf
        for name, value in vars(self).items():
            if isinstance(value, np.ndarray):
                yield name.lstrip("_"), value

    def _forget(self, num_steps: int) -> None:
        """Drop the oldest steps."""
        kept = self.num_steps - num_steps
        if num_steps and kept:
            for array in self._arrays:
                array[:kept] = array[num_steps : self.num_steps]
        self.num_steps = kept

    def _stage_recurrent_state(self, recurrent_state: Any) -> None:
        if recurrent_state is None:
            raise InvalidInput("recurrent_state= is missing; pass what the policy carried into this step")
        if not self._recurrent_states:
            raise InvalidInput("recurrent_state= was given, but the spec has none; leave it out or add it to the spec")
        copy_tree("recurrent_state", self._recurrent_states, self.num_steps, recurrent_state)

    def _stage_extras(self, extras: Mapping[str, Any] | None) -> None:
        given, expected = set(extras or ()), set(self._table.spec.extras)
        if given != expected:
            raise InvalidInput(f"extras have keys {sorted(given)}, the table's are {sorted(expected)}")
        for key, value in (extras or {}).items():
            copy_array(f"extras[{key!r}]", self._leaves[f"extras/{key}"][self.num_steps], value)

    def _stage_values(self, priority: Any, q_taken: Any, state_value: Any, final_value: Any) -> None:
        step = self.num_steps
        if priority is not None and not isinstance(self._table.sampler, Prioritized):
            raise InvalidInput("priority= was given, but the table is sampled uniformly; leave it out")
        if priority is not None and self._table.sequence_length is not None:
            raise InvalidInput(
                "priority= is for single transitions, this table's items are sequences; pass q_taken= and "
                "state_value=, then the writer computes it when the sequence is complete"
            )
        if priority is not None and self._table.n_step != 1:
            raise InvalidInput(
                f"priority= is for n_step = 1, this table has {self._table.n_step}; pass q_taken= and state_value=, "
                "then the writer computes it when the window closes"
            )
        for argument, target, value in (
            ("priority", self._priorities, priority),
            ("q_taken", self._q_taken, q_taken),
            ("state_value", self._state_values, state_value),
            ("final_value", self._final_values, final_value),
        ):
            if value is None:
                target[step] = _UNKNOWN
            else:
                copy_numbers(argument, target[step], value)
                self._any_values = True
        if priority is not None and (self._priorities[step] < 0).any():
            raise InvalidInput(f"priority must be >= 0, got {self._priorities[step].min()}")

    def _stage_final_observations(self, ended: NDArray[np.bool_], infos: Any) -> None:
        for env in np.flatnonzero(ended).tolist():
            for path, leaf in self._next_obs.items():
                final = as_numpy(final_observation(infos, env, path))
                # With the ellipsis also an observation of shape () is a view.
                copy_array(f"infos['final_obs'][{env}]", leaf[self.num_steps, env, ...], final)


def _differs(obs: NDArray[Any], other: NDArray[Any]) -> NDArray[np.bool_]:
    """Where [E] observations [E, *shape] differ."""
    differs: NDArray[np.bool_] = (obs != other).reshape(len(obs), -1).any(axis=1)
    return differs
