"""Sections mixed and stall: writers and a prioritized learner at work at once, each a process of its own.

mixed   two writers, 50 transitions per add, and one learner that updates the priorities of every batch
stall   the same with ever more writers: what a second of the learner's own CPU time is worth, and how long it waits
"""

from collections.abc import Callable, Mapping, Sequence

from benchmarks.measure import MILLISECONDS, OURS, PER_SECOND, PERCENT, Case, Measurement, Options, Unit
from benchmarks.team import Load
from benchmarks.teams import CPPRB, REVERB, Figures, Team, teams

MIXED, STALL = "mixed", "stall"
INSERTS, SAMPLES = "inserts, with a learner", "samples, with writers"
MEDIAN, SLOWEST = "sample and update, p50", "sample and update, p99"
PER_CPU, WALL, WAITING = "samples per second of the learner's CPU", "samples of the learner", "learner waits"
TWO_WRITERS = "2 writers"

_BATCH_SIZE = 256
_ROWS_PER_ADD = 50

Quantity = tuple[Unit, Callable[[Figures], float]]


def vector_load(options: Options, max_writers: int) -> Load:
    """Transitions of 17 + 6 floats, and a full table."""
    size = options.served_size
    return Load((17,), "float32", (6,), size, size, _ROWS_PER_ADD, _BATCH_SIZE, max_writers)


def mixed(options: Options) -> list[Measurement]:
    """Ours, cpprb's and Reverb."""
    quantities: dict[str, Quantity] = {
        INSERTS: (PER_SECOND, lambda f: f["num_inserts"] / f["seconds"]),
        SAMPLES: (PER_SECOND, lambda f: f["num_samples"] / f["seconds"]),
        MEDIAN: (MILLISECONDS, lambda f: f["p50_s"]),
        SLOWEST: (MILLISECONDS, lambda f: f["p99_s"]),
    }
    with teams((OURS, CPPRB, REVERB), vector_load(options, 2), options) as started:
        return measure(MIXED, {TWO_WRITERS: 2}, started, quantities, options)


def stall(options: Options) -> list[Measurement]:
    """Ours and cpprb's; the share of waiting includes that for a core."""
    quantities: dict[str, Quantity] = {
        PER_CPU: (PER_SECOND, lambda f: f["num_samples"] / f["learner_cpu_s"]),
        WALL: (PER_SECOND, lambda f: f["num_samples"] / f["seconds"]),
        WAITING: (PERCENT, lambda f: max(1e-6, 1 - f["learner_cpu_s"] / f["seconds"])),
    }
    sizes = {str(number): number for number in options.num_writers}
    with teams((OURS, CPPRB), vector_load(options, max(options.num_writers)), options) as started:
        return measure(STALL, sizes, started, quantities, options)


def measure(
    section: str,
    sizes: Mapping[str, int],
    started: Mapping[str, Team | str],
    quantities: Mapping[str, Quantity],
    options: Options,
) -> list[Measurement]:
    """Sizes (numbers of writers) and teams take turns; every quantity is of the same turns."""
    cases = [(size, name) for size in sizes for name in started]
    present = {case: team for case in cases if isinstance(team := started[case[1]], Team)}
    turns: Sequence[dict[tuple[str, str], Figures]] = [
        {case: team.turn(sizes[case[0]], options.served_s) for case, team in present.items()}
        for _ in range(options.served_turns)
    ]
    measurements = []
    for operation, (unit, quantity) in quantities.items():
        for size, name in cases:
            case, team = Case(operation, size, name), started[name]
            if isinstance(team, str):
                measurements.append(Measurement(section, case, missing=team, unit=unit))
            else:
                values = tuple(quantity(turn[size, name]) for turn in turns)
                measurements.append(Measurement(section, case, values, unit=unit))
    return measurements
