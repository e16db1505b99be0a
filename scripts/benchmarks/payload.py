"""Section payload: bytes in and out at the sizes of Reverb's own benchmark, two writers and a prioritized learner."""

from benchmarks.measure import MEGABYTES_PER_SECOND, OURS, Measurement, Options
from benchmarks.team import Load, Turn
from benchmarks.teams import CPPRB, REVERB, Counts, inserts_per_s, samples_per_s, take_turns, teams

SECTION = "payload"
IN, OUT = "bytes added", "bytes sampled, by payload"
_MAX_CAPACITY = 1_000_000
_MAX_BATCH_NBYTES = 12_800_000


def payload(options: Options) -> list[Measurement]:
    """One size after the other."""
    measurements = []
    for nbytes in options.payloads_nbytes:
        label = f"{nbytes // 1000} KB" if nbytes % 1000 == 0 else f"{nbytes} B"
        # Large ones in smaller adds and batches: 50 of 400 KB are more than a writer has at a time.
        rows_per_add, batch_size = (50, 256) if nbytes < 40_000 else (5, max(8, _MAX_BATCH_NBYTES // nbytes))
        capacity = min(_MAX_CAPACITY, options.team_capacity, max(500, options.table_nbytes // nbytes))
        load = Load((nbytes // 8,), "float32", (1,), capacity, capacity, rows_per_add, batch_size, 2)
        with teams((OURS, CPPRB, REVERB), load, options) as running:
            results = take_turns(running, {OURS: {label: Turn(2, options.team_s)}}, options)

        def nbytes_in(counts: Counts, nbytes: int = nbytes) -> float:
            return inserts_per_s(counts) * nbytes

        def nbytes_out(counts: Counts, nbytes: int = nbytes) -> float:
            return samples_per_s(counts) * nbytes

        measurements += results.measurements(SECTION, IN, MEGABYTES_PER_SECOND, nbytes_in, [label])
        measurements += results.measurements(SECTION, OUT, MEGABYTES_PER_SECOND, nbytes_out, [label])
    return sorted(measurements, key=lambda measurement: [IN, OUT].index(measurement.case.operation))
