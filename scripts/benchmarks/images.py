"""Section images: transitions of two stacks of frames, how near their copies come to what the memory gives.

The floor is one process alone that gathers the same rows with `torch.index_select`, or copies as many from one place.
The load is that of the Ape-X paper (Horgan et al. 2018), 12.5 k transitions per second in. How near two cores come to
ten times its traffic, 125 k/s in and 97 k/s out, is in the rates without a limit.
"""

from benchmarks.measure import MEGABYTES_PER_SECOND, OURS, PER_SECOND, Measurement, Options
from benchmarks.team import COPY, GATHER, Load, Turn
from benchmarks.teams import CPPRB, Counts, Results, inserts_per_s, samples_per_s, take_turns, teams

SECTION = "images"
SAMPLED, SAMPLES, INSERTS = "bytes sampled", "images: sampled", "images: added"
GATHER_FLOOR, COPY_FLOOR = "index_select alone", "copy alone"
ALONE, PAPER, UNLIMITED = "no writer", "2 writers, 12.5 k/s", "2 writers, no limit"
PAPER_INSERTS_PER_S, BATCH_SIZE = 12_500.0, 512


def images(options: Options) -> list[Measurement]:
    """The floor, then the learner alone and beside writers."""
    load = Load((4, 84, 84), "uint8", (), 1, 1, 50, BATCH_SIZE, 2)
    capacity = max(2 * BATCH_SIZE, options.table_nbytes // load.row_nbytes)
    load = Load((4, 84, 84), "uint8", (), capacity, capacity, 50, BATCH_SIZE, 2)
    learning = {
        ALONE: Turn(0, options.team_s),
        PAPER: Turn(2, options.team_s, inserts_per_s=PAPER_INSERTS_PER_S),
        UNLIMITED: Turn(2, options.team_s),
    }
    floors = {GATHER_FLOOR: Turn(0, options.team_s, GATHER), COPY_FLOOR: Turn(0, options.team_s, COPY)}
    with teams((OURS, CPPRB), load, options) as running:
        results = take_turns(running, {OURS: floors | learning, CPPRB: learning}, options)

    def nbytes_per_s(counts: Counts) -> float:
        return samples_per_s(counts) * load.row_nbytes

    bounds = Results()  # of the same turns, beside each case
    for floor in floors:
        if (OURS, floor) in results.counts:
            bounds.counts |= {(floor, label): results.counts[OURS, floor] for label in learning}
    return [
        *results.measurements(SECTION, SAMPLED, MEGABYTES_PER_SECOND, nbytes_per_s, list(learning)),
        *bounds.measurements(SECTION, SAMPLED, MEGABYTES_PER_SECOND, nbytes_per_s, list(learning)),
        *results.measurements(SECTION, SAMPLES, PER_SECOND, samples_per_s, list(learning)),
        *results.measurements(SECTION, INSERTS, PER_SECOND, inserts_per_s, [PAPER, UNLIMITED]),
    ]
