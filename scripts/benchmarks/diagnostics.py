"""Measure what `client.info()`'s diagnostics cost the server: `ServerCore.handle` under full load, with and without.

uv run scripts/benchmarks/diagnostics.py           half a minute on an idle core

Two cores take turns on the same messages: writers' commits of 64 rows and a learner's credits of 256 new priorities, in
the mix of one sample per insert, on a full prioritized table. One of them notes nothing. Half a second of the clock
passes every 2,000 messages, which is less than at full load, and one `info` is asked for each: the same in both.
"""

import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))  # rl_buffer as it is here

import numpy as np
import tyro

from rl_buffer import frames, messages
from rl_buffer.frames import Commit, Credit
from rl_buffer.parameter_slots import BOARD_LENGTH, ParameterSlots
from rl_buffer.replay_table import ReplayTableState
from rl_buffer.samplers import Prioritized
from rl_buffer.server_core import ServerCore
from rl_buffer.spec import Field, TransitionSpec
from rl_buffer.tables import ReplayTable, StatsConfig

CHUNK, BATCH, EPOCH, TABLE = 64, 256, 1, "replay"
COMMITS_PER_CREDIT = BATCH // CHUNK
MESSAGES_PER_SECOND = 4_000


@dataclass
class Options:
    """What is measured."""

    capacity: int = 1_000_000
    """Transitions in the table."""
    num_writers: int = 8
    """That commit in turn, each a client of its own."""
    num_turns: int = 1001
    """How often each core is measured."""
    credits_per_turn: int = 4
    """And four commits with each."""


class Load:
    """One core with its writers and its learner."""

    def __init__(self, options: Options, *, is_watched: bool) -> None:
        spec = TransitionSpec(obs=Field((17,)), action=Field((6,)))
        config = ReplayTable(spec, options.capacity, Prioritized(), seed=0)
        self._state = ReplayTableState(config, np.zeros(config.num_rows, np.int64))
        self._core = ServerCore(EPOCH, {TABLE: self._state}, StatsConfig())
        self._core.parameters["policy"] = ParameterSlots(np.zeros(BOARD_LENGTH, np.int64))
        self._core.parameters["policy"].restore(5)
        if not is_watched:
            watch = self._core.tables[TABLE].diagnostics.watch
            watch.drawn, watch.next_commit_s = _note_nothing, float("inf")
            self._core._rates.next_note_s = float("inf")
        self._rng = np.random.default_rng(0)
        self._sequences = dict.fromkeys(range(1, options.num_writers + 1), 0)
        for client in (0, *self._sequences):
            self._core.attach(_token(client), f"client-{client}", 1, 0.0)
            request = messages.OpenWriter(0, TABLE, CHUNK, 2 * CHUNK) if client else self._sampler()
            envelope = messages.Envelope(1, EPOCH, request)
            self._core.handle(_channel(client), messages.encode_control(envelope), 0.0)
        self._num_messages = 0
        while len(self._state) < options.capacity - CHUNK:
            self._commits()
        none = np.zeros(0, np.int64)
        self._out = self._core.handle(_channel(0), Credit(EPOCH, 1, 0, none, none, np.zeros(0)).encode(), 1.0)

    def _sampler(self) -> messages.OpenSampler:
        return messages.OpenSampler(0, TABLE, BATCH)

    def _handle(self, client: int, frame: bytes) -> float:
        """Seconds that the core needed."""
        self._num_messages += 1
        now_s = 1.0 + self._num_messages / MESSAGES_PER_SECOND
        started_ns = time.thread_time_ns()  # what others do on this core meanwhile does not count
        self._out = self._core.handle(_channel(client), frame, now_s)
        return (time.thread_time_ns() - started_ns) * 1e-9

    def _commits(self) -> float:
        """One of each writer."""
        seconds = 0.0
        for writer in self._sequences:
            self._sequences[writer] += 1
            commit = Commit(EPOCH, CHUNK, self._sequences[writer], 4, CHUNK, self._rng.random(CHUNK), [])
            seconds += self._handle(writer, commit.encode())
        return seconds

    def turn(self, num_credits: int) -> float:
        """Seconds of `num_credits` credits and four times as many commits."""
        seconds, num_commits, batch = 0.0, 0, frames.decode_batch(self._out[0][1]).sample
        for number in range(1, num_credits + 1):
            rows, generations = batch.rows[:BATCH], batch.generations[:BATCH]
            credit = Credit(EPOCH, 1, 0, rows, generations, self._rng.standard_normal(BATCH))
            seconds += self._handle(0, credit.encode())
            out = self._out
            batch = frames.decode_batch(out[0][1]).sample
            while num_commits < COMMITS_PER_CREDIT * number:
                seconds += self._commits()
                num_commits += len(self._sequences)
            self._out = out
        return seconds


def _note_nothing(*arguments: object) -> None:
    pass


def _token(client: int) -> bytes:
    return bytes([client + 1]) * frames.TOKEN_NBYTES


def _channel(client: int) -> bytes:
    return _token(client) + bytes(4)


def main(options: Options) -> None:
    """Print the share of the server's time."""
    watched, unwatched = Load(options, is_watched=True), Load(options, is_watched=False)
    times: dict[Load, list[float]] = {watched: [], unwatched: []}
    for turn in range(options.num_turns):
        for load in (watched, unwatched) if turn % 2 else (unwatched, watched):
            times[load].append(load.turn(options.credits_per_turn))
    with_them, without = np.array(times[watched]), np.array(times[unwatched])
    median = 100 * (np.median(with_them / without) - 1)
    quiet = 100 * (np.quantile(with_them, 0.1) / np.quantile(without, 0.1) - 1)  # turns that nothing disturbed
    per_credit_us = 1e6 * np.quantile(without, 0.1) / options.credits_per_turn
    print(
        f"diagnostics cost {median:.2f} % (median of {options.num_turns} turns; {quiet:.2f} % from the quickest tenth "
        f"of each); without them a credit and {COMMITS_PER_CREDIT} commits take {per_credit_us:.0f} us"
    )


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
