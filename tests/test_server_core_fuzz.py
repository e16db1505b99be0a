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
    snapshot,
)
from hypothesis import example, given, settings
from hypothesis import strategies as st

from rl_buffer import frames, messages
from rl_buffer.frames import Commit, Credit
from rl_buffer.messages import Envelope
from rl_buffer.parameter_slots import BOARD_LENGTH, ParameterSlots
from rl_buffer.samplers import Prioritized, Uniform
from rl_buffer.stats_tracker import Episode


def busy_core():
    """Writers with rows, a commit that waits, a sampler with a batch, parameters being published."""
    core = make_core(replay=RATIO | {"sampler": Prioritized(alpha=1.0)}, other={"sampler": Uniform()})
    client = Client(core)
    client.open_writer(channel=1, max_commit_rows=4, num_wanted=6)
    client.open_sampler(channel=2, batch_size=1)
    client.commit(num_rows=4, num_wanted=2, td_errors=floats(1.0, 2.0, 3.0, 4.0))
    client.commit(num_rows=2, num_wanted=0)
    client.open_writer(channel=3, table="other")
    client.commit(channel=3)
    core.parameters["policy"] = ParameterSlots(np.zeros(BOARD_LENGTH, np.int64))
    client.ask(messages.ReserveParameters("policy"))
    return core


VALID = [
    (1, Commit(EPOCH, 1, 3, 7, 1, floats(2.0), [Episode(0, 1.0, 5)]).encode()),
    (1, Commit(EPOCH, 1, 3, 7, 1, None, []).encode()),
    (3, Commit(EPOCH, 2, 2, 7, 2, floats(2.0, np.nan), []).encode()),
    (2, Credit(EPOCH, 1, 0, ints(0, 1), ints(1, 1), floats(2.0, -3.0)).encode()),
    (2, Credit(EPOCH, 1, 5, ints(), ints(), floats()).encode()),
    *(
        (0, messages.encode_control(Envelope(1, EPOCH, request)))
        for request in (
            messages.OpenWriter(9, "other", 2, 4),
            messages.OpenSampler(9, "replay", 2),
            messages.CloseChannel(1),
            messages.CloseChannel(2),
            messages.PublishParameters("policy", 0),
            messages.ReserveParameters("policy"),
            messages.Clear("replay"),
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


@given(channel=st.integers(0, 3), frame=st.binary(max_size=120), kind=st.integers(0, 7))
@settings(max_examples=200, deadline=None, derandomize=True)
def test_random_bytes_are_refused(channel, frame, kind):
    core = busy_core()
    feed(core, channel_id(0, channel), frame)
    feed(core, channel_id(0, channel), bytes((kind,)) + frame)


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
    for channel in (1, 2, 3):
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
    ):
        assert feed(core, channel_id(0, channel), frame)
