"""How things are timed: candidates for one job take turns (A B A B ...), a short slice each.

Whatever else the machine does slows all of them alike, so that a ratio within a turn stands where the times do not.
Knows nothing of buffers.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

OURS = "rl_buffer"


@dataclass(frozen=True)
class Unit:
    """What seconds, bytes or rates are shown in."""

    name: str
    per_second_or_byte: float
    is_rate: bool = False  # more is better


MICROSECONDS, SECONDS, MEGABYTES = Unit("microseconds", 1e6), Unit("seconds", 1.0), Unit("megabytes", 1e-6)
MILLISECONDS, PERCENT = Unit("milliseconds", 1e3), Unit("percent", 100.0)
PER_SECOND, MEGABYTES_PER_SECOND = Unit("per second", 1.0, True), Unit("megabytes per second", 1e-6, True)


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
    num_team_turns: int = 5
    """How often each team of processes is measured (mixed, stall, images, payload, server)."""
    team_s: float = 2.0
    """Seconds of one such measurement."""
    team_capacity: int = 1_000_000
    """Transitions in the served tables (mixed, stall, server)."""
    table_nbytes: int = 1_800_000_000
    """Bytes in the served tables (images, payload): more than the caches, and it must fit into memory twice."""
    num_writers: tuple[int, ...] = (1, 2, 4, 8)
    """Writers of section stall."""
    payloads_nbytes: tuple[int, ...] = (400, 4_000, 40_000, 400_000)
    """Bytes of the observations of one transition in section payload."""
    reverb_python: str = "uv"
    """Interpreter that has dm-reverb[tensorflow]; "uv" has uv fetch one (700 MB), "" leaves Reverb out."""


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
    """Seconds per call or bytes of one case, by turn; empty where it could not be measured, and then why not."""

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
