"""The server's decisions one by one: what is refused, who waits, who goes on."""

import re

import numpy as np
import pytest
from core_driver import (
    EPOCH,
    RATIO,
    Client,
    acknowledged,
    batches,
    channel_id,
    check_tables,
    decoded,
    floats,
    make_core,
    reason,
    rollout_table,
    snapshot,
    token,
)

from rl_buffer import frames, messages
from rl_buffer.errors import InvalidInput
from rl_buffer.frames import Batch, Commit
from rl_buffer.grants import MOST_DRAWS
from rl_buffer.messages import Envelope
from rl_buffer.rate_limiters import MinSize, SampleToInsertRatio
from rl_buffer.samplers import Prioritized, Uniform
from rl_buffer.server_core import (
    MAX_CHANNELS_PER_SESSION,
    MAX_CREDITS,
    MAX_REASON_LENGTH,
    MAX_SESSIONS,
)
from rl_buffer.stats_tracker import Episode


def test_a_writer_is_granted_rows_when_it_opens_and_as_many_as_it_wants_when_it_commits():
    client = Client(make_core())
    ((receiver, grant),) = client.open_writer(max_commit_rows=2, num_wanted=4)
    assert (receiver, grant.acknowledged, len(grant.rows)) == (client.id(1), 0, 4)
    ((receiver, grant),) = client.commit(num_rows=2, num_wanted=1)
    assert (receiver, grant.acknowledged, len(grant.rows)) == (client.id(1), 1, 1)


def test_every_grant_of_a_writer_has_the_next_number_whether_it_brings_rows_or_not():
    core = make_core(replay={"headroom": 8})
    writer, other = Client(core, 0), Client(core, 1)
    events = writer.open_writer(num_wanted=6) + other.open_writer(num_wanted=2)
    late = Client(core, 2)
    assert late.open_writer(num_wanted=2, max_commit_rows=1) == []
    for _ in range(3):
        events += writer.commit(num_rows=2)
    events += other.ask(messages.CloseChannel(1))[1]
    numbers = [(grant.number, len(grant.rows)) for receiver, grant in events if receiver == writer.id(1)]
    assert numbers == [(1, 6), (2, 0), (3, 0), (4, 2), (5, 4)]


def test_rows_are_committed_in_the_order_in_which_they_were_granted():
    core = make_core()
    client = Client(core)
    client.open_writer()
    rows = client.rows[1]
    client.commit(num_rows=2)
    client.commit(num_rows=1)
    assert core.tables["replay"].state.allocator.committed().tolist() == rows[:3]


REFUSED_COMMITS = {
    "duplicate": ({"sequence": 1}, "commit 1 is not the next; expected 2"),
    "skipped": ({"sequence": 3}, "commit 3 is not the next; expected 2"),
    "sequence 0": ({"sequence": 0}, "commit 0 is not the next"),
    "other epoch": ({"epoch": EPOCH + 1}, "epoch 123456789abcdef1, but this server is 123456789abcdef0"),
    "more rows than held": ({"num_rows": 5, "num_wanted": 0}, "commit of 5 rows, but the writer holds 4"),
    "more rows than it opened for": ({"num_rows": 3, "num_wanted": 0}, "opened for at most 2"),
    "wants more than it gives": ({"num_rows": 1, "num_wanted": 2}, "wants 2, more than it gives back"),
    "infinite TD error": ({"td_errors": floats(np.inf)}, "must be finite or NaN"),
    "TD error beyond any mass": ({"td_errors": floats(-1e308)}, "TD error -1e\\+308 at position 0"),
    "bad episode": ({"episodes": [Episode(0, np.nan, 1)]}, r"episodes\[0\].reward is nan"),
    "unknown metric": ({"episodes": [Episode(0, 0.0, 1, {"x": 1.0})]}, "the tracker was made with"),
}


@pytest.mark.parametrize(("changes", "message"), REFUSED_COMMITS.values(), ids=REFUSED_COMMITS)
def test_a_bad_commit_is_refused_and_changes_nothing(changes, message):
    core = make_core(replay={"sampler": Prioritized(alpha=1.0)})
    client = Client(core)
    client.open_writer()
    client.commit(td_errors=floats(1.0))
    before = snapshot(core)
    with pytest.raises(InvalidInput, match=message):
        raise InvalidInput(reason(client.commit(**changes)))
    assert snapshot(core) == before
    assert core.num_refused == 1
    client.sequences[1] = 1
    assert acknowledged(client.commit()) == [(client.id(1), 2)]  # the good one still passes


REFUSED_CREDITS = {
    "too many": ({"num_credits": MAX_CREDITS + 1}, "credits exceed the limit 64"),
    "other epoch": ({"epoch": 0}, "connect again"),
    "NaN": ({"rows": [0], "generations": [1], "td_errors": [np.nan]}, "TD errors must be finite, got nan"),
    "infinite": ({"rows": [0, 0], "generations": [1, 1], "td_errors": [5.0, -np.inf]}, "finite, got -inf"),
    "too large": ({"rows": [0], "generations": [1], "td_errors": [1e301]}, "TD error 1e\\+301"),
    "row above": ({"rows": [0, 16], "generations": [1, 1], "td_errors": [5.0, 5.0]}, r"in \[0, 16\), got 0..16"),
    "row below": ({"rows": [-1, 0], "generations": [1, 1], "td_errors": [5.0, 5.0]}, r"got -1..0"),
}


