"""A checkpoint as the core sees it: one at a time, answered at the end, and what it holds back comes back."""

import pytest
from core_driver import RATIO, Client, acknowledged, decoded, make_core, snapshot

from rl_buffer import messages
from rl_buffer.frames import Grant
from rl_buffer.messages import Envelope
from rl_buffer.stats_tracker import Episode

PATH = "/some/where/file"


def ask(client, path=PATH, now_s=0.0):
    """Ask for a checkpoint; what is answered at once."""
    request = messages.encode_control(Envelope(9, client.core.epoch, messages.Checkpoint(path)))
    return decoded(client.core.handle(client.id(5), request, now_s))


def answer_to(client, events):
    (reply,) = [event.reply for receiver, event in events if receiver == client.id(5) and event.request_id == 9]
    return reply


def granted(events):
    return [row for _, grant in events if isinstance(grant, Grant) for row in grant.rows.tolist()]


@pytest.fixture
def core():
    return make_core(replay={"capacity": 4, "headroom": 4}, other={"capacity": 4, "headroom": 4})


@pytest.fixture
def writer(core):
    """Its client has filled the table, and holds half of the headroom."""
    client = Client(core)
    client.open_writer(max_commit_rows=2, num_wanted=2)
    for _ in range(2):
        client.commit(num_rows=2)
    return client


def test_it_is_answered_when_it_is_on_the_disk_and_others_before(core, writer):
    assert ask(writer, now_s=1.0) == []
    core.take_cut({})
    core.checkpoint.pause_s = 0.25
    assert writer.ask(messages.GetSize("replay"))[0] == messages.Value(4)
    assert core.info(3.0)["checkpoint"] == {"client": "client-0", "path": PATH, "running_s": 2.0}
    reply = answer_to(writer, decoded(core.checkpoint_ended(1234, 4.0)))
    assert reply == messages.CheckpointReport(PATH, 1234, {"other": 0, "replay": 4}, 3.0, 250.0, 0.0)
    assert core.info(5.0)["checkpoint"] is None


def test_one_that_fails_is_answered_with_the_reason_and_another_can_follow(core, writer):
    ask(writer)
    assert answer_to(writer, decoded(core.checkpoint_ended("no room", 1.0))) == messages.Refused("no room")
    assert ask(writer) == []
    core.take_cut({})
    assert answer_to(writer, decoded(core.checkpoint_ended("x" * 10_000, 1.0))) == messages.Refused("x" * 1000)


@pytest.mark.parametrize("path", ["relative", "", "./x", "/zero\0byte"])
def test_a_path_that_is_not_absolute_is_refused_and_changes_nothing(core, writer, path):
    before = snapshot(core)
    assert "must be absolute" in answer_to(writer, ask(writer, path)).reason
    assert snapshot(core) == before
    assert core.checkpoint is None


def test_a_second_one_is_refused_with_the_name_of_who_has_the_first(core, writer):
    ask(writer)
    other = Client(core, 1)
    refusal = answer_to(other, ask(other, "/else/where"))
    assert refusal.reason == f"client-0 has a checkpoint written to {PATH} already; one at a time"
    assert core.checkpoint.path == PATH


def test_one_of_another_epoch_is_refused(core, writer):
    request = messages.encode_control(Envelope(9, 5, messages.Checkpoint(PATH)))
    reply = answer_to(writer, decoded(core.handle(writer.id(5), request, 0.0)))
    assert "connect again" in reply.reason
    assert core.checkpoint is None


def test_rows_are_granted_again_as_they_are_copied_and_the_wait_for_them_is_reported(core, writer):
    ask(writer)
    cut = core.take_cut({})
    order = [row for array in cut.arrays for row in array.tolist()]
    assert order == [0, 1, 2, 3]
    assert granted(writer.commit(num_rows=2)) == [6, 7]  # 4 and 5 are in it, 0 and 1 are kept
    core._grants.now_s = 10.0
    events = writer.commit(num_rows=2)
    assert granted(events) == []
    assert acknowledged(events) == [(writer.id(1), 4)]
    assert core.copied("masses:replay", 4, 11.0) == core.copied("rows:other", 4, 11.5) == []
    assert granted(decoded(core.copied("rows:replay", 1, 12.0))) == []  # it needs two for a chunk
    assert granted(decoded(core.copied("rows:replay", 1, 13.0))) == [0, 1]
    core.copied("rows:replay", 2, 17.0)
    assert answer_to(writer, decoded(core.checkpoint_ended(1, 20.0))).writers_waited_ms == 13_000.0


@pytest.mark.parametrize("end", ["thaw", "failure"])
def test_when_nothing_more_is_copied_all_rows_come_back(core, writer, end):
    ask(writer)
    core.take_cut({})
    writer.commit(num_rows=2)
    writer.commit(num_rows=2)
    events = decoded(core.thaw(1.0) if end == "thaw" else core.checkpoint_ended("killed", 1.0))
    assert granted(events) == [0, 1]
    state = core.tables["replay"].state
    assert (state.num_held, state.num_reservable) == (0, 2)


def test_of_a_commit_that_is_published_in_part_the_rest_and_the_episodes_are_not_in_it():
    core = make_core(replay=RATIO)  # takes 4 items before it is sampled
    client = Client(core)
    writer_id = b"w" * 16
    client.ask(messages.OpenWriter(1, "replay", 3, 6, writer_id))
    client.sequences[1] = 0
    for reward in (1.0, 2.0):
        client.commit(num_rows=3, episodes=[Episode(0, reward, 3)])
    ask(client)
    contents = core.take_cut({}).contents
    assert contents.tables["replay"].num_items == 4
    assert [episode[1] for episode in contents.stats["episodes"]] == [1.0]
    assert contents.writers == {writer_id.hex(): (1, 1)}
