"""Anything at all as a message: it is refused or harmless, and the server goes on."""

import struct

import msgspec
import numpy as np
import pytest
from core_driver import (
    EPOCH,
    RATIO,
    Client,
    channel_id,
    check_tables,
    decoded,
    floats,
    ints,
    make_core,
    rollout_table,
    snapshot,
    token,
)
from hypothesis import example, given, settings
from hypothesis import strategies as st

from rl_buffer import frames, messages
from rl_buffer.frames import Commit, Credit
from rl_buffer.messages import Envelope
from rl_buffer.rate_limiters import MinSize, SampleToInsertRatio
from rl_buffer.samplers import Prioritized, Uniform
from rl_buffer.stats_tracker import Episode


def busy_core():
    """Writers with rows, a commit that waits, a sampler with a batch, parameters being published.

    Of rollouts: channel 4 writes a fragment, one is finished, and channel 5 reads those of `HELD`.
    """
    core = make_core(
        replay=RATIO | {"sampler": Prioritized(alpha=1.0)},
        other={"sampler": Uniform()},
        rollout=rollout_table(num_fragments=NUM_FRAGMENTS, max_version_lag=1),
    )
    client = Client(core)
    client.open_writer(channel=1, max_commit_rows=4, num_wanted=6)
    client.open_sampler(channel=2, batch_size=1)
    client.commit(num_rows=4, num_wanted=2, td_errors=floats(1.0, 2.0, 3.0, 4.0))
    client.commit(num_rows=2, num_wanted=0)
    client.open_writer(channel=3, table="other")
    client.commit(channel=3)
    client.ask(messages.ReserveParameters("policy"))
    client.open_rollout_writer(channel=4)
    for _ in range(3):
        client.commit(channel=4)
    client.open_reader(channel=5)
    client.credit(channel=5, num_credits=2)
    return core


NUM_FRAGMENTS = 6
HELD = {0: 1, 1: 1}  # row -> generation
CHANNELS = range(6)


def credit(num_credits, rows=(), generations=()):
    return Credit(EPOCH, num_credits, 0, ints(*rows), ints(*generations), floats(*[0.0] * len(rows))).encode()


RELEASE = credit(1, HELD.keys(), HELD.values())
VALID = [
    (1, Commit(EPOCH, 1, 3, 7, 1, floats(2.0), [Episode(0, 1.0, 5)]).encode()),
    (1, Commit(EPOCH, 1, 3, 7, 1, None, []).encode()),
    (3, Commit(EPOCH, 2, 2, 7, 2, floats(2.0, np.nan), []).encode()),
    (2, Credit(EPOCH, 1, 0, ints(0, 1), ints(1, 1), floats(2.0, -3.0)).encode()),
    (2, Credit(EPOCH, 1, 5, ints(), ints(), floats()).encode()),
    (4, Commit(EPOCH, 1, 4, 7, 1, None, [Episode(0, 1.0, 5)]).encode()),
    (5, RELEASE),
    (5, credit(NUM_FRAGMENTS)),
    *(
        (0, messages.encode_control(Envelope(1, EPOCH, request)))
        for request in (
            messages.OpenWriter(9, "other", 2, 4),
            messages.OpenWriter(9, "rollout", 1, 1),
            messages.OpenSampler(9, "replay", 2),
            messages.OpenReader(9, "rollout"),
            messages.CloseChannel(1),
            messages.CloseChannel(2),
            messages.CloseChannel(4),
            messages.CloseChannel(5),
            messages.PublishParameters("policy", 0),
            messages.ReserveParameters("policy"),
            messages.Clear("replay"),
            messages.Clear("rollout"),
            messages.SetRateLimiter("replay", SampleToInsertRatio(2.0, 2, 8.0)),
            messages.SetRateLimiter("other", MinSize(3)),
            messages.GetSize("other"),
            messages.GetInfo(),
            messages.GetStats(),
        )
    ),
]


def feed(core, sender, frame):
    """Handle it; whatever it is, the server lives, and what it refuses changes nothing."""
    before, num_refused = snapshot(core), core.num_refused
    outgoing = core.handle(sender, frame, 0.0)
    assert core.num_refused <= num_refused + 1
    for _, answer in outgoing:
        assert isinstance(answer, bytes)
    decoded(outgoing)
    if core.num_refused > num_refused:
        assert len(outgoing) == 1
        assert snapshot(core) == before
    check_tables(core)
    return core.num_refused > num_refused


@pytest.mark.parametrize(("channel", "frame"), VALID)
def test_the_frames_that_the_fuzz_tests_start_from_are_taken(channel, frame):
    assert not feed(busy_core(), channel_id(0, channel), frame)


@given(channel=st.sampled_from(CHANNELS), frame=st.binary(max_size=120), kind=st.integers(0, 7))
@settings(max_examples=200, deadline=None, derandomize=True)
def test_random_bytes_are_refused(channel, frame, kind):
    core = busy_core()
    feed(core, channel_id(0, channel), frame)
    feed(core, channel_id(0, channel), bytes((kind,)) + frame)


EDGES = [-(2**63), -1, 0, 1, 2, 3, NUM_FRAGMENTS - 1, NUM_FRAGMENTS, 2**32, 2**63 - 1]