@pytest.mark.parametrize(("changes", "message"), REFUSED_CREDITS.values(), ids=REFUSED_CREDITS)
def test_a_bad_credit_is_refused_and_changes_nothing(changes, message):
    core = make_core(replay={"sampler": Prioritized(alpha=1.0)})
    client = Client(core)
    client.open_writer(channel=1)
    client.commit(td_errors=floats(1.0))
    client.open_sampler(channel=2)
    before = snapshot(core)
    with pytest.raises(InvalidInput, match=message):
        raise InvalidInput(reason(client.credit(channel=2, **changes)))
    assert snapshot(core) == before


def test_priorities_of_a_uniform_table_are_refused_whole():
    core = make_core(replay={"sampler": Uniform()})
    client = Client(core)
    client.open_writer(channel=1)
    client.commit()
    client.open_sampler(channel=2)
    before = snapshot(core)
    assert "no priorities" in reason(client.credit(2, 1, rows=[0], generations=[1], td_errors=[1.0]))
    assert snapshot(core) == before


@pytest.mark.parametrize(
    "sender", [b"", b"\0", token(5), token(0), channel_id(5, 1), channel_id(0, 1) + b"x", token(0)[:-1] + b"y1234"]
)
def test_a_sender_that_is_not_attached_is_refused(sender):
    core = make_core()
    client = Client(core)
    client.open_writer()
    before = snapshot(core)
    for frame in (
        Commit(EPOCH, 1, 1, 0, 1, None, []).encode(),
        messages.encode_control(Envelope(1, EPOCH, messages.Clear("replay"))),
    ):
        ((receiver, answer),) = core.handle(sender, frame, 0.0)
        assert receiver == sender
        epoch, text = frames.decode_refusal(answer)
        assert epoch == EPOCH
        assert "not attached" in text
    assert snapshot(core) == before


def test_messages_on_a_channel_of_another_kind_are_refused():
    client = Client(make_core())
    client.open_writer(channel=1)
    client.open_sampler(channel=2)
    client.sequences[2] = client.sequences[3] = 0
    assert "not a sampler" in reason(client.credit(channel=1))
    assert "not an open writer" in reason(client.commit(channel=2))
    assert "not an open writer" in reason(client.commit(channel=3))


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (messages.OpenWriter(1, "nowhere", 1, 1), r"no table is called 'nowhere'; this server has \['replay'\]"),
        (messages.OpenWriter(1, "replay", 4, 9), "wants to hold 9 rows, but its headroom is 8"),
        (messages.OpenWriter(1, "replay", 0, 4), "wants to hold 4"),
        (messages.OpenWriter(1, "replay", 4, 2), "wants to hold 2"),
        (messages.OpenWriter(-1, "replay", 1, 1), "channel must be in"),
        (messages.OpenWriter(2**32, "replay", 1, 1), "channel must be in"),
        (messages.OpenSampler(1, "replay", 0), r"batch_size must be in \[1, 245760\], got 0"),
        (messages.OpenSampler(1, "replay", -1), "got -1"),
        (messages.OpenSampler(1, "replay", -2), "got -2"),
        (messages.OpenSampler(1, "replay", 245_761), "got 245761"),
        (messages.OpenSampler(1, "replay", 2**63), "got 9223372036854775808"),
        (messages.GetSize("nowhere"), "no table"),
        (messages.Clear("nowhere"), "no table"),
        (messages.CloseChannel(-1), "channel must be in"),
        (messages.ReserveParameters("critic"), "no parameters are called 'critic'"),
        (messages.PublishParameters("critic", 0), "no parameters are called 'critic'"),
    ],
    ids=str,
)
def test_a_bad_request_is_refused_and_changes_nothing(request_, message):
    core = make_core()
    client = Client(core)
    before = snapshot(core)
    reply, events = client.ask(request_)
    assert isinstance(reply, messages.Refused)
    with pytest.raises(InvalidInput, match=message):
        raise InvalidInput(reply.reason)
    assert events == []
    assert snapshot(core) == before
    assert (core.num_refused, core.last_refusal) == (1, reply.reason)


def test_a_request_of_another_epoch_is_refused():
    core = make_core()
    reply, _ = Client(core).ask(messages.Clear("replay"), epoch=EPOCH - 1)
    assert "connect again" in reply.reason


def test_a_writer_whose_commits_could_not_fit_the_table_is_refused():
    client = Client(make_core(replay={"capacity": 4, "headroom": 16}))
    reply, _ = client.ask(messages.OpenWriter(1, "replay", 5, 10))
    assert "commits up to 5 rows at once, more than the limit of 4" in reply.reason
    client.open_writer(max_commit_rows=4, num_wanted=10)


