"""Numbers that only grow stay exact: generations, sequences, versions and counters near 2^32, 2^53 and 2^62."""

import math
import struct

import numpy as np
import pytest
from core_driver import EPOCH, SPEC, Client, acknowledged, check_tables, floats, ints, make_core, reason

from rl_buffer import frames, messages
from rl_buffer.frames import Batch, Commit, Credit, Grant
from rl_buffer.messages import Envelope
from rl_buffer.parameter_slots import BOARD_LENGTH, FIRST_SLOT_VERSION, NEWEST_VERSION, ParameterSlots
from rl_buffer.rate_limiters import RateLimiter, SampleToInsertRatio
from rl_buffer.replay_table import ReplayTableState
from rl_buffer.rollout_table import RolloutTableState
from rl_buffer.samplers import Prioritized, Uniform
from rl_buffer.server_core import ServerCore
from rl_buffer.stats_tracker import Episode
from rl_buffer.sum_tree import SumTree
from rl_buffer.tables import ReplayTable, RolloutTable, Sample, StatsConfig

EDGES = [2**31, 2**32, 2**53, 2**62]


@pytest.fixture(params=EDGES, ids=["2^31", "2^32", "2^53", "2^62"])
def edge(request):
    """A few below it, so that what grows goes across it."""
    return request.param - 4


# ---- generations ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", [Uniform(), Prioritized(alpha=0.0)], ids=["uniform", "prioritized"])
def test_a_table_whose_generations_are_large_goes_round_and_stays_exact(edge, sampler):
    config = ReplayTable(SPEC, capacity=8, headroom=8, sampler=sampler, seed=0)
    state = ReplayTableState(config, np.full(config.num_rows, edge, np.int64))
    for lap in range(1, 6):
        for _ in range(8):
            state.commit(state.reserve(2), None)
        sample = state.draw(64, 8)
        assert set(sample.generations.tolist()) == {edge + 2 * lap - 1}, "each row was written once a lap"
        assert sample.total_mass == 8.0
        if isinstance(sampler, Prioritized):
            errors = np.ones(72)
            assert state.update_priorities(sample.rows, sample.generations - 2, errors) == 72, "of the lap before"
            assert state.update_priorities(sample.rows, sample.generations, errors) == 0


def test_a_learner_of_a_server_with_large_generations_hears_and_names_them_exactly(edge):
    config = ReplayTable(SPEC, capacity=8, headroom=8, sampler=Prioritized(alpha=1.0), seed=0)
    core = ServerCore(EPOCH, {"replay": ReplayTableState(config, np.full(16, edge, np.int64))}, StatsConfig())
    client = Client(core)
    client.open_writer(channel=1)
    client.open_sampler(channel=2, batch_size=4)
    for _ in range(20):
        client.commit(channel=1, num_rows=2)
    ((_, batch),) = client.credit(channel=2)
    assert (batch.sample.generations == core.tables["replay"].state.generations[batch.sample.rows]).all()
    assert batch.sample.generations.min() > edge
    rows, generations = batch.sample.rows, batch.sample.generations
    client.credit(channel=2, num_credits=0, rows=rows, generations=generations, td_errors=np.full(len(rows), 3.0))
    client.credit(channel=2, num_credits=0, rows=rows, generations=generations + 2, td_errors=np.full(len(rows), 9.0))
    assert core.tables["replay"].state.num_stale_updates == len(rows)
    check_tables(core)


