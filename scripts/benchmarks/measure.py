"""How things are timed: candidates for one job take turns (A B A B ...), a short slice each.

Whatever else the machine does slows all of them alike, so that a ratio within a turn stands where the times do not.
Knows nothing of buffers.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

OURS = "rl_buffer"


@dataclass(frozen=True)
class Unit:
    """What seconds, bytes or rates are shown in."""

    name: str
    per_second_or_byte: float
    more_is_better: bool = False  # a rate: ratios are taken the other way round


MICROSECONDS, SECONDS, MEGABYTES = Unit("microseconds", 1e6), Unit("seconds", 1.0), Unit("megabytes", 1e-6)
MILLISECONDS, PERCENT = Unit("milliseconds", 1e3), Unit("percent", 100.0)
PER_SECOND = Unit("per_second", 1.0, more_is_better=True)
MEGABYTES_PER_SECOND = Unit("megabytes_per_second", 1e-6, more_is_better=True)
GIGABYTES_PER_SECOND = Unit("gigabytes_per_second", 1e-9, more_is_better=True)


@dataclass
class Options:
    """What every section is given."""

    sizes: tuple[int, ...] = (64_000, 1_000_000, 8_000_000)
    """Transitions in the replay buffers; the largest are left out where they do not fit into memory with the rest."""
    num_turns: int = 11
    """How often each candidate is measured."""
    slice_s: float = 0.2
    """Seconds of one measurement, roughly."""
    num_actors: tuple[int, ...] = (1, 4, 16)
    """Actors that are started at once."""
    num_starts: int = 3
    """How often they are started."""
    served_size: int = 1_000_000
    """Transitions of 17 + 6 floats in the tables of mixed, stall and server."""
    num_writers: tuple[int, ...] = (1, 2, 4, 8)
    """Writers of stall."""
    served_s: float = 2.0
    """Seconds of one turn of writers and learner."""
    served_turns: int = 7
    """How often writers and learner are measured."""
    images_nbytes: int = 3 << 30
    """Bytes of the table of images; a third of the free memory at most."""
    payloads: tuple[Literal["17 + 6 floats", "400 B", "4 KB", "40 KB", "400 KB"], ...] = (
        "17 + 6 floats",
        "400 B",
        "4 KB",
        "40 KB",
        "400 KB",
    )
    """Sizes of a transition in payload."""
    payload_nbytes: int = 1 << 28
    """Bytes of each table of payload."""
    reverb_python: Path | None = None
    """An interpreter with dm-reverb and TensorFlow."""
    install_reverb: bool = False
    """Let uv make an environment for Reverb where no interpreter is given (a download of 0.6 GB)."""


@dataclass(frozen=True)
class Case:
    """What is measured, and for whom."""

    operation: str
    size: str
    candidate: str


@dataclass(frozen=True)
class Job:
    """`call` does something `units` times."""

    call: Callable[..., object]
    units: int = 1
    prepare: Callable[[], object] | None = None  # gives `call` its argument, while the clock stands still


@dataclass(frozen=True)
class Measurement:
    """Seconds per call, bytes or rates of one case, by turn; empty where it could not be measured, and then why not."""

    section: str
    case: Case
    values: tuple[float, ...] = ()
    missing: str = ""
    unit: Unit = MICROSECONDS


def take_turns(section: str, jobs: Mapping[Case, Job | str], options: Options) -> list[Measurement]:
    """Measure jobs in alternation; where there is a string instead of one, it says why."""
    present = {case: job for case, job in jobs.items() if isinstance(job, Job)}
    calls = {case: _calls_per_slice(job, options.slice_s) for case, job in present.items()}
    turns = [{case: _seconds(job, calls[case]) for case, job in present.items()} for _ in range(options.num_turns)]
    return [
        Measurement(section, case, missing=job)
        if isinstance(job, str)
        else Measurement(section, case, tuple(turn[case] for turn in turns))
        for case, job in jobs.items()
    ]


def _calls_per_slice(job: Job, slice_s: float) -> int:
    """Calls that fill a slice, preparation included. Finding out warms the caches."""
    calls = 1
    while True:
        started_s = time.perf_counter()
        _seconds(job, calls)
        elapsed_s = time.perf_counter() - started_s
        if elapsed_s > slice_s / 4:
            return max(1, round(calls * slice_s / elapsed_s))
        calls *= 2


def _seconds(job: Job, calls: int) -> float:
    """Seconds per unit, the mean over some calls."""
    call, prepare, clock_ns = job.call, job.prepare, time.perf_counter_ns
    elapsed_ns = 0
    if prepare is None:
        elapsed_ns -= clock_ns()
        for _ in range(calls):
            call()
        elapsed_ns += clock_ns()
    else:
        for _ in range(calls):
            argument = prepare()
            elapsed_ns -= clock_ns()
            call(argument)
            elapsed_ns += clock_ns()
    return elapsed_ns * 1e-9 / (calls * job.units)