def test_a_grant_never_names_more_rows_than_a_client_can_decode():
    most = frames.MAX_ROWS_PER_MESSAGE
    client = Client(make_core(replay={"capacity": 2 * most, "headroom": 2 * most}))
    reply, _ = client.ask(messages.OpenWriter(1, "replay", 1, most + 1))
    assert "limit" in reply.reason
    client.open_writer(max_commit_rows=most // 2, num_wanted=most)
    assert len(client.rows[1]) == most


def test_a_batch_that_the_limiter_could_never_pass_is_refused_when_the_sampler_opens():
    client = Client(make_core(replay={"rate_limiter": SampleToInsertRatio(1.0, 4, 4.0)}))
    reply, _ = client.ask(messages.OpenSampler(1, "replay", 8))
    assert "a batch of 8 draws could wait for ever" in reply.reason


def test_a_channel_number_in_use_is_refused_and_free_again_after_closing():
    client = Client(make_core())
    client.open_writer(channel=1)
    reply, _ = client.ask(messages.OpenSampler(1, "replay", 1))
    assert reply.reason == "channel 1 is open already"
    assert client.ask(messages.CloseChannel(1))[0] == messages.Opened()
    client.open_sampler(channel=1)


def test_the_numbers_of_clients_and_channels_are_limited():
    core = make_core()
    clients = [Client(core, 0)]
    for number in range(MAX_CHANNELS_PER_SESSION):
        clients[0].open_sampler(channel=number)
    reply, _ = clients[0].ask(messages.OpenSampler(MAX_CHANNELS_PER_SESSION, "replay", 1))
    assert "256 writers and samplers" in reply.reason
    for number in range(1, MAX_SESSIONS):
        core.attach(number.to_bytes(frames.TOKEN_NBYTES, "big"), "", number, 0.0)
    with pytest.raises(InvalidInput, match="1024 clients are attached"):
        core.attach(b"t" * frames.TOKEN_NBYTES, "", 1, 0.0)


def test_a_refusal_does_not_repeat_all_that_a_client_sent():
    core = make_core()
    reply, _ = Client(core).ask(messages.GetSize("x" * 1_000_000))
    assert len(reply.reason) == len(core.info(0.0)["last_refusal"]) == MAX_REASON_LENGTH


def test_an_overtaken_count_of_any_size_leaves_info_encodable():
    core = make_core()
    client = Client(core)
    client.open_sampler()
    for _ in range(3):
        client.credit(num_credits=0, num_overtaken=2**32 - 1)
    reply, _ = client.ask(messages.GetInfo())
    assert reply.value["tables"]["replay"]["overtaken_rows"] == 3 * (2**32 - 1)


def test_episodes_are_counted_once_and_numbered_anew():
    core = make_core()
    client = Client(core)
    client.open_writer()
    client.commit(num_rows=0, episodes=[Episode(9, 2.0, 3), Episode(10, 4.0, 1)])
    reply, _ = client.ask(messages.GetStats())
    assert reply.value["train/num_episodes"] == 2.0
    assert reply.value["train/rewards_mean"] == 3.0


# ---- limiter, rows, fairness -------------------------------------------------------------------------------


def test_commits_that_the_limiter_holds_back_are_acknowledged_in_order_once_it_lets_them():
    core = make_core(replay=RATIO)
    first, second, learner = (Client(core, number) for number in range(3))
    first.open_writer()
    second.open_writer()
    learner.open_sampler(batch_size=3)
    assert acknowledged(first.commit(num_rows=2)) == [(first.id(1), 1)]  # cursor 2
    assert acknowledged(second.commit(num_rows=2)) == [(second.id(1), 1)]  # cursor 4
    assert first.commit(num_rows=2) == []
    assert second.commit(num_rows=1) == []
    assert core.info(0.0)["tables"]["replay"]["waits"][0].startswith("client-0: inserting waits: cursor 4.0 + 2 * 1.0")
    assert len(core.tables["replay"].state) == 4
    events = learner.credit(num_credits=1)  # cursor 1, 3 more fit
    assert batches(events) == [(learner.id(1), 3)]
    assert acknowledged(events) == [(first.id(1), 2), (second.id(1), 2)]


def test_a_commit_that_passes_in_part_is_acknowledged_only_as_a_whole():
    core = make_core(replay=RATIO)
    client = Client(core)
    client.open_writer(channel=1, max_commit_rows=4)
    client.open_sampler(channel=2, batch_size=1)
    client.commit(num_rows=3)  # cursor 3
    assert client.commit(num_rows=4, num_wanted=0) == []  # one of them
    assert len(core.tables["replay"].state) == 4
    assert acknowledged(client.credit(channel=2, num_credits=2)) == []
    assert len(core.tables["replay"].state) == 6
    assert acknowledged(client.credit(channel=2, num_credits=1)) == [(client.id(1), 2)]


def test_the_rows_of_a_waiting_commit_cannot_be_committed_again():
    core = make_core(replay=RATIO)
    client = Client(core)
    client.open_writer(max_commit_rows=4)
    client.commit(num_rows=4, num_wanted=4)
    client.commit(num_rows=3, num_wanted=0)
    assert reason(client.commit(num_rows=2)) == "commit of 2 rows, but the writer holds 1"


def test_writers_wait_for_rows_and_are_served_first_come_first_served():
    core = make_core()
    a, b, c = (Client(core, number) for number in range(3))
    assert len(a.open_writer(num_wanted=4)) == 1
    assert len(b.open_writer(num_wanted=4)) == 1  # headroom 8 is out
    assert c.open_writer(num_wanted=3) == []
    assert core.info(0.0)["tables"]["replay"]["waits"] == [
        "client-2: waits for rows, 8 of 8 are reserved by writers, for 0.0 s now"
    ]
    events = a.commit(num_rows=2)
    assert [(r, grant.acknowledged, len(grant.rows)) for r, grant in events] == [(a.id(1), 1, 0), (c.id(1), 0, 2)]
    events = b.commit(num_rows=2)
    assert [(r, grant.acknowledged, len(grant.rows)) for r, grant in events] == [(b.id(1), 1, 0), (a.id(1), 1, 2)]
    events = c.commit(num_rows=2, num_wanted=0)
    assert [(r, grant.acknowledged, len(grant.rows)) for r, grant in events] == [(c.id(1), 1, 1)], "b lacks nothing"


def test_a_writer_that_stops_with_rows_does_not_block_the_others():
    core = make_core()
    stopped, busy = Client(core, 0), Client(core, 1)
    stopped.open_writer(num_wanted=4)
    busy.open_writer(num_wanted=4)
    kept = core.sessions[token(0)].channels[stopped.id(1)].rows.tolist()
    for _ in range(50):  # three laps of the ring
        ((_, grant),) = busy.commit(num_rows=2)
        assert not set(grant.rows.tolist()) & set(kept)
    assert len(core.tables["replay"].state) == 8
    assert core.sessions[token(0)].channels[stopped.id(1)].rows.tolist() == kept


def test_a_full_table_keeps_its_capacity_while_every_writer_holds_rows():
    core = make_core()
    clients = [Client(core, number) for number in range(2)]
    for client in clients:
        client.open_writer(num_wanted=4)
    for turn in range(20):
        clients[turn % 2].commit(num_rows=2)
        assert len(core.tables["replay"].state) == min(8, 2 * (turn + 1))


def test_samplers_with_credits_take_turns():
    core = make_core(replay={"rate_limiter": SampleToInsertRatio(1.0, 1, (0.0, 8.0))})
    actor, *learners = (Client(core, number) for number in range(4))
    actor.open_writer()
    for learner in learners:
        learner.open_sampler()
        learner.credit(num_credits=30)
    served = [receiver for _ in range(9) for receiver, _ in batches(actor.commit())]
    assert served == [learner.id(1) for learner in learners] * 3


def test_a_large_batch_is_not_starved_by_a_sampler_of_small_ones():
    core = make_core(replay={"rate_limiter": SampleToInsertRatio(1.0, 1, (0.0, 8.0))})
    actor, small, large = (Client(core, number) for number in range(3))
    actor.open_writer()
    for learner, batch_size in ((small, 1), (large, 4)):
        learner.open_sampler(batch_size=batch_size)
        learner.credit(num_credits=30)
    served = [batch for _ in range(10) for batch in batches(actor.commit())]
    assert served == [(small.id(1), 1), (large.id(1), 4)] * 2


def test_a_credit_waits_until_the_minimum_size_is_there():
    core = make_core(replay={"rate_limiter": MinSize(3)})
    client = Client(core)
    client.open_writer(channel=1)
    client.open_sampler(channel=2, batch_size=2)
    assert client.credit(channel=2, num_credits=2) == []
    assert core.info(41.0)["tables"]["replay"]["waits"] == [
        "client-0: sampling waits: 0 of 3 items, 1 writer connected, no insert yet, for 41 s now"
    ]
    assert batches(client.commit(num_rows=2)) == []
    assert batches(client.commit(num_rows=1)) == [(client.id(2), 2)] * 2
    assert core.info(0.0)["tables"]["replay"]["waits"] == []


def test_a_sampler_without_credits_gets_nothing():
    client = Client(make_core())
    client.open_writer(channel=1)
    client.open_sampler(channel=2)
    client.commit()
    assert batches(client.credit(channel=2, num_credits=0)) == []
    assert len(batches(client.credit(channel=2, num_credits=MAX_CREDITS))) == MAX_CREDITS


def batch_counts(outgoing):
    """How many batches there are in each message that has some."""
    found = [frames.decode_batch(frame) for _, frame in outgoing if frames.kind_of(frame) == frames.BATCH]
    assert all(len(batch.sample.rows) <= max(MOST_DRAWS, 2 * batch.batch_size) for batch in found)
    return [batch.num_batches for batch in found]


def test_batches_of_one_moment_come_in_one_message_unless_somebody_else_waits_between_them():
    limiter = SampleToInsertRatio(4.0, 4, (16.0, 48.0))
    core = make_core(replay={"capacity": 8, "headroom": 64, "rate_limiter": limiter})
    learner, other = Client(core, 0), Client(core, 1)
    learner.open_writer(channel=1, max_commit_rows=4, num_wanted=32)
    learner.open_sampler(channel=2, batch_size=4)
    learner.commit(num_rows=4)
    learner.commit(num_rows=4)
    assert batch_counts(learner.credit_frames(4)) == [4]
    assert batch_counts(learner.credit_frames(2)) == [], "the limiter holds these back"
    other.open_sampler(channel=2, batch_size=4)
    assert batch_counts(other.credit_frames(3)) == []
    assert batch_counts(learner.commit_frames(4)) == [1, 1, 1, 1], "in turns, as far as the limiter lets them"
    assert batch_counts(learner.commit_frames(4)) == [1], "there was no other"
    assert batch_counts(other.credit_frames(64)) == [3], "as many as the limiter lets them"


def test_a_message_of_many_batches_is_not_larger_than_it_may_be():
    core = make_core(replay={"capacity": 8, "headroom": 8})
    client, batch_size = Client(core), MOST_DRAWS // 4
    client.open_writer(channel=1, max_commit_rows=8, num_wanted=8)
    client.commit(num_rows=8)
    client.open_sampler(channel=2, batch_size=batch_size)
    assert batch_counts(client.credit_frames(7)) == [3, 3, 1]
    client.open_sampler(channel=3, batch_size=MOST_DRAWS)
    assert batch_counts(client.credit_frames(2, channel=3)) == [1, 1], "a batch is never divided"


def test_the_limit_of_credits_counts_those_that_still_wait():
    client = Client(make_core())
    client.open_sampler()
    assert client.credit(num_credits=MAX_CREDITS - 1) == []
    assert reason(client.credit(num_credits=2)) == "63 + 2 credits exceed the limit 64"
    assert client.credit(num_credits=1) == []


# ---- rollouts ----------------------------------------------------------------------------------------------


def leased(events):
    """(receiver, row -> generation) of each batch of fragments."""
    return [
        (receiver, dict(zip(batch.sample.rows.tolist(), batch.sample.generations.tolist(), strict=True)))
        for receiver, batch in events
        if isinstance(batch, Batch)
    ]


def reading_core(**options):
    """Client 0 writes on channel 1 and holds a fragment, client 1 reads on channel 2 and holds two of three others."""
    core = make_core(rollout=rollout_table(num_fragments=6, **options), replay={})
    writer, reader = Client(core, 0), Client(core, 1)
    writer.open_rollout_writer(channel=1)
    reader.open_reader(channel=2)
    for _ in range(3):
        writer.commit()
    ((_, held),) = leased(reader.credit(channel=2, num_credits=2))
    return core, writer, reader, held


def release(reader, held, num_credits=0, channel=2):
    """Free these rows, of these generations."""
    return reader.credit(channel, num_credits, held.keys(), held.values(), [0.0] * len(held))


def test_a_fragment_is_written_handed_out_released_and_written_again():
    core = make_core(rollout=rollout_table(num_fragments=1))
    client = Client(core)
    ((_, grant),) = client.open_rollout_writer(channel=1)
    assert (grant.number, grant.acknowledged, grant.rows.tolist()) == (1, 0, [0])
    client.open_reader(channel=2)
    ((_, grant),) = client.commit(channel=1)
    assert (grant.number, grant.acknowledged, grant.rows.tolist()) == (2, 1, [])
    assert leased(client.credit(channel=2, num_credits=1)) == [(client.id(2), {0: 1})]
    ((receiver, grant),) = release(client, {0: 1})
    assert (receiver, grant.number, grant.acknowledged, grant.rows.tolist()) == (client.id(1), 3, 1, [0])


_HELD = {0: 1, 1: 1}  # by the reader of `reading_core`: row -> generation
REFUSED_RELEASES = {
    "finished, and nobody's": ([2], [1], r"fragments \[2\] are not all held by this reader, which has {0, 1}"),
    "being written": ([3], [0], "not all held"),
    "free": ([5], [0], "not all held"),
    "above": ([6], [1], "not all held"),
    "negative": ([-1], [0], "not all held"),
    "the largest": ([2**63 - 1], [2**63 - 1], "not all held"),
    "one good and one not": ([0, 2], [1, 1], "not all held"),
    "of an earlier generation": ([0], [-1], r"fragments \[0\] are no longer of generations \[-1\]"),
    "of a later generation": ([0, 1], [1, 3], "no longer of generations"),
    "named twice": ([0, 0], [1, 1], r"\[0, 0\] are named twice"),
    "very many": ([0] * 100_000, [1] * 100_000, r"fragments \[0, 0, 0"),
}


@pytest.mark.parametrize(("rows", "generations", "message"), REFUSED_RELEASES.values(), ids=REFUSED_RELEASES)
def test_a_forged_release_is_refused_and_changes_nothing(rows, generations, message):
    core, _, reader, held = reading_core()
    assert held == _HELD
    before = snapshot(core)
    with pytest.raises(InvalidInput, match=message):
        raise InvalidInput(reason(reader.credit(2, 1, rows, generations, [0.0] * len(rows))))
    assert snapshot(core) == before
    info = core.info(0.0)
    assert (info["num_refused"], len(info["last_refusal"]) <= MAX_REASON_LENGTH) == (1, True)
    release(reader, held)  # the good one still passes
    assert core.tables["rollout"].state.num_reading == 0


def test_a_reader_cannot_release_what_another_holds():
    core, _, _, held = reading_core()
    thief = Client(core, 2)
    thief.open_reader(channel=2)
    before = snapshot(core)
    assert "not all held by this reader, which has set()" in reason(release(thief, held))
    assert snapshot(core) == before


def test_a_release_that_comes_late_does_not_free_what_was_handed_out_since():
    core = make_core(rollout=rollout_table(num_fragments=1))
    client = Client(core)
    client.open_rollout_writer(channel=1)
    client.open_reader(channel=2)
    client.credit(channel=2, num_credits=1)
    assert leased(client.commit(channel=1)) == [(client.id(2), {0: 1})]
    release(client, {0: 1}, num_credits=1)
    assert leased(client.commit(channel=1)) == [(client.id(2), {0: 3})]
    before = snapshot(core)
    assert reason(release(client, {0: 1})) == "fragments [0] are no longer of generations [1]"
    assert snapshot(core) == before
    release(client, {0: 3})
    assert core.tables["rollout"].state.num_reading == 0


REFUSED_ON_ROLLOUTS = {
    "more credits than fragments": (2, {"num_credits": 7}, r"0 \+ 7 credits exceed 6 fragments"),
    "credits of another epoch": (2, {"epoch": 0}, "connect again"),
    "two fragments": (1, {"num_rows": 2}, "commit of 2 rows, but the writer holds 1"),
    "TD errors": (1, {"td_errors": floats(1.0)}, "table 'rollout' holds rollouts"),
    "a commit twice": (1, {"sequence": 3}, "commit 3 is not the next; expected 4"),
}


@pytest.mark.parametrize(("channel", "changes", "message"), REFUSED_ON_ROLLOUTS.values(), ids=REFUSED_ON_ROLLOUTS)
def test_a_bad_message_on_rollouts_is_refused_and_changes_nothing(channel, changes, message):
    core, writer, reader, _ = reading_core()
    before = snapshot(core)
    with pytest.raises(InvalidInput, match=message):
        raise InvalidInput(reason((writer.commit if channel == 1 else reader.credit)(channel, **changes)))
    assert snapshot(core) == before


def test_commits_by_readers_and_credits_of_rollout_writers_are_refused():
    core, writer, reader, _ = reading_core()
    reader.sequences[2] = 0
    before = snapshot(core)
    assert "not an open writer" in reason(reader.commit(channel=2))
    assert "not a sampler" in reason(writer.credit(channel=1))
    assert snapshot(core) == before


def test_a_writer_cannot_commit_before_it_has_a_fragment():
    core = make_core(rollout=rollout_table(num_fragments=1))
    first, second = Client(core, 0), Client(core, 1)
    first.open_rollout_writer()
    assert second.open_rollout_writer() == []
    assert reason(second.commit()) == "commit of 1 rows, but the writer holds 0"


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (messages.OpenSampler(9, "rollout", 1), "table 'rollout' holds rollouts"),
        (messages.OpenWriter(9, "rollout", 2, 2), "rollouts, which are written one by one"),
        (messages.OpenWriter(9, "rollout", 1, 0), "rollouts, which are written one by one"),
        (messages.OpenReader(9, "replay"), "table 'replay' holds transitions"),
        (messages.OpenReader(9, "nowhere"), "no table is called 'nowhere'"),
        (messages.OpenReader(2**32, "rollout"), "channel must be in"),
        (messages.OpenReader(2, "rollout"), "channel 2 is open already"),
    ],
    ids=str,
)
def test_a_bad_request_for_rollouts_is_refused_and_changes_nothing(request_, message):
    core, _, reader, _ = reading_core()
    before = snapshot(core)
    reply, events = reader.ask(request_)
    assert message in reply.reason
    assert (events, snapshot(core)) == ([], before)