def test_fragments_of_a_rollout_table_that_has_run_for_long_come_in_order(edge):
    config = RolloutTable(
        SPEC, num_steps=2, num_envs=1, num_fragments=4, max_version_lag=1, when_late="wait", fragments_per_update=2
    )
    state = RolloutTableState(config, np.full(4, edge & ~1, np.int64))
    state._num_begun = state.num_commits = state.num_handed_out = edge
    seen = []
    for update in range(8):
        rows = state.reserve(2)
        state.commit(rows[1:], edge + update)
        state.commit(rows[:1], edge + update)
        fragments, _ = state.lease(4, edge + update)
        seen += [(fragment.number, fragment.version) for fragment in fragments]
        state.finish(np.array([fragment.row for fragment in fragments]))
    assert seen == [(edge + i, edge + i // 2) for i in range(16)]
    assert state.num_commits == state.num_handed_out == edge + 16


# ---- sequences, versions, counters ---------------------------------------------------------------------------


def test_a_writer_that_has_sent_commits_for_long_goes_on(edge):
    core = make_core()
    client = Client(core)
    reply, _ = client.ask(messages.OpenWriter(1, "replay", 2, 4, b"w" * 16, min(edge, 2**62 - 1)))
    client.sequences[1] = reply.sequence
    for _ in range(8):
        assert acknowledged(client.commit(channel=1, num_rows=2)) == [(client.id(1), client.sequences[1])]
    assert client.sequences[1] == min(edge, 2**62 - 1) + 8
    assert "is not the next" in reason(client.commit(channel=1, sequence=client.sequences[1] + 2**32))


@pytest.mark.parametrize("acknowledged", [-1, 2**62, 2**63 - 1, 2**63, 2**64 - 1])
def test_a_writer_that_says_it_sent_what_nobody_can_is_refused(acknowledged):
    reply, _ = Client(make_core()).ask(messages.OpenWriter(1, "replay", 2, 4, b"w" * 16, acknowledged))
    assert reply.reason == f"acknowledged must be in [0, 2^62), got {acknowledged}"


def test_parameters_that_were_published_often_have_exact_versions(edge):
    board = np.zeros(BOARD_LENGTH, np.int64)
    board[NEWEST_VERSION] = edge
    board[FIRST_SLOT_VERSION:] = np.arange(edge - 3, edge + 1)
    slots = ParameterSlots(board)
    core = make_core()
    core.parameters["policy"] = slots
    client = Client(core)
    for version in range(edge + 1, edge + 10):
        slot, _ = client.ask(messages.ReserveParameters("policy"))
        assert client.ask(messages.PublishParameters("policy", slot.slot))[0] == messages.Slot(slot.slot, version)
        assert slots.version == core.info(0.0)["parameters"]["policy"] == version
    assert sorted(board[FIRST_SLOT_VERSION:].tolist()) == list(range(edge + 6, edge + 10))


@pytest.mark.parametrize("version", [-(2**63), -1, 2**63 - 1])
def test_a_writer_may_claim_any_version_and_info_can_still_be_said(version):
    core = make_core()
    client = Client(core)
    client.open_writer()
    assert acknowledged(client.commit(parameter_version=version)) == [(client.id(1), 1)]
    reply, _ = client.ask(messages.GetInfo())
    assert reply.value["clients"][0]["parameter_version"] == version


def test_a_limiter_that_has_counted_for_long_still_holds_its_ratio():
    limiter = RateLimiter(SampleToInsertRatio(4.0, min_size_to_sample=8, error_buffer=64.0))
    # Where a product with the ratio is still exact: 2^51 items are 71 years of a million a second.
    limiter.num_inserts, limiter.num_deletes, limiter.num_samples = 2**51 - 4, 2**51 - 100, 4 * (2**51 - 4) - 32
    num_inserts, num_samples = limiter.num_inserts, limiter.num_samples
    for _ in range(1000):
        limiter.inserted(limiter.num_insertable(5))
        while limiter.can_sample(8):
            limiter.sampled(8)
    assert limiter.num_inserts - num_inserts > 100
    assert abs((limiter.num_samples - num_samples) - 4 * (limiter.num_inserts - num_inserts)) <= 128


def test_episodes_with_any_number_are_counted_anew():
    core = make_core()
    client = Client(core)
    client.open_writer()
    for number in (2**53, 2**63 - 1, 2**63, -5):
        assert acknowledged(client.commit(num_rows=0, episodes=[Episode(number, 1.0, 2**53)]))
    assert core.stats.get_statistics()["train/num_episodes"] == 4
    assert core.stats.get_statistics()["train/lengths_mean"] == 2.0**53


# ---- what does not fit ---------------------------------------------------------------------------------------

COMMIT, CREDIT = Commit(EPOCH, 0, 1, 0, 0, None, []), Credit(EPOCH, 0, 0, ints(), ints(), floats())


@pytest.mark.parametrize(
    "frame",
    [
        COMMIT._replace(num_rows=2**32),
        COMMIT._replace(num_rows=-1),
        COMMIT._replace(num_wanted=2**32),
        COMMIT._replace(sequence=2**64),
        COMMIT._replace(sequence=-1),
        COMMIT._replace(epoch=2**64),
        COMMIT._replace(parameter_version=2**63),
        CREDIT._replace(num_credits=2**32),
        CREDIT._replace(num_overtaken=-1),
        Grant(EPOCH, 2**64, 1, ints()),
        Grant(EPOCH, 1, 2**64, ints()),
        Batch(EPOCH, 2**32, Sample(ints(), ints(), floats(), 0.0, 0)),
        Batch(EPOCH, 1, Sample(ints(), ints(), floats(), 0.0, 2**64)),
    ],
    ids=str,
)
def test_a_number_that_does_not_fit_its_field_is_not_sent(frame):
    with pytest.raises(struct.error):
        frame.encode()


@pytest.mark.parametrize("number", [2**64, -(2**63) - 1])
def test_a_request_with_a_number_beyond_64_bits_is_not_sent(number):
    with pytest.raises(OverflowError):
        messages.encode_control(Envelope(number, EPOCH, messages.GetInfo()))


@pytest.mark.parametrize("number", [2**63, 2**64 - 1, -(2**63)])
def test_requests_with_the_largest_numbers_are_answered_or_refused(number):
    core = make_core()
    client = Client(core)
    client.open_writer()
    core.parameters["policy"] = ParameterSlots(np.zeros(BOARD_LENGTH, np.int64))
    for request in (
        messages.OpenWriter(number, "replay", 1, 1),
        messages.OpenWriter(7, "replay", number, number),
        messages.OpenSampler(number, "replay", 1),
        messages.OpenSampler(7, "replay", number),
        messages.OpenReader(number, "replay"),
        messages.CloseChannel(number),
        messages.PublishParameters("policy", number),
    ):
        reply, _ = client.ask(request)
        assert isinstance(reply, messages.Refused), request
    frame = messages.encode_control(Envelope(number, EPOCH, messages.GetSize("replay")))
    ((_, answer),) = core.handle(client.id(0), frame, 0.0)
    assert messages.decode_control_reply(answer).request_id == number


@pytest.mark.parametrize("number", [frames.MAX_EPISODES_PER_MESSAGE + 1, 2**32 - 1])
def test_a_list_of_too_many_episodes_is_refused_before_it_is_read(number):
    core = make_core()
    client = Client(core)
    client.open_writer()
    promised = COMMIT.encode() + b"\xdd" + number.to_bytes(4, "big")
    assert b"length <= 131072" in core.handle(client.id(1), promised, 0.0)[0][1]


# ---- sums ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("exponents", [(0, 1), (-200, 200)], ids=["alike", "of very different sizes"])
def test_the_total_of_a_sum_tree_is_that_of_its_leaves_after_ten_million_updates(exponents):
    rng = np.random.default_rng(0)
    num_leaves, num_updates, at_once = 100_003, 10_000_000, 20_000
    tree = SumTree(num_leaves)
    for _ in range(num_updates // at_once):
        masses = 10.0 ** rng.uniform(*exponents, at_once)
        masses[rng.random(at_once) < 0.1] = 0.0
        tree.set(rng.integers(num_leaves, size=at_once), masses)
    assert tree.total == SumTree(num_leaves, tree.leaves.copy()).total, "no trace of what was there before"
    assert math.isclose(tree.total, math.fsum(tree.leaves), rel_tol=1e-12)
    assert tree.max == tree.leaves.max()
    assert tree.num_live == np.count_nonzero(tree.leaves)
    found, masses = tree.find(np.sort(rng.random(1000)) * tree.total)
    assert (masses > 0).all()
    assert (np.diff(found) >= 0).all()
