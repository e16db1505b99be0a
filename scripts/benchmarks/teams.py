"""Teams of processes that take turns: one store each, with its writers and its learner (`team.py`).

All are started first and sleep between their turns, so that whatever else the machine does slows all of them alike.
"""

import contextlib
import json
import select
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeAlias

from benchmarks.measure import OURS, Case, Measurement, Options, Unit
from benchmarks.team import Load, Turn

CPPRB, REVERB = "cpprb MP", "Reverb"
_START_S = 300.0  # deadline to serve and fill; Reverb imports TensorFlow
_TURN_S = 60.0  # beyond what the turn takes
_SCRIPT = Path(__file__).with_name("team.py")
_REVERB = ("--no-project", "--isolated", "--python", "3.11", "--with", "dm-reverb[tensorflow]", "python")

Counts: TypeAlias = dict[str, float]  # what `Learner.take` returns


class NoTeam(Exception):
    """Why a store cannot be measured here."""


class Team:
    """The process of one store's learner, which has the others as children."""

    def __init__(self, name: str, load: Load, options: Options) -> None:
        """Start; `wait` says when it can take turns."""
        self._name = name
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115  (read when it has ended)
        command = [*_interpreter(name, options), str(_SCRIPT), name, json.dumps(asdict(load))]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=self._log, text=True, bufsize=1)

    def wait(self) -> None:
        """Until it is ready.

        Raises:
            NoTeam: it ended, or needs too long; with its last words.
        """
        self._answer(_START_S)

    def take(self, turn: Turn) -> Counts:
        """Let it work.

        Raises:
            NoTeam: see `wait`.
        """
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(asdict(turn)) + "\n")
        counts: Counts = json.loads(self._answer(turn.seconds + _TURN_S))
        return counts

    def _answer(self, timeout_s: float) -> str:
        stdout = self._process.stdout
        assert stdout is not None
        is_silent = not select.select([stdout], [], [], timeout_s)[0]
        line = "" if is_silent else stdout.readline()
        if not line:
            self._end()
            self._log.seek(0)
            words = f"silent for {timeout_s:.0f} s" if is_silent else "it ended"
            for line in self._log.read().splitlines():
                words = line.strip() or words
            self.close()
            raise NoTeam(f"{self._name}: {words[:200]}")
        return line

    def close(self) -> None:
        """End it and forget what it said. Twice is fine."""
        self._end()
        self._log.close()
        assert self._process.stdout is not None
        self._process.stdout.close()

    def _end(self) -> None:
        """It ends its children when its stdin ends."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(10.0)
        except subprocess.TimeoutExpired:
            self._process.terminate()
            self._process.wait()


def _interpreter(name: str, options: Options) -> list[str]:
    if name != REVERB:
        return [sys.executable]
    if options.reverb_python == "uv":
        if shutil.which("uv") is None:
            raise NoTeam("Reverb: needs uv, which is not installed, or --reverb-python")
        return ["uv", "run", *_REVERB]
    if not options.reverb_python:
        raise NoTeam("not asked for (--reverb-python)")
    return [options.reverb_python]


@contextlib.contextmanager
def teams(names: Sequence[str], load: Load, options: Options) -> Iterator[dict[str, Team | str]]:
    """Those that could be started, and why the others could not."""
    started: dict[str, Team | str] = {}
    try:
        for name in names:
            try:
                started[name] = Team(name, load, options)
            except NoTeam as error:
                started[name] = str(error)
        for name, team in started.items():
            try:
                if isinstance(team, Team):
                    team.wait()
            except NoTeam as error:
                started[name] = str(error)
        yield started
    finally:
        for team in started.values():
            if isinstance(team, Team):
                team.close()


class Results:
    """Counts of each turn, by candidate and label; or why a candidate has none."""

    def __init__(self) -> None:
        self.counts: dict[tuple[str, str], list[Counts]] = {}
        self.missing: dict[str, str] = {}

    def measurements(
        self, section: str, operation: str, unit: Unit, value: Callable[[Counts], float], labels: Sequence[str]
    ) -> list[Measurement]:
        """One figure of all candidates, for each label."""
        names = list(dict.fromkeys(name for name, _ in self.counts))
        return [
            Measurement(section, Case(operation, label, name), tuple(map(value, self.counts[name, label])), unit=unit)
            for label in labels
            for name in names
            if (name, label) in self.counts
        ] + [
            Measurement(section, Case(operation, label, name), missing=why, unit=unit)
            for label in labels
            for name, why in self.missing.items()
        ]


def take_turns(running: Mapping[str, Team | str], turns: Mapping[str, Mapping[str, Turn]], options: Options) -> Results:
    """Everybody's turns in alternation, several times.

    Args:
        running: from `teams`.
        turns: name of the team -> label -> what it does.
        options: how often.
    """
    results = Results()
    results.missing = {name: team for name, team in running.items() if isinstance(team, str)}
    for _ in range(options.num_team_turns):
        for name, team in running.items():
            for label, turn in turns.get(name, turns[OURS]).items():
                if name in results.missing or isinstance(team, str):
                    continue
                try:
                    results.counts.setdefault((name, label), []).append(team.take(turn))
                except NoTeam as error:
                    results.missing[name] = str(error)
    for name, label in list(results.counts):
        if name in results.missing:
            del results.counts[name, label]
    return results


def inserts_per_s(counts: Counts) -> float:
    """Transitions that the writers added."""
    return counts["num_inserts"] / counts["seconds"]


def samples_per_s(counts: Counts) -> float:
    """Transitions that the learner was given."""
    return counts["num_samples"] / counts["seconds"]


def vectors(options: Options, **changes: Any) -> Load:
    """Transitions of 17 and 6 floats: a small robot's, or with these changes."""
    capacity = options.team_capacity
    values: dict[str, Any] = {
        "obs_shape": (17,),
        "obs_dtype": "float32",
        "action_shape": (6,),
        "capacity": capacity,
        "num_filled": capacity,
        "rows_per_add": 50,
        "batch_size": 256,
        "max_writers": 2,
    }
    return Load(**values | changes)