def test_readers_with_credits_take_turns_however_many_others_have_none():
    core = make_core(rollout=rollout_table(num_fragments=12))
    actor, idle, *learners = (Client(core, number) for number in range(5))
    actor.open_rollout_writer()
    idle.open_reader(channel=2)
    for learner in learners:
        learner.open_reader(channel=2)
        learner.credit(channel=2, num_credits=3)
    served = [receiver for _ in range(9) for receiver, _ in leased(actor.commit())]
    assert served == [learner.id(2) for learner in learners] * 3


def test_what_a_learner_published_before_it_died_counts_for_the_fragments_that_it_gives_back():
    core, _, reader, held = reading_core(max_version_lag=0, when_late="wait", fragments_per_update=6)
    assert reader.publish() == 1
    core.exited(token(1))
    heir = Client(core, 2)
    heir.open_reader(channel=2)
    assert leased(heir.credit(channel=2, num_credits=6)) == []
    state = core.tables["rollout"].state
    assert (state.num_dropped, len(state), state.num_reading) == (len(held) + 1, 0, 0)


def test_a_dead_readers_fragments_go_to_the_next_before_all_others():
    core, writer, _, held = reading_core()
    heir = Client(core, 2)
    heir.open_reader(channel=2)
    assert leased(heir.credit(channel=2, num_credits=1)) == [(heir.id(2), {2: 1})]
    heir.credit(channel=2, num_credits=3)
    assert leased(decoded(core.exited(token(1)))) == [(heir.id(2), held)]
    assert leased(writer.commit()) == [(heir.id(2), {3: 1})]


