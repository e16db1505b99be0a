"""A process of the same user with a bare socket, which says what no client would: the server refuses it and goes on."""

import os
import random
import socket

import msgspec
import numpy as np
import pytest
from child_processes import NUMBERED_SPEC
from test_limits import attach_path, num_descriptors, resident_nbytes

import rl_buffer as rb
from rl_buffer import messages

pytestmark = pytest.mark.timeout(240)

TABLE = rb.ReplayTable(NUMBERED_SPEC, capacity=64, headroom=64)
MIB = 1 << 20


@pytest.fixture(scope="module")
def server():
    with rb.BufferServer({"replay": TABLE}) as server:
        yield server


class Stranger:
    """A bare connection to the attach socket."""

    def __init__(self, server):
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.settimeout(30.0)
        self._socket.connect(attach_path(server.address))

    def say(self, packet, fds=()):
        """Send a packet (what is not bytes is packed), and return the reply and how many descriptors came with it."""
        packet = packet if isinstance(packet, bytes) else msgspec.msgpack.encode(packet)
        socket.send_fds(self._socket, [packet], list(fds))
        reply, came, _, _ = socket.recv_fds(self._socket, messages.MAX_ATTACH_NBYTES, 253)
        for fd in came:
            os.close(fd)
        return messages.decode_attach_reply(reply), len(came)

    def refused(self, packet, fds=()):
        """The reason why this packet was refused."""
        reply, num_fds = self.say(packet, fds)
        assert isinstance(reply, messages.Refused), reply
        assert num_fds == 0
        return reply.reason

    def close(self):
        self._socket.close()


@pytest.fixture
def stranger(server):
    stranger = Stranger(server)
    yield stranger
    stranger.close()


@pytest.fixture
def guest(stranger):
    """A stranger who has said hello."""
    reply, num_fds = stranger.say(messages.Hello(messages.PROTOCOL_VERSION, "guest"))
    assert isinstance(reply, messages.Welcome)
    assert num_fds == 2
    return stranger


def create(name="policy", fields=(("w", ((3,), "float32")),)):
    return {"type": "CreateParameters", "name": name, "fields": fields}


@pytest.mark.parametrize(
    "packet",
    [
        b"x",
        b"\xc1",
        b"\x91" * 100_000,
        b"\xdd\xff\xff\xff\xff",
        {"type": "Nothing"},
        {"type": "Hello"},
        {"type": "Hello", "protocol_version": "3", "name": "x"},
        {"type": "Hello", "protocol_version": 3, "name": "x", "previous": "x"},
        [1, 2, 3],
    ],
    ids=lambda packet: str(packet)[:20],
)
def test_a_packet_that_is_no_message_is_refused(stranger, packet):
    assert "malformed message" in stranger.refused(packet)
    assert isinstance(stranger.say(messages.Hello(messages.PROTOCOL_VERSION, "x"))[0], messages.Welcome), "and no more"


def test_who_has_not_said_hello_gets_nothing_and_nobody_says_it_twice(stranger):
    for packet in (messages.GetParameters("policy"), create()):
        assert stranger.refused(packet) == "the first message must be Hello"
    assert "client speaks protocol 99" in stranger.refused(messages.Hello(99, "x"))
    stranger.say(messages.Hello(messages.PROTOCOL_VERSION, "x"))
    assert stranger.refused(messages.Hello(messages.PROTOCOL_VERSION, "x")) == "Hello was said already"


def test_a_token_that_is_somebody_elses_or_none_gives_nothing_back(server, connect, stranger):
    client = connect(server)
    writer = client.writer("replay", num_envs=1, chunk_size=8)
    held = client.info()["tables"]["replay"]["reserved_rows"]
    for previous in (b"", b"x", b"\0" * 16, os.urandom(16), os.urandom(100_000)):
        other = Stranger(server)
        reply, _ = other.say(messages.Hello(messages.PROTOCOL_VERSION, "x", previous))
        assert isinstance(reply, messages.Welcome)
        other.close()
    assert client.info()["tables"]["replay"]["reserved_rows"] == held
    writer.close()


