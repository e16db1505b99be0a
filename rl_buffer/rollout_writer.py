"""`RolloutWriter`: one actor's rollouts, written step by step into fragments of a served table.

    begin (waits for a fragment) -> add, add, ... -> commit: GAE, then published -> begin ...

A fragment costs two messages. Nothing is staged: a step is written where the learner will read it. No torch; the GAE
kernel is Numba's. One thread at a time.
"""

import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rl_buffer import frames, messages
from rl_buffer.connection import Channel, ChannelUser
from rl_buffer.episode_ends import Autoreset
from rl_buffer.errors import Closed, DeadlineExceeded, InvalidInput
from rl_buffer.frames import Commit
from rl_buffer.rollout_fragment import RolloutFragment
from rl_buffer.stats_tracker import Episode, StatsTracker
from rl_buffer.tables import RolloutTable, StatsConfig


class RolloutWriter(ChannelUser):
    """Writes rollouts of the table's `num_envs` environments. Made by `client.rollout_writer`.

    Not for several threads; make one writer per thread.
    """

    def __init__(
        self,
        channel: Channel,
        call: Callable[[messages.Request], messages.Reply],
        name: str,
        table: RolloutTable,
        rows: Mapping[str, NDArray[Any]],
        stats: StatsConfig,
        *,
        number: int,
        autoreset: Autoreset | None,
        timeout_s: float,
        explain: Callable[[], str],
        parameter_version: Callable[[], int],
    ) -> None:
        """Open the channel and ask for the first fragment; `rows` are the views of the shared rows by path."""
        self.table = table
        self.number = number
        self.timeout_s = timeout_s
        self.stats_tracker = StatsTracker(
            table.num_envs, stats.window, stats.category, stats.extra_metrics_keys, stats.done_reason_keys
        )
        self._name = name
        self._channel = channel
        self._call = call
        self._rows = rows
        self._explain = explain
        self._parameter_version = parameter_version
        self._fragment = RolloutFragment(
            table.num_steps, table.num_envs, gamma=table.gamma, gae_lambda=table.gae_lambda, autoreset=autoreset
        )
        self._row: int | None = None  # of the fragment that is being written
        self._sequence = 0
        self._unsent_episodes: list[Episode] = []
        self._closed = False
        call(messages.OpenWriter(channel.number, name, 1, 1))

    @property
    def is_full(self) -> bool:
        """Whether the fragment has all of its steps and waits for `commit`."""
        return self._row is not None and self._fragment.is_full

    def begin(self, timeout_s: float | None = None) -> None:
        """Wait for a fragment, if none is being written. Then is the time to look for newer parameters.

        Raises:
            DeadlineExceeded: there was none in time; the message says who has them. It may be called again.
            ServerLost: the server ended.
        """
        self._check()
        timeout_s = self.timeout_s if timeout_s is None else timeout_s
        deadline_s = time.monotonic() + timeout_s
        while self._row is None:
            frame = self._channel.receive(max(0.0, deadline_s - time.monotonic()))
            if frame is None:
                raise DeadlineExceeded(f"begin on table {self._name!r} waited {timeout_s} s: {self._explain()}")
            self._take(frames.decode_grant(frame))

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
        """Take one step of all environments, as `RolloutBuffer.add`; begins a fragment if none is being written.

        Raises:
            InvalidInput: the fragment is full and must be committed, or a wrong argument, by name. Nothing was added.
            DeadlineExceeded: as `begin`.
        """
        self._check()
        if self._row is None:
            self.begin()
        if self._fragment.is_full:
            raise InvalidInput(f"the fragment has all of its {self.table.num_steps} steps: commit(last_values) it")
        staged = self._fragment.stage(
            obs, action, reward, done, value, log_prob, truncated, terminated, final_values, mask
        )
        self.stats_tracker.update(
            staged.rewards, staged.ended, metrics=metrics, done_reasons=done_reasons, mask=staged.mask
        )
        self._rows["versions"][self._row, self._fragment.num_filled] = self._parameter_version()
        self._fragment.accept(staged)

    def commit(self, last_values: ArrayLike, last_dones: ArrayLike | None = None) -> None:
        """Compute advantages and returns, and publish the fragment; it may have fewer steps than its table says.

        Args:
            last_values: (E,) or (E, 1), V(obs after the last step), as for `RolloutBuffer`.
            last_dones: the `done` of the last step once more, and may be left out.

        Raises:
            InvalidInput: nothing was added, or as `RolloutBuffer.compute_returns_and_advantages`. Nothing was sent.
        """
        self._check()
        if self._row is None:
            raise InvalidInput("there is no step to commit; add() some first")
        self._fragment.finish(last_values, last_dones)
        num_filled = self._fragment.num_filled
        versions = self._rows["versions"][self._row]
        versions[num_filled:] = versions[num_filled - 1]
        self._rows["writer"][self._row] = self.number
        self._unsent_episodes += self.stats_tracker.drain()
        commit = Commit(
            epoch=self._channel.connection.epoch,
            num_rows=1,
            sequence=self._sequence + 1,
            parameter_version=int(versions.min()),
            num_wanted=1,
            td_errors=None,
            episodes=self._unsent_episodes,
        )
        self._channel.send(commit.encode())
        # Sent: from here on the fragment is the server's. Had it failed, nothing would have changed.
        self._sequence += 1
        self._row = None
        self._unsent_episodes = []

    def _check(self) -> None:
        if self._closed:
            raise Closed("this writer was closed")
        self._channel.connection.check()

    def _take(self, grant: frames.Grant) -> None:
        for row in grant.rows.tolist():
            self._row = row
            self._fragment.begin({path: view[row] for path, view in self._rows.items() if np.ndim(view[row])})