def test_a_dead_writers_fragment_goes_to_whoever_waits():
    core = make_core(rollout=rollout_table(num_fragments=1))
    dead, waiting = Client(core, 0), Client(core, 1)
    dead.open_rollout_writer()
    assert waiting.open_rollout_writer() == []
    core.disconnected(token(0))
    assert core.tables["rollout"].state.num_writing == 1, "quarantined: it may still be writing"
    ((receiver, grant),) = decoded(core.exited(token(0)))
    assert (receiver, grant.rows.tolist()) == (waiting.id(1), [0])


def test_a_client_has_a_lease_while_it_reads_rollouts():
    core, _, reader, held = reading_core()
    release(reader, held)
    assert core.has_leases(token(1)), "it may be given fragments at any time"
    reader.ask(messages.CloseChannel(2))
    assert not core.has_leases(token(1))


# ---- ends --------------------------------------------------------------------------------------------------


def test_an_exited_client_frees_its_rows_and_publishes_nothing():
    core = make_core(replay=RATIO)
    dead, alive = Client(core, 0), Client(core, 1)
    dead.open_writer(max_commit_rows=4, num_wanted=8)
    dead.commit(num_rows=4, num_wanted=0)
    dead.commit(num_rows=3, num_wanted=0)  # held back by the limiter
    assert alive.open_writer(max_commit_rows=6, num_wanted=6) == []  # waits for rows: 4 of 8 are left
    core.disconnected(token(0))
    assert core.tables["replay"].state.allocator.num_reserved == 4, "quarantined: it may still be writing"
    ((receiver, frame),) = core.exited(token(0))
    assert (receiver, len(frames.decode_grant(frame).rows)) == (alive.id(1), 6)
    assert len(core.tables["replay"].state) == 4
    assert core.tables["replay"].state.allocator.num_reserved == 6
    assert core.exited(token(0)) == []
    check_tables(core)


