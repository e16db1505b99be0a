"""Games of `core_simulation`, by their seeds. More of them: `python tests/core_simulation.py --seeds 5000`."""

from collections import Counter

import pytest
from core_simulation import FAULTS, Violation, simulate

from rl_buffer.grants import Grants
from rl_buffer.replay_table import ReplayTableState
from rl_buffer.rollout_table import RolloutTableState
from rl_buffer.server_core import ServerCore

KEPT_SEEDS = {
    (0, "disordered"): "a writer that was granted the same rows twice wrote into committed ones",
    (2, "lossy"): "a writer that missed a grant had rows published that it never wrote",
    (162, "disordered"): "a release that came twice freed the fragment that was handed out since",
    (45, "as zmq"): "a learner published and died, and what it gave back was handed out with too much lag",
}


@pytest.mark.parametrize(("seed", "faults"), KEPT_SEEDS, ids=KEPT_SEEDS.values())
def test_a_seed_that_once_failed_passes(seed, faults):
    simulate(seed, faults=faults)


def play(num_seeds, **options):
    return sum((simulate(seed, **options) for seed in range(num_seeds)), Counter())


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("faults", FAULTS)
def test_nothing_is_lost_torn_or_kept_for_ever(seed, faults):
    simulate(seed, faults=faults)


def test_a_seed_plays_the_same_game_each_time():
    assert simulate(1, faults="all") == simulate(1, faults="all")


def test_whatever_a_game_is_about_happens_in_a_few_of_them():
    counts = play(20, faults="all")
    for name in ("torn", "overtaken", "evicted", "dropped", "taken again", "lost", "gave up"):
        assert counts[name] >= 10, name


# What must not go unnoticed: a client that does not look, or a server that decides otherwise.


@pytest.mark.parametrize("ignored", ["generations", "grant numbers", "generations of fragments"])
def test_a_client_that_does_not_look_is_found_out(ignored):
    with pytest.raises(Violation):
        play(30, faults="all", ignored=ignored)


BROKEN = {
    "rows are freed while their process may write": (ServerCore, "has_leases", lambda self, token: False),
    "a dead reader's fragments are lost": (RolloutTableState, "give_back", RolloutTableState.finish),
    "late fragments are handed out": (RolloutTableState, "lease", lambda self, most, _: lease(self, most, 0)),
    "nobody is told of free rows": (Grants, "grant_rows", lambda self, table, outgoing: None),
    "evicted rows can be sampled": (ReplayTableState, "_retire", lambda self, rows: None),
}
lease = RolloutTableState.lease


@pytest.mark.parametrize(("owner", "name", "replacement"), BROKEN.values(), ids=BROKEN)
def test_a_server_that_decides_otherwise_is_found_out(owner, name, replacement, monkeypatch):
    monkeypatch.setattr(owner, name, replacement)
    with pytest.raises(AssertionError):
        play(30)
