"""Section server: messages for each second of the server's CPU time, and what the Ape-X paper's load takes of a core.

The paper (Horgan et al. 2018): 12.5 k transitions per second from the actors, 19 batches of 512 per second.
"""

from benchmarks.measure import OURS, PER_SECOND, PERCENT, Measurement, Options
from benchmarks.team import Turn
from benchmarks.teams import Counts, take_turns, teams, vectors

SECTION = "server"
MESSAGES, SHARE = "control messages per second of server CPU", "server's share of a core"
UNLIMITED, PAPER = "no limit", "the paper's load"


def server_load(options: Options) -> list[Measurement]:
    """Ours only: cpprb MP has no server, and Reverb's moves the payload too."""
    turns = {
        UNLIMITED: Turn(2, options.team_s),
        PAPER: Turn(2, options.team_s, inserts_per_s=12_500.0, batches_per_s=19.0),
    }
    with teams((OURS,), vectors(options, batch_size=512), options) as running:
        results = take_turns(running, {OURS: turns}, options)
    return [
        *results.measurements(SECTION, MESSAGES, PER_SECOND, _messages_per_cpu_s, list(turns)),
        *results.measurements(SECTION, SHARE, PERCENT, _share, list(turns)),
    ]


def _messages_per_cpu_s(counts: Counts) -> float:
    return counts["num_messages"] / counts["server_cpu_s"]


def _share(counts: Counts) -> float:
    return counts["server_cpu_s"] / counts["seconds"]