def test_what_an_exited_client_committed_in_part_stays_and_the_rest_is_freed():
    core = make_core(replay=RATIO)
    dead = Client(core)
    dead.open_writer(max_commit_rows=4)
    dead.commit(num_rows=3)
    dead.commit(num_rows=3)  # one passes
    core.exited(token(0))
    assert (len(core.tables["replay"].state), core.tables["replay"].state.allocator.num_reserved) == (4, 0)
    check_tables(core)


def test_an_exit_lets_commits_behind_it_pass():
    core = make_core(replay=RATIO)
    dead, alive = Client(core, 0), Client(core, 1)
    dead.open_sampler(channel=2, batch_size=3)
    dead.credit(channel=2, num_credits=1)
    alive.open_writer(channel=1)
    alive.open_sampler(channel=2, batch_size=1)
    alive.credit(channel=2, num_credits=1)
    assert batches(alive.commit(num_rows=2)) == []  # the dead one's batch of 3 is first, cursor 2
    events = decoded(core.exited(token(0)))
    assert batches(events) == [(alive.id(2), 1)]


def test_closing_a_writer_publishes_its_pending_commits_first():
    core = make_core(replay=RATIO)
    client = Client(core)
    client.open_writer(channel=1, max_commit_rows=4, num_wanted=8)
    client.open_sampler(channel=2, batch_size=2)
    client.commit(num_rows=4, num_wanted=0)
    client.commit(num_rows=2, num_wanted=0)
    assert client.ask(messages.CloseChannel(1)) == (messages.Opened(), [])
    state = core.tables["replay"].state
    assert (len(state), state.allocator.num_reserved) == (4, 2), "unwritten rows are given back at once"
    assert "not an open writer" in reason(client.commit(num_rows=1, sequence=3))
    assert acknowledged(client.credit(channel=2)) == []  # nobody is there to be told
    assert (len(state), state.allocator.num_reserved) == (6, 0)
    assert client.id(1) not in core.sessions[token(0)].channels
    check_tables(core)


