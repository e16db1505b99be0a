import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rl_buffer import frames, messages
from rl_buffer.errors import InvalidInput
from rl_buffer.frames import Batch, Commit, Credit, Grant
from rl_buffer.messages import Envelope, ReplyEnvelope
from rl_buffer.rate_limiters import MinSize, SampleToInsertRatio
from rl_buffer.samplers import Prioritized, Uniform
from rl_buffer.spec import Field, TransitionSpec
from rl_buffer.stats_tracker import Episode
from rl_buffer.tables import ReplayTable, Sample, StatsConfig

u32, u64 = st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1)
int64s = st.integers(-(2**63), 2**63 - 1)
floats64 = st.floats(width=64)
episodes = st.builds(
    Episode,
    st.integers(0, 2**62),
    floats64,
    st.integers(0, 2**53),
    st.dictionaries(st.text(max_size=3), floats64, max_size=2),
    st.frozensets(st.text(max_size=3), max_size=2),
)


def arrays(n, elements, dtype):
    return st.lists(elements, min_size=n, max_size=n).map(lambda values: np.array(values, dtype))


def same(mine, theirs):
    """Equal down to the bits, NaN included."""
    if isinstance(mine, np.ndarray):
        return theirs is not None and mine.dtype == theirs.dtype and mine.tobytes() == theirs.tobytes()
    if isinstance(mine, tuple):
        return len(mine) == len(theirs) and all(map(same, mine, theirs))
    if isinstance(mine, Sample):
        return all(same(getattr(mine, name), getattr(theirs, name)) for name in Sample.__slots__)
    return mine == theirs or repr(mine) == repr(theirs)


@given(st.data(), st.integers(0, 5), u64, u64, int64s, u32, st.lists(episodes, max_size=3))
@settings(derandomize=True, deadline=None)
def test_a_commit_arrives_as_it_was_sent(data, n, epoch, sequence, version, wanted, given_episodes):
    td_errors = data.draw(st.none() | arrays(n, floats64, np.float64))
    commit = Commit(epoch, n, sequence, version, wanted, td_errors, given_episodes)
    assert same(commit, frames.decode_commit(commit.encode()))


@given(st.data(), st.integers(0, 5), u64, u64, u64)
@settings(derandomize=True)
def test_a_grant_arrives_as_it_was_sent(data, n, epoch, number, acknowledged):
    grant = Grant(epoch, number, acknowledged, data.draw(arrays(n, int64s, np.int64)))
    assert same(grant, frames.decode_grant(grant.encode()))
    assert same(grant, frames.decode_grant(grant.encode(), number))


def test_a_grant_after_one_that_was_lost_is_refused():
    grant = Grant(0, 7, 0, np.array([1, 2]))
    with pytest.raises(InvalidInput, match="grant 7 came instead of 6"):
        frames.decode_grant(grant.encode(), 6)


@given(st.data(), st.integers(0, 5), u64, u32, u32)
@settings(derandomize=True)
def test_a_credit_arrives_as_it_was_sent(data, n, epoch, num_credits, num_overtaken):
    rows, generations = (data.draw(arrays(n, int64s, np.int64)) for _ in range(2))
    credit = Credit(epoch, num_credits, num_overtaken, rows, generations, data.draw(arrays(n, floats64, np.float64)))
    assert same(credit, frames.decode_credit(credit.encode()))


@given(st.data(), st.integers(0, 5), st.integers(1, 4), u64, u32, floats64, st.integers(0, 2**63 - 1))
@settings(derandomize=True)
def test_batches_arrive_as_they_were_sent(data, n, num_batches, epoch, batch_size, total, num_items):
    def numbers(numbers, dtype):
        return data.draw(arrays(n * num_batches, numbers, dtype))

    sample = Sample(
        numbers(int64s, np.int64), numbers(int64s, np.int64), numbers(floats64, np.float64), total, num_items
    )
    batch = Batch(epoch, batch_size, sample, num_batches)
    arrived = frames.decode_batch(batch.encode())
    assert same(batch, arrived)
    for column in range(3):
        parts = [single[column] for single in arrived.samples()]
        assert [len(part) for part in parts] == [n] * num_batches
        assert np.array_equal(np.concatenate(parts), sample[column], equal_nan=True)


