"""Section server: messages per second of the CPU time of the server's own process, and its share of a core."""

from dataclasses import replace

from benchmarks.measure import OURS, PER_SECOND, PERCENT, Case, Measurement, Options
from benchmarks.mixed import vector_load
from benchmarks.team import LEARN
from benchmarks.teams import Team, teams

SECTION = "server"
MESSAGES, SHARE = "messages per second of the server's CPU", "a core that the server takes"
FULL, PAPER = "2 writers, all they can", "the Ape-X paper's load"

_INSERTS_PER_S, _BATCHES_PER_S, _BATCH_SIZE = 12_500.0, 19.0, 512  # Horgan et al. 2018
_TICK_S = 0.01  # in which the system counts CPU time


def server_load(options: Options) -> list[Measurement]:
    """At full speed, and with 12.5 k transitions/s in and 19 batches of 512 a second out."""
    load, seconds = replace(vector_load(options, 2), batch_size=_BATCH_SIZE), max(options.served_s, 50 * _TICK_S)
    rates = {FULL: (None, None), PAPER: (_INSERTS_PER_S, _BATCHES_PER_S)}
    with teams((OURS,), load, options) as started:
        team = started[OURS]
        assert isinstance(team, Team)
        turns = [
            {size: team.turn(2, seconds, LEARN, *rate) for size, rate in rates.items()}
            for _ in range(options.served_turns)
        ]
    measurements = []
    for size in rates:
        figures = [turn[size] | {"cpu_s": max(_TICK_S, turn[size]["server_cpu_s"])} for turn in turns]
        messages = tuple(f["num_messages"] / f["cpu_s"] for f in figures)
        shares = tuple(f["cpu_s"] / f["seconds"] for f in figures)
        measurements.append(Measurement(SECTION, Case(MESSAGES, size, OURS), messages, unit=PER_SECOND))
        measurements.append(Measurement(SECTION, Case(SHARE, size, OURS), shares, unit=PERCENT))
    return measurements
