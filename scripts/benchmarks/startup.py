"""Section startup: how long actors take until they can write, and how much memory each of them takes.

Every figure is of new processes: a trainer like scripts/train.py, whose actors come from a forkserver or are spawned,
or an actor that only writes arrays. The crews write to a real table until its rate limiter holds them.
"""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import rl_buffer as rb
from benchmarks.measure import MEGABYTES, OURS, SECONDS, Case, Measurement, Options

SECTION = "startup"
CONNECTED, AGAIN, IMPORTS = "actors connected", "actors connected, once more", "imports that actors share"
SHARE, RESIDENT = "memory of each actor (PSS)", "memory of each actor (RSS)"
SPAWN, ARRAYS_ONLY = "spawn", "arrays only"

_UNITS = {CONNECTED: SECONDS, AGAIN: SECONDS, IMPORTS: SECONDS, SHARE: MEGABYTES, RESIDENT: MEGABYTES}
_MAX_SPAWNED = 4  # 17 s on two cores, 16 of them 88 s
_DEADLINE_S = 300.0  # of one process
_CARTPOLE = rb.TransitionSpec(obs=rb.Field((4,)), action=rb.Field((), "int64"))


def startup(options: Options) -> list[Measurement]:
    """Every start in turn, as often as is asked for."""
    limiter = rb.SampleToInsertRatio(samples_per_insert=1.0, min_size_to_sample=1_000, error_buffer=1_000.0)
    tables = {
        "replay": rb.ReplayTable(_CARTPOLE, capacity=10_000, sampler=rb.Prioritized(alpha=0.6), rate_limiter=limiter),
        "arrays": rb.ReplayTable(_CARTPOLE, capacity=10_000),
    }
    with rb.BufferServer(tables) as server:
        turns = [_turn(server.address, options.num_actors) for _ in range(options.num_starts)]
    cases = sorted(turns[0], key=lambda case: list(_UNITS).index(case.operation))
    many = [Case(CONNECTED, str(number), SPAWN) for number in options.num_actors if number > _MAX_SPAWNED]
    return [
        *(Measurement(SECTION, case, tuple(t[case] for t in turns), unit=_UNITS[case.operation]) for case in cases),
        *(Measurement(SECTION, case, missing="a minute", unit=_UNITS[case.operation]) for case in many),
    ]


def _turn(address: str, num_actors: tuple[int, ...]) -> dict[Case, float]:
    """Seconds and bytes."""
    figures: dict[Case, float] = {}
    for number in num_actors:
        size, ways = str(number), ["forkserver", "forkserver"] + ["spawn"] * (number <= _MAX_SPAWNED)
        first, second, *spawned = _run("trainer.py", address, size, *ways)
        figures |= _figures(size, OURS, first)
        figures[Case(AGAIN, size, OURS)] = second["connected_s"]
        if number == min(num_actors):
            # The forkserver answers when its imports are done; the rest of a launch is a fork.
            figures[Case(IMPORTS, size, OURS)] = first["launched_s"] - second["launched_s"]
        for start in spawned:
            figures |= _figures(size, SPAWN, start)
    started_s = time.monotonic()  # the same clock in every process
    (actor,) = _run("numpy_actor.py", address)
    if actor["imports_torch"]:
        raise RuntimeError("an actor that only writes arrays imported torch; its figures would mean nothing")
    return figures | _figures("1", ARRAYS_ONLY, actor | {"connected_s": actor["connected_at_s"] - started_s})


def _figures(size: str, candidate: str, start: dict[str, Any]) -> dict[Case, float]:
    keys = {CONNECTED: "connected_s", SHARE: "pss_nbytes", RESIDENT: "rss_nbytes"}
    return {Case(operation, size, candidate): start[key] for operation, key in keys.items()}


def _run(script: str, *arguments: str) -> list[dict[str, Any]]:
    """The JSON objects that a script beside this one prints.

    Raises:
        RuntimeError: it failed.
    """
    command = [sys.executable, str(Path(__file__).with_name(script)), *arguments]
    ended = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_DEADLINE_S)
    if ended.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with exit code {ended.returncode}\n{ended.stderr}")
    return [json.loads(line) for line in ended.stdout.splitlines()]