@given(
    released=st.lists(st.tuples(st.sampled_from(EDGES), st.sampled_from(EDGES)) | st.sampled_from([*HELD.items()])),
    num_credits=st.sampled_from([0, 1, NUM_FRAGMENTS, NUM_FRAGMENTS + 1, 2**32 - 1]),
)
@example(released=[(0, 1), (0, 1)], num_credits=0)
@settings(max_examples=200, deadline=None, derandomize=True)
def test_a_reader_can_release_what_it_holds_and_nothing_else(released, num_credits):
    core = busy_core()
    is_good = set(released) <= HELD.items() and len(set(released)) == len(released) and num_credits <= NUM_FRAGMENTS
    rows, generations = zip(*released, strict=True) if released else ((), ())
    assert feed(core, channel_id(0, 5), credit(num_credits, rows, generations)) != is_good
    left = core.sessions[token(0)].channels[channel_id(0, 5)].rows
    assert HELD.keys() - left == (set(rows) if is_good else set())


@pytest.mark.parametrize(
    ("channel", "frame"), [valid for valid in VALID if valid[1][0] == frames.COMMIT] + [(5, RELEASE)]
)
def test_a_commit_or_release_that_comes_twice_is_refused(channel, frame):
    core = busy_core()
    assert not feed(core, channel_id(0, channel), frame)
    assert feed(core, channel_id(0, channel), frame)


@pytest.mark.parametrize("frame", [frame for _, frame in VALID if frame[0] in (frames.COMMIT, frames.CREDIT)])
def test_commits_and_credits_on_channels_of_all_other_kinds_are_refused(frame):
    core, is_commit = busy_core(), frame[0] == frames.COMMIT
    for channel in (0, 2, 5, 9) if is_commit else (0, 1, 3, 4, 9):
        assert feed(core, channel_id(0, channel), frame)


@given(sender=st.binary(max_size=24), valid=st.sampled_from(VALID))
@settings(max_examples=50, deadline=None, derandomize=True)
def test_any_other_sender_is_refused(sender, valid):
    assert feed(busy_core(), sender, valid[1])


@pytest.mark.parametrize(("channel", "frame"), VALID)
def test_a_truncated_frame_is_refused_or_a_shorter_valid_one(channel, frame):
    core = busy_core()
    for length in range(len(frame)):
        if not feed(core, channel_id(0, channel), frame[:length]):
            # Of a commit's tail nothing may be left: that is a commit without episodes.
            assert frame[0] == frames.COMMIT
            core = busy_core()


@given(st.sampled_from(VALID), st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 7)), min_size=1, max_size=3))
@settings(max_examples=400, deadline=None, derandomize=True)
def test_flipped_bits_never_break_the_tables(valid, flips):
    channel, frame = valid
    damaged = bytearray(frame)
    for position, bit in flips:
        damaged[position % len(damaged)] ^= 1 << bit
    core = busy_core()
    feed(core, channel_id(0, channel), bytes(damaged))
    feed(core, channel_id(0, channel), bytes(damaged))  # again: a commit that passed is now a duplicate


@given(
    st.sampled_from([frames.COMMIT, frames.CREDIT]),
    st.lists(st.sampled_from([0, 1, 2, 3, 2**16, 2**18, 2**18 + 1, 2**31, 2**32 - 1]), min_size=9, max_size=9),
    st.sampled_from([EPOCH, 0, 2**64 - 1]),
    st.integers(0, 64),
)
@example(frames.CREDIT, [0, 0, 2**32 - 1, 0, 0, 0, 0, 0, 0], EPOCH, 0)
@settings(max_examples=200, deadline=None, derandomize=True)
def test_huge_counts_are_refused(kind, words, epoch, num_more):
    frame = struct.pack("<B3xIQ7I", kind, words[0], epoch, *words[1:8]) + bytes(num_more)
    core = busy_core()
    for channel in CHANNELS[1:]:
        feed(core, channel_id(0, channel), frame)


NESTED = {
    "arrays": b"\x91" * 100_000,
    "maps": b"\x81\xa1x" * 100_000,
    "a list of 2^32 items": b"\xdd\xff\xff\xff\xff",
    "a map of 2^32 items": b"\xdf\xff\xff\xff\xff",
    "a string of 2^32 bytes": b"\xdb\xff\xff\xff\xff",
    "an extension": b"\xc7\xff\x01",
    "a string that is not UTF-8": b"\xa2\xff\xfe",
}


@pytest.mark.parametrize("payload", NESTED.values(), ids=NESTED)
def test_msgpack_that_is_deep_or_promises_too_much_is_refused(payload):
    core = busy_core()
    episodes = Commit(EPOCH, 0, 2, 0, 0, None, []).encode()
    head = b"\x93\x01" + msgspec.msgpack.encode(EPOCH)
    for channel, frame in (
        (3, episodes + payload),
        (3, episodes + b"\x91\x95\x00\xcb" + bytes(8) + b"\x01" + payload),
        (0, bytes((frames.CONTROL,)) + payload),
        (0, bytes((frames.CONTROL,)) + head + payload),
        (0, bytes((frames.CONTROL,)) + head + b"\x82\xa4type\xa7GetSize\xa5table" + payload),
        (4, Commit(EPOCH, 1, 4, 0, 1, None, []).encode() + payload),
        (0, bytes((frames.CONTROL,)) + head + b"\x83\xa4type\xaaOpenReader\xa7channel\x09\xa5table" + payload),
    ):
        assert feed(core, channel_id(0, channel), frame)
