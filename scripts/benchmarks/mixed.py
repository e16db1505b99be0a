"""Section mixed: two writers and a learner with new priorities for each batch, all as fast as they can."""

from benchmarks.measure import MILLISECONDS, OURS, PER_SECOND, Measurement, Options
from benchmarks.team import Turn
from benchmarks.teams import CPPRB, REVERB, inserts_per_s, samples_per_s, take_turns, teams, vectors

SECTION = "mixed"
INSERTS, SAMPLES = "transitions added", "transitions sampled"
P50, P99 = "learner's step: median", "learner's step: 99th percentile"
SIZE = "2 writers"


def mixed(options: Options) -> list[Measurement]:
    """Rates of writers and learner in the same seconds, and the times of sample and update together."""
    with teams((OURS, CPPRB, REVERB), vectors(options), options) as running:
        results = take_turns(running, {OURS: {SIZE: Turn(2, options.team_s)}}, options)
    return [
        *results.measurements(SECTION, INSERTS, PER_SECOND, inserts_per_s, [SIZE]),
        *results.measurements(SECTION, SAMPLES, PER_SECOND, samples_per_s, [SIZE]),
        *results.measurements(SECTION, P50, MILLISECONDS, lambda counts: counts["p50_s"], [SIZE]),
        *results.measurements(SECTION, P99, MILLISECONDS, lambda counts: counts["p99_s"], [SIZE]),
    ]
