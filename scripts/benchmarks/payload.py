"""Section payload: bytes of observations per second in and out at once, from 46 floats to 400 KB a transition."""

from benchmarks.measure import MEGABYTES_PER_SECOND, OURS, Case, Measurement, Options
from benchmarks.team import Load
from benchmarks.teams import CPPRB, REVERB, Team, teams

SECTION = "payload"
IN, OUT = "bytes in, with a learner", "bytes out, with 2 writers"
SIZES = {"17 + 6 floats": 17, "400 B": 50, "4 KB": 500, "40 KB": 5_000, "400 KB": 50_000}  # in an observation

_MAX_ADD_NBYTES, _MAX_BATCH_NBYTES = 1 << 20, 8 << 20


def payload(options: Options) -> list[Measurement]:
    """Reverb's grid: an item is two observations, in tables of as many bytes each."""
    measurements = []
    for size in options.payloads:
        num_floats = SIZES[size]
        nbytes = 2 * 4 * num_floats
        num_rows = min(options.served_size, options.payload_nbytes // nbytes)
        rows_per_add = max(1, min(50, _MAX_ADD_NBYTES // nbytes))
        batch_size = max(8, min(256, _MAX_BATCH_NBYTES // nbytes))
        load = Load((num_floats,), "float32", (6,), num_rows, num_rows, rows_per_add, batch_size, 2)
        with teams((OURS, CPPRB, REVERB), load, options) as started:
            present = {name: team for name, team in started.items() if isinstance(team, Team)}
            turns = [
                {name: team.turn(2, options.served_s) for name, team in present.items()}
                for _ in range(options.served_turns)
            ]
        for operation, key in ((IN, "num_inserts"), (OUT, "num_samples")):
            for name, team in started.items():
                values = tuple(turn[name][key] * nbytes / turn[name]["seconds"] for turn in turns if name in turn)
                missing = team if isinstance(team, str) else ""
                measurements.append(
                    Measurement(SECTION, Case(operation, size, name), values, missing, MEGABYTES_PER_SECOND)
                )
    return measurements