HUGE = 2**63 - 1
REFUSED_PARAMETERS = {
    "beyond all memory": (create(fields=[("w", ((2**50,), "float32"))]), r"parameters 'policy' need \d+"),
    "beyond any float": (create(fields=[("w", ((HUGE,) * 1000, "float32"))]), "need .* GiB are available"),
    "beyond any float in sum": (
        create(fields=[(str(i), ((HUGE,) * 20, "f8")) for i in range(100)]),
        "GiB are available",
    ),
    "negative": (create(fields=[("w", ((-1,), "float32"))]), "shape must hold integers >= 1"),
    "zero": (create(fields=[("w", ((0,), "float32"))]), "shape must hold integers >= 1"),
    "object": (create(fields=[("w", ((1,), "object"))]), "cannot be stored"),
    "code": (create(fields=[("w", ((1,), "f4,__import__('os')"))]), "cannot be stored"),
    "void": (create(fields=[("w", ((1,), "V8"))]), "cannot be stored"),
    "none": (create(fields=[]), "at least one Field"),
    "no name": (create(name=""), "has 1 to 100 characters, not 0"),
    "long name": (create(name="x" * 100_000), "has 1 to 100 characters, not 100000"),
    "too many to describe": (
        create(fields=[(str(i), ((), "?")) for i in range(11_000)]),
        "11000 tensors take more than",
    ),
}


@pytest.mark.parametrize(("packet", "reason"), REFUSED_PARAMETERS.values(), ids=REFUSED_PARAMETERS)
def test_parameters_that_cannot_be_are_refused_and_leave_nothing(server, connect, guest, packet, reason):
    client = connect(server)
    before = client.info()["num_refused"], num_descriptors(server.pid)
    with pytest.raises(ValueError, match=reason):
        raise ValueError(guest.refused(packet))
    info = client.info()
    assert (info["num_refused"], num_descriptors(server.pid)) == (before[0] + 1, before[1])
    assert info["parameters"] == {}
    assert len(info["last_refusal"]) <= 1000


def test_parameters_may_have_any_name_of_up_to_a_hundred_characters(serve, connect):
    client = connect(serve(TABLE))
    names = ["a\nb", "a\0b", "../../x", "größe 🦆", "x" * 100, "%s{0}"]
    for name in names:
        client.publish_parameters({"w": np.zeros(3)}, name)
    assert client.info()["parameters"] == dict.fromkeys(names, 1)


def test_descriptors_that_are_sent_along_are_not_kept(server, connect, guest):
    client = connect(server)
    client.info()
    before = num_descriptors(server.pid)
    ends = os.pipe()
    for _ in range(50):
        guest.say(messages.GetParameters("nothing"), [*ends] * 50)
    assert num_descriptors(server.pid) == before
    os.close(ends[1])
    os.set_blocking(ends[0], False)
    assert os.read(ends[0], 1) == b"", "nobody else holds the end that writes"
    os.close(ends[0])


def test_replies_that_nobody_reads_are_dropped(server, connect, guest):
    client = connect(server)
    before = resident_nbytes(server.pid)
    guest.say(create("unread"))
    for _ in range(2000):
        guest._socket.send(messages.encode_attach(messages.GetParameters("unread")))
    assert client.info()["parameters"] == {"unread": 0}
    assert resident_nbytes(server.pid) - before < 4 * MIB
    late = connect(server)  # descriptors on their way are limited for all of a user together
    assert late.size("replay") == 0


def test_random_packets_are_refused(server, connect, guest):
    client = connect(server)
    rng = random.Random(0)
    valid = [messages.encode_attach(message) for message in (messages.Hello(3, "x"), messages.GetParameters("x"))]
    valid.append(msgspec.msgpack.encode(create()))
    before = client.info()["num_refused"]
    num_refused = 0
    for _ in range(2000):
        packet = bytearray(rng.choice(valid))
        for _ in range(rng.randint(1, 4)):
            packet[rng.randrange(len(packet))] = rng.randrange(256)
        reply, _ = guest.say(bytes(packet[: rng.randint(1, len(packet))]))
        num_refused += isinstance(reply, messages.Refused)
    assert num_refused > 1000
    assert client.info()["num_refused"] == before + num_refused