@pytest.mark.parametrize(("num_rows", "num_batches"), [(3, 0), (3, 2), (0, 0)])
def test_batches_that_are_not_equally_long_are_refused(num_rows, num_batches):
    rows = np.arange(num_rows)
    frame = Batch(0, 1, Sample(rows, rows, np.ones(num_rows), 1.0, 1), num_batches).encode()
    with pytest.raises(InvalidInput, match=f"message has {num_rows} rows for {num_batches} batches"):
        frames.decode_batch(frame)


@given(u64, st.text(max_size=20))
@settings(derandomize=True)
def test_a_refusal_arrives_as_it_was_sent(epoch, reason):
    assert frames.decode_refusal(frames.encode_refusal(epoch, reason)) == (epoch, reason)


REQUESTS = [
    messages.OpenWriter(1, "replay", 2, 4),
    messages.OpenSampler(1, "replay", 256),
    messages.CloseChannel(3),
    messages.ReserveParameters("policy"),
    messages.PublishParameters("policy", 2),
    messages.Clear("replay"),
    messages.GetSize("replay"),
    messages.GetInfo(),
    messages.GetStats(),
    messages.Checkpoint("/some/file"),
]
REPLIES = [
    messages.Opened(),
    messages.Slot(1, 2),
    messages.Value({"a": [1, 2.5, "x", None]}),
    messages.CheckpointReport("/some/file", 123, {"replay": 4}, 0.5, 6.0, 7.0),
    messages.Refused("why"),
]


@pytest.mark.parametrize("request_", REQUESTS, ids=str)
def test_a_request_arrives_as_it_was_sent(request_):
    envelope = Envelope(7, 2**63, request_)
    assert messages.decode_control_request(messages.encode_control(envelope)) == envelope


@pytest.mark.parametrize("reply", REPLIES, ids=str)
def test_a_reply_arrives_as_it_was_sent(reply):
    envelope = ReplyEnvelope(7, 2**63, reply)
    assert messages.decode_control_reply(messages.encode_control(envelope)) == envelope


SPEC = TransitionSpec(
    obs={"camera": {"rgb": Field((2, 2), "uint8")}, "speed": Field(())},
    action=Field((), "int64"),
    extras={"x": Field(1)},
)
TABLES = [
    ReplayTable(SPEC, 1000),
    ReplayTable(SPEC, 1000, Prioritized(0.5), SampleToInsertRatio(1.0, 10, (0.0, 20.0)), 3, 0.9, 7, 128),
    ReplayTable(SPEC, 1000, Uniform(), MinSize(5), seed=2**63),
]


@pytest.mark.parametrize("table", TABLES, ids=["default", "prioritized", "uniform"])
def test_a_table_reaches_clients_and_server_as_it_was_written(table):
    info = messages.TableInfo(table, "digest", messages.SegmentInfo(0, 64), messages.SegmentInfo(1, 8))
    welcome = messages.Welcome(1, b"t" * 16, {"replay": info}, StatsConfig())
    arrived = messages.decode_attach_reply(messages.encode_attach(welcome))
    assert arrived == welcome
    assert arrived.tables["replay"].config.layout.digest == table.layout.digest
    config = messages.ServerConfig("ipc:///x", {"replay": table}, StatsConfig(extra_metrics_keys=("a",)), parent_pid=1)
    assert msgspec.json.decode(msgspec.json.encode(config), type=messages.ServerConfig) == config


@pytest.mark.parametrize(
    "message",
    [
        messages.Hello(1, "actor-3"),
        messages.GetParameters("policy"),
        messages.CreateParameters("policy", [("w", Field((2, 3))), ("b", Field((), "int64"))]),
    ],
    ids=str,
)
def test_an_attach_request_arrives_as_it_was_sent(message):
    assert messages.decode_attach_request(messages.encode_attach(message)) == message


def test_parameters_of_a_thousand_tensors_fit_one_packet():
    fields = [(f"blocks.{i}.attention.projection.weight", Field((1024, 1024))) for i in range(1000)]
    packet = messages.encode_attach(messages.CreateParameters("policy", fields))
    assert len(packet) < messages.MAX_ATTACH_NBYTES


def test_the_largest_commit_and_credit_fit_one_message():
    n = frames.MAX_ROWS_PER_MESSAGE
    td_errors, rows = np.zeros(n), np.zeros(n, np.int64)
    assert len(Commit(1, n, 1, 0, 0, td_errors, []).encode()) <= frames.MAX_MESSAGE_NBYTES
    assert len(Credit(1, 1, 0, rows, rows, td_errors).encode()) <= frames.MAX_MESSAGE_NBYTES


