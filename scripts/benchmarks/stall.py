"""Section stall: what more and more writers take from the learner.

On fewer cores than processes they take cores, whatever the library does. What a library takes is time in its locks or
its queues: samples per second of the learner's own CPU time, and time in which the learner waits and not for a core.
"""

from benchmarks.measure import OURS, PER_SECOND, PERCENT, Measurement, Options
from benchmarks.team import Turn
from benchmarks.teams import CPPRB, Counts, inserts_per_s, samples_per_s, take_turns, teams, vectors

SECTION = "stall"
PER_CPU_S, SAMPLES, INSERTS = "samples per second of the learner's CPU", "samples, by writers", "inserts, by writers"
WAITING, QUEUED = "learner neither runs nor queues for a core", "learner queues for a core"


def stall(options: Options) -> list[Measurement]:
    """The same load with each number of writers, in turns."""
    labels = list(map(str, options.num_writers))
    turns = {OURS: {label: Turn(int(label), options.team_s) for label in labels}}
    with teams((OURS, CPPRB), vectors(options, max_writers=max(options.num_writers)), options) as running:
        results = take_turns(running, turns, options)
    return [
        *results.measurements(SECTION, PER_CPU_S, PER_SECOND, _samples_per_cpu_s, labels),
        *results.measurements(SECTION, SAMPLES, PER_SECOND, samples_per_s, labels),
        *results.measurements(SECTION, INSERTS, PER_SECOND, inserts_per_s, labels),
        *results.measurements(SECTION, WAITING, PERCENT, _waiting_share, labels),
        *results.measurements(SECTION, QUEUED, PERCENT, _queued_share, labels),
    ]


def _samples_per_cpu_s(counts: Counts) -> float:
    return counts["num_samples"] / counts["learner_cpu_s"]


def _queued_share(counts: Counts) -> float:
    return counts["learner_queued_s"] / counts["seconds"]


def _waiting_share(counts: Counts) -> float:
    # Threads of the learner may run or queue at the same time: then none of the time is left.
    return max(0.0, 1 - (counts["learner_cpu_s"] + counts["learner_queued_s"]) / counts["seconds"])
