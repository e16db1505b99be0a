"""Section images: transitions with 4 x 84 x 84 uint8 observations, in a table that fits in memory and not in caches.

The floor is measured in the learner's process, on the very rows of the table, with nobody else at work: one
`index_select` of a batch of random rows, and a copy of as many bytes that lie together.
"""

from benchmarks.measure import GIGABYTES_PER_SECOND, OURS, PER_SECOND, Case, Measurement, Options
from benchmarks.team import COPY, GATHER, LEARN, Load
from benchmarks.teams import CPPRB, Figures, Team, teams
from rl_buffer.storage import available_memory_nbytes

SECTION = "images"
READ, WRITTEN, SAMPLED = "images read by the learner", "images in, with a learner", "images out, with writers"
ALONE, PAPER, FAST = "alone", "2 writers, 12.5 k/s", "2 writers, all they can"
FLOOR, RAW_COPY = "index_select", "copy"

_ROW_NBYTES = 2 * 4 * 84 * 84 + 64
_PAPER_PER_S = 12_500.0  # transitions that 360 actors write in Horgan et al. 2018
_BATCH_SIZE = 128


def images(options: Options) -> list[Measurement]:
    """Ours beside the floor, alone and with writers at the paper's rate; then ours and cpprb's at full speed."""
    num_rows = int(min(options.images_nbytes, available_memory_nbytes() // 3) // _ROW_NBYTES)
    load = Load((4, 84, 84), "uint8", (), num_rows, num_rows, 50, _BATCH_SIZE, 2)
    return [*_ours(load, options), *_cpprbs(load, options)]  # not at once: each table fills memory


def _ours(load: Load, options: Options) -> list[Measurement]:
    tasks = {
        Case(READ, ALONE, OURS): (0, LEARN, None),
        Case(READ, ALONE, FLOOR): (0, GATHER, None),
        Case(READ, ALONE, RAW_COPY): (0, COPY, None),
        Case(READ, PAPER, OURS): (2, LEARN, _PAPER_PER_S),
    }
    with teams((OURS,), load, options) as started:
        team = started[OURS]
        assert isinstance(team, Team)
        turns, fast = [], []
        for _ in range(options.served_turns):
            turns.append({case: team.turn(n, options.served_s, task, rate) for case, (n, task, rate) in tasks.items()})
            fast.append(team.turn(2, options.served_s))
    return [
        *(
            Measurement(SECTION, case, tuple(_nbytes_per_s(turn[case]) for turn in turns), unit=GIGABYTES_PER_SECOND)
            for case in tasks
        ),
        *_rates(OURS, fast),
    ]


def _cpprbs(load: Load, options: Options) -> list[Measurement]:
    with teams((CPPRB,), load, options) as started:
        team = started[CPPRB]
        if isinstance(team, str):
            return _rates(CPPRB, [], team)
        return _rates(CPPRB, [team.turn(2, options.served_s) for _ in range(options.served_turns)])


def _rates(name: str, turns: list[Figures], missing: str = "") -> list[Measurement]:
    """The Ape-X paper's replay traffic is 12.5 k/s in and 9.7 k/s out; ten times that is what we look at from afar."""
    return [
        Measurement(
            SECTION, Case(operation, FAST, name), tuple(f[key] / f["seconds"] for f in turns), missing, PER_SECOND
        )
        for operation, key in ((WRITTEN, "num_inserts"), (SAMPLED, "num_samples"))
    ]


def _nbytes_per_s(figures: Figures) -> float:
    return figures["num_samples"] * _ROW_NBYTES / figures["seconds"]