@pytest.mark.parametrize(
    "decode", [frames.decode_commit, frames.decode_credit, frames.decode_grant, frames.decode_batch]
)
def test_a_frame_shorter_than_its_header_is_refused(decode):
    with pytest.raises(InvalidInput, match="message of 5 bytes is shorter than its header of"):
        decode(b"\2\0\0\0\0")


@pytest.mark.parametrize(
    "decode", [frames.decode_commit, frames.decode_credit, frames.decode_grant, frames.decode_batch]
)
def test_more_rows_than_the_limit_are_refused_before_they_are_looked_for(decode):
    with pytest.raises(InvalidInput, match="message names 262145 rows, more than the limit of 262144"):
        decode(b"\2\0\0\0" + (2**18 + 1).to_bytes(4, "little") + bytes(64))


@pytest.mark.parametrize("change", [-1, 1, 8])
def test_a_credit_whose_length_is_not_what_its_counts_say_is_refused(change):
    one = np.ones(2, np.int64)
    frame = Credit(1, 1, 0, one, one, np.ones(2)).encode()
    frame = frame[:change] if change < 0 else frame + bytes(change)
    with pytest.raises(InvalidInput, match=f"message has {len(frame)} bytes, its counts say 72"):
        frames.decode_credit(frame)


def test_a_commit_without_all_its_td_errors_is_refused():
    frame = Commit(1, 3, 1, 0, 0, np.zeros(3), []).encode()
    with pytest.raises(InvalidInput, match="too short for 3 elements"):
        frames.decode_commit(frame[:-1])


@pytest.mark.parametrize(
    "tail", [b"\x91", b"\x90\x90", b"\x91\x93\x00\x00\xa1x", b"\xc1", msgspec.msgpack.encode({"a": 1})]
)
def test_a_commit_with_a_tail_that_is_no_list_of_episodes_is_refused(tail):
    with pytest.raises(InvalidInput, match="malformed message"):
        frames.decode_commit(Commit(1, 0, 1, 0, 0, None, []).encode() + tail)


@pytest.mark.parametrize(
    "request_",
    [
        {"type": "Nothing"},
        {"type": "GetSize"},
        {"type": "GetSize", "table": 3},
        {"type": "OpenWriter", "channel": 1.5, "table": "t", "max_commit_rows": 1, "num_wanted": 1},
        {},
        None,
        [],
    ],
    ids=str,
)
def test_a_request_that_is_none_is_refused(request_):
    frame = bytes((frames.CONTROL,)) + msgspec.msgpack.encode((1, 1, request_))
    with pytest.raises(InvalidInput, match="malformed message"):
        messages.decode_control_request(frame)


ATTACH_DECODERS = [messages.decode_attach_request, messages.decode_attach_reply]


@given(st.sampled_from(ATTACH_DECODERS), st.binary(max_size=40))
@settings(derandomize=True)
def test_random_attach_packets_are_refused(decode, packet):
    with pytest.raises(InvalidInput, match="malformed message"):
        decode(packet)


@pytest.mark.parametrize(
    "shape_and_dtype", [[[0], "f4"], [[1], "f4,("], [[1], "object"], ["x", "f4"], [[1, -2]], [], [3.5]]
)
def test_parameters_with_a_field_that_cannot_be_are_refused_as_malformed(shape_and_dtype):
    packet = {"type": "CreateParameters", "name": "policy", "fields": [("w", shape_and_dtype)]}
    with pytest.raises(InvalidInput, match="malformed message"):
        messages.decode_attach_request(msgspec.msgpack.encode(packet))


def test_an_empty_frame_has_no_kind():
    assert frames.kind_of(b"") == 0
    kinds = [frames.CONTROL, frames.COMMIT, frames.GRANT, frames.CREDIT, frames.BATCH, frames.REFUSAL]
    assert len(set(kinds) | {0}) == 7


def test_arrays_of_a_message_are_views_of_it():
    credit = frames.decode_credit(Credit(1, 1, 0, np.ones(2, np.int64), np.ones(2, np.int64), np.ones(2)).encode())
    for array in credit[3:]:
        assert not array.flags.writeable
        assert array.flags.aligned