def test_a_closing_writer_does_not_keep_others_waiting_for_rows():
    core = make_core(replay=RATIO)
    closing, other = Client(core, 0), Client(core, 1)
    closing.open_writer(max_commit_rows=4, num_wanted=8)
    closing.commit(num_rows=4, num_wanted=0)
    closing.commit(num_rows=2, num_wanted=0)
    assert other.open_writer(max_commit_rows=6, num_wanted=6) == []
    _, events = closing.ask(messages.CloseChannel(1))
    assert [(receiver, len(grant.rows)) for receiver, grant in events] == [(other.id(1), 6)]


def test_closing_something_that_is_not_open_changes_nothing():
    core = make_core()
    client = Client(core)
    before = snapshot(core)
    assert client.ask(messages.CloseChannel(99)) == (messages.Opened(), [])
    assert snapshot(core) == before


def test_a_client_has_a_lease_while_it_has_a_writer_or_a_parameter_slot():
    core = make_core(replay=RATIO)
    client, other = Client(core, 0), Client(core, 1)
    client.open_sampler(channel=2, batch_size=1)
    assert not core.has_leases(token(0))
    client.open_writer(channel=1, max_commit_rows=4, num_wanted=8)
    client.commit(num_rows=4, num_wanted=0)
    client.commit(num_rows=1, num_wanted=0)
    client.ask(messages.CloseChannel(1))
    assert core.has_leases(token(0)), "a closed writer's commit is still to be published"
    client.credit(channel=2)
    assert not core.has_leases(token(0))
    slot, _ = client.ask(messages.ReserveParameters("policy"))
    assert (core.has_leases(token(0)), core.has_leases(token(1))) == (True, False)
    client.ask(messages.PublishParameters("policy", slot.slot))
    assert not core.has_leases(token(0))
    core.exited(token(0))
    assert not core.has_leases(token(0))
    assert not core.has_leases(token(other.number))


def test_clear_empties_the_table_and_keeps_reservations():
    core = make_core()
    client = Client(core)
    client.open_writer()
    client.commit(num_rows=2)
    assert client.ask(messages.GetSize("replay"))[0].value == 2
    client.ask(messages.Clear("replay"))
    assert client.ask(messages.GetSize("replay"))[0].value == 0
    assert core.tables["replay"].state.allocator.num_reserved == 4
    check_tables(core)


def test_tables_do_not_see_each_other():
    core = make_core(a={}, b={})
    client = Client(core)
    client.open_writer(channel=1, table="a")
    client.open_sampler(channel=2, table="b")
    client.credit(channel=2)
    assert batches(client.commit(channel=1)) == []
    assert (len(core.tables["a"].state), len(core.tables["b"].state)) == (1, 0)


def test_one_client_publishes_parameters_at_a_time_and_its_death_lets_the_next():
    core = make_core()
    first, second = Client(core, 0), Client(core, 1)
    reserve = messages.ReserveParameters("policy")
    slot, _ = first.ask(reserve)
    assert first.ask(reserve)[0] == slot
    assert "one publisher at a time" in second.ask(reserve)[0].reason
    assert "not reserved" in second.ask(messages.PublishParameters("policy", slot.slot))[0].reason
    core.exited(token(0))
    assert isinstance(second.ask(reserve)[0], messages.Slot)
    assert second.ask(messages.PublishParameters("policy", slot.slot))[0].version == 1


# ---- who waits for whom --------------------------------------------------------------------------------------------


def tables_of(core, now_s=0.0):
    return core.info(now_s)["tables"]


