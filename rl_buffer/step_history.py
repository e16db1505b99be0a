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
from rl_buffer.inputs import as_flags, as_numpy, copy_array, copy_numbers, none_hold
from rl_buffer.samplers import Prioritized
from rl_buffer.spec import leaves_below
from rl_buffer.step_leaves import StepLeaves
from rl_buffer.tables import ReplayTable

_LOG = logging.getLogger("rl_buffer")
_UNKNOWN = np.nan
_CHECKED_ENDS = 1_000  # of episodes: environments that reset in another way than was said show it in the first ones
_STAGED = ("observations", "next_observations", "actions", "extras", "recurrent_states")

Items = TypeVar("Items", bound=Sized)


class StagedStep(NamedTuple):
    """A step that has been copied in and not yet accepted; everything is [E]."""

    rewards: NDArray[np.float64]
    ended: NDArray[np.bool_]
    terminated: NDArray[np.bool_]
    truncated: NDArray[np.bool_]
    dummy: NDArray[np.bool_] | None  # next_step mode: where nothing happened; None: nowhere
    is_quiet: bool = False  # nothing ends, and nothing is a dummy


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
        fields = {path: field for path, field in staged.items() if path.split("/")[0] in _STAGED}
        self._step_leaves = StepLeaves(fields, capacity, num_envs)
        self._leaves = self._step_leaves.arrays
        self._obs, self._next_obs = (leaves_below(name, self._leaves) for name in ("observations", "next_observations"))
        copier = self._step_leaves.copier
        self._copy_obs = copier("obs", "observations")
        self._copy_next_obs = copier("next_obs", "next_observations")
        self._copy_action = copier("action", "actions")
        self._copy_extras = {key: copier(f"extras[{key!r}]", f"extras/{key}") for key in table.spec.extras}
        self._has_recurrent_state = bool(leaves_below("recurrent_states", self._leaves))
        self._copy_recurrent_state = copier("recurrent_state", "recurrent_states")
        shape = (capacity, num_envs)
        self._rewards = np.zeros(shape)
        # Of the steps to come these have what most steps have, so that a step in which nothing ends writes none.
        self._flags = np.zeros((4, *shape), np.bool_)
        self._terminated, self._truncated, cut, dummy = self._flags
        self._cut = cut  # nothing is joined across: ends and manual resets
        self._dummy = dummy  # next_step mode: the step after an end did not happen
        self._startable = np.ones(shape, np.bool_)  # real, and not emitted yet
        self._values = np.full((4, *shape), _UNKNOWN)
        self._q_taken, self._state_values, self._final_values, self._priorities = self._values
        # All of it, [capacity, ...].
        by_step = (array.swapaxes(0, 1) for array in (self._flags, self._values))
        self._by_step = [*self._step_leaves.blocks, self._rewards, self._startable, *by_step]
        self._previous_ended = np.zeros(num_envs, np.bool_)
        self._any_previous_ended = False
        # What `stage` returns where nothing ends.
        self._nowhere = np.zeros(num_envs, np.bool_)
        self._nowhere.flags.writeable = False
        self._uneventful = [
            StagedStep(rewards, self._nowhere, self._nowhere, self._nowhere, None, is_quiet=True)
            for rewards in self._rewards
        ]
        # Of the last ends, in the first leaf of the observation: to notice that environments reset in another way.
        self._first_obs, self._first_next_obs = (next(iter(leaves.values())) for leaves in (self._obs, self._next_obs))
        self._final_obs = np.zeros_like(self._first_next_obs[0])
        self._final_moved = np.zeros(num_envs, np.bool_)
        self._checks_resets = autoreset in (None, "next_step")
        self._ends_to_check = _CHECKED_ENDS
        self._any_values = False  # whether any step came with values or a priority; such a table computes priorities
        self._values_staged = False  # for the step that is not accepted yet

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
        self._copy_obs(step, obs)
        self._copy_next_obs(step, next_obs)
        self._copy_action(step, action)
        if extras is not None or self._copy_extras:
            self._stage_extras(extras)
        if recurrent_state is not None or self._has_recurrent_state:
            self._stage_recurrent_state(recurrent_state)
        self._step_leaves.require_finite(step)
        staged = self._uneventful[step]
        copy_numbers("reward", staged.rewards, reward)
        num_envs = self._num_envs
        if not (none_hold(done, num_envs) and none_hold(truncated, num_envs) and none_hold(terminated, num_envs)):
            staged = self._ends(staged.rewards, done, truncated, terminated)
        if (
            priority is not None
            or q_taken is not None
            or state_value is not None
            or final_value is not None
            or self._values_staged
        ):
            self._stage_values(priority, q_taken, state_value, final_value)
            if final_value is not None:  # perhaps given for all environments: elsewhere it is not the value meant
                self._final_values[step][~staged.ended] = _UNKNOWN
        if self._autoreset == "same_step":
            self._stage_final_observations(staged.ended, infos)
        if not self._any_previous_ended:
            return staged
        rewards, ended, terminateds, truncateds, *_ = staged
        if self._checks_resets:
            self._check_resets(rewards)
        if self._autoreset != "next_step":
            return staged
        dummy = self._previous_ended.copy()
        rewards[dummy] = 0.0
        return StagedStep(rewards, ended & ~dummy, terminateds & ~dummy, truncateds & ~dummy, dummy)

    def _ends(self, rewards: NDArray[np.float64], done: Any, truncated: Any, terminated: Any) -> StagedStep:
        flags = as_flags("done", done, self._num_envs)
        if truncated is None and terminated is None:  # 3 us less
            return StagedStep(rewards, flags, flags, self._nowhere, None)
        truncateds = as_flags("truncated", truncated, self._num_envs)
        if terminated is None:
            terminateds = flags & ~truncateds
        else:
            terminateds = as_flags("terminated", terminated, self._num_envs)
            truncateds = truncateds | (flags & ~terminateds)  # what ended and did not terminate
        return StagedStep(rewards, flags | truncateds | terminateds, terminateds, truncateds, None)

    def accept(self, staged: StagedStep) -> None:
        """Take the staged step for good."""
        step = self.num_steps
        if staged.is_quiet:
            if self._any_previous_ended:
                self._any_previous_ended = False
                self._previous_ended[:] = False
        else:
            self._accept_ends(step, staged)
        self._values_staged = False
        self.num_steps = step + 1

    def _accept_ends(self, step: int, staged: StagedStep) -> None:
        self._terminated[step] = staged.terminated
        if staged.truncated is not self._nowhere:
            self._truncated[step] = staged.truncated
        self._cut[step] = staged.ended
        if staged.dummy is not None:
            self._dummy[step] = staged.dummy
            self._startable[step] = ~staged.dummy
        if not self._checks_resets and self._autoreset != "next_step":  # nobody will ask
            return
        self._previous_ended[:] = staged.ended
        self._any_previous_ended = bool(np.count_nonzero(staged.ended))
        if self._checks_resets and self._any_previous_ended:
            obs, next_obs = self._first_obs[step], self._first_next_obs[step]
            # One by one, as there are few: 0.9 us each, where all at once took 6 (64 environments of 17 floats).
            ended = staged.ended.nonzero()[0].tolist()
            self._ends_to_check -= len(ended)
            self._checks_resets = self._ends_to_check > 0
            for env in ended:
                self._final_obs[env] = next_obs[env]
                self._final_moved[env] = _differ(obs[env], next_obs[env])

    def _check_resets(self, rewards: NDArray[np.float64]) -> None:
        """Say, once, that a step after an end does not look like `autoreset`: rows would be wrong or missing."""
        obs = self._first_obs[self.num_steps]
        for env in self._previous_ended.nonzero()[0].tolist():
            goes_on = not _differ(obs[env], self._final_obs[env])
            if self._autoreset is None:
                suspicious = goes_on and self._final_moved[env] and rewards[env] == 0
                what = (
                    "the step after its end begins at the final observation and has reward 0: a dummy step of "
                    "environments that reset in next_step mode, stored as a real one. Pass autoreset='next_step', or "
                    "what envs.metadata['autoreset_mode'] says"
                )
            else:
                suspicious = not goes_on
                what = (
                    "the step after its end is left out as a dummy of next_step mode, but does not begin at the final "
                    "observation. If you reset environments by hand, pass autoreset=None or call on_reset()"
                )
            if suspicious:
                self._checks_resets = False
                # Logged: it is a guess, and must not end a run where warnings are errors.
                _LOG.warning("environment %d: %s", env, what)
                return

    def cut(self, mask: NDArray[np.bool_]) -> None:
        """Environments in `mask` [E] were reset by hand: their next step is a real one and joins nothing before."""
        if self.num_steps:
            self._cut[self.num_steps - 1] |= mask
        self._previous_ended &= ~mask
        self._any_previous_ended = bool(np.count_nonzero(self._previous_ended))

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

    def let_go(self) -> None:
        """Hold no memory of a table any more."""

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
        self._any_previous_ended = bool(np.count_nonzero(self._previous_ended))
        self.num_steps, self._any_values = num_steps, any_values
        self._values_staged = True  # perhaps there: to be cleared with the rest
        self._clear(num_steps, self.capacity)

    def _named_arrays(self) -> Iterator[tuple[str, NDArray[Any]]]:
        for path, leaf in self._leaves.items():
            yield f"leaves/{path}", leaf
        for name, value in vars(self).items():
            if isinstance(value, np.ndarray) and value.base is None and value is not self._nowhere:
                yield name.lstrip("_"), value

    def _forget(self, num_steps: int) -> None:
        """Drop the oldest steps."""
        kept = self.num_steps - num_steps
        if num_steps and kept:
            for array in self._by_step:
                array[:kept] = array[num_steps : self.num_steps]
        self._clear(kept, self.num_steps + 1)  # one more was perhaps staged, and refused
        self.num_steps = kept

    def _clear(self, start: int, stop: int) -> None:
        """Make these rows ready for steps to come."""
        self._flags[:, start:stop] = False
        self._startable[start:stop] = True
        if self._any_values or self._values_staged:
            self._values[:, start:stop] = _UNKNOWN

    def _stage_recurrent_state(self, recurrent_state: Any) -> None:
        if recurrent_state is None:
            raise InvalidInput("recurrent_state= is missing; pass what the policy carried into this step")
        if not self._has_recurrent_state:
            raise InvalidInput("recurrent_state= was given, but the spec has none; leave it out or add it to the spec")
        self._copy_recurrent_state(self.num_steps, recurrent_state)

    def _stage_extras(self, extras: Mapping[str, Any] | None) -> None:
        given, expected = set(extras or ()), set(self._copy_extras)
        if given != expected:
            raise InvalidInput(f"extras have keys {sorted(given)}, the table's are {sorted(expected)}")
        for key, value in (extras or {}).items():
            self._copy_extras[key](self.num_steps, value)

    def _stage_values(self, priority: Any, q_taken: Any, state_value: Any, final_value: Any) -> None:
        step = self.num_steps
        self._values_staged = True
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


def _differ(obs: NDArray[Any], other: NDArray[Any]) -> bool:
    """Whether two observations [*shape] differ; by their bytes, a tenth of the time of an elementwise comparison."""
    return obs.tobytes() != other.tobytes()