def test_a_learner_without_any_writer_and_a_writer_without_any_learner_are_told_so_at_once():
    core = make_core(replay=RATIO)
    learner, actor = Client(core, 0), Client(core, 1)
    learner.open_sampler()
    learner.credit()
    assert tables_of(core)["replay"]["stuck"] == (
        "nobody can move: client-0 waits for inserts into 'replay', and no writer is connected"
    )
    actor.open_writer(num_wanted=8, max_commit_rows=8)
    assert tables_of(core)["replay"]["stuck"] == ""
    core.exited(token(0))
    actor.commit(num_rows=8)
    assert tables_of(core)["replay"]["stuck"] == (
        "nobody can move: client-1 waits for samples from 'replay', and no sampler is connected"
    )


def test_a_learner_and_an_actor_that_wait_for_each_other_at_two_tables_are_named():
    core = make_core(a=RATIO, b=RATIO)
    learner, actor = Client(core, 0), Client(core, 1)
    for channel, table in ((1, "a"), (2, "b")):
        learner.open_sampler(channel, table)
        actor.open_writer(channel, table, max_commit_rows=6, num_wanted=6)
    learner.credit(1)
    actor.commit(2, num_rows=6)  # the fifth and sixth wait for samples of b, and the actor for them
    assert tables_of(core, 0.5)["a"]["stuck"] == "", "it may still do something else"
    tables = tables_of(core, 7.0)
    assert tables["a"]["stuck"] == (
        "nobody can move: client-0 waits for inserts into 'a', but client-1 waits for samples from 'b'"
    )
    assert tables["b"]["stuck"] == (
        "nobody can move: client-1 waits for samples from 'b', but client-0 waits for inserts into 'a'"
    )
    learner.credit(2, num_credits=2)
    assert [table["stuck"] for table in tables_of(core, 9.0).values()] == ["", ""]


def test_rows_that_stopped_and_quarantined_clients_hold_are_named_with_their_holders():
    core = make_core(replay={"headroom": 8})
    clients = [Client(core, number) for number in range(3)]
    clients[0].open_writer(max_commit_rows=4, num_wanted=4)
    clients[1].open_writer(max_commit_rows=4, num_wanted=4)
    clients[2].open_writer(max_commit_rows=4, num_wanted=4)
    assert tables_of(core)["replay"]["stuck"] == ""
    core.disconnected(token(0))
    core.is_stopped = lambda pid: pid == 1001
    assert tables_of(core)["replay"]["stuck"] == (
        "nobody can move: client-2 waits for rows of 'replay', but client-0 closed its connection and holds rows as "
        "long as its process lives, client-1 is stopped (SIGCONT lets it go on)"
    )


def test_the_limiter_and_its_cursor_are_described():
    core = make_core(replay=RATIO)
    client = Client(core)
    client.open_writer()
    client.commit(num_rows=2)
    assert tables_of(core)["replay"]["limiter"] == {
        "kind": "SampleToInsertRatio",
        "parameters": {"samples_per_insert": 1.0, "min_size_to_sample": 2, "error_buffer": (0.0, 4.0)},
        "cursor": 2.0,
        "min_diff": 0.0,
        "max_diff": 4.0,
        "min_size": 2,
    }


# ---- another limiter -----------------------------------------------------------------------------------------------


def set_limiter(client, limiter, table="replay"):
    return client.ask(messages.SetRateLimiter(table, limiter))


def test_another_limiter_lets_go_on_who_waited_and_counts_from_then_on():
    core = make_core(replay={"rate_limiter": MinSize(8)})
    client = Client(core)
    client.open_writer(channel=1, max_commit_rows=4, num_wanted=8)
    client.open_sampler(channel=2, batch_size=2)
    client.commit(channel=1, num_rows=4)
    assert client.credit(channel=2, num_credits=9) == []
    reply, events = set_limiter(client, SampleToInsertRatio(1.0, 2, (-3.0, 3.0)))
    assert reply == messages.Opened()
    assert batches(events) == [(client.id(2), 2)] * 2  # cursor 2, 0, -2
    limiter = core.tables["replay"].state.limiter
    assert (limiter.cursor, limiter.num_inserts, limiter.num_samples, limiter.size) == (-2.0, 4, 4, 4)
    assert batches(client.commit(channel=1, num_rows=4)) == [(client.id(2), 2)] * 2  # cursor 2, 0, -2
    _, events = set_limiter(client, MinSize(1))
    assert batches(events) == [(client.id(2), 2)] * 5


@pytest.mark.parametrize(
    ("limiter", "message"),
    [
        (MinSize(9), "waits for 9 transitions, but capacity is 8"),
        (
            SampleToInsertRatio(1.0, 2, 2.0),
            r"client-0 samples table 'replay' now: a batch of 4 draws could wait for ever: 4 \+ samples_per_insert 1.0 "
            r"> 4.0 = .*; sample at most 3 or widen error_buffer",
        ),
    ],
)
def test_a_limiter_by_which_somebody_could_wait_for_ever_is_refused_whole(limiter, message):
    core = make_core()
    client = Client(core)
    client.open_sampler(channel=2, batch_size=4)
    client.credit(channel=2)
    before = snapshot(core)
    reply, events = set_limiter(client, limiter)
    assert isinstance(reply, messages.Refused)
    assert re.search(message, reply.reason)
    assert (snapshot(core), events) == (before, [])


def test_a_rollout_table_has_no_limiter_to_set():
    client = Client(make_core(rollout=rollout_table()))
    reply, _ = set_limiter(client, MinSize(1), "rollout")
    assert "holds rollouts" in reply.reason
