"""Those who flood the server, never read, or send what nobody should: its memory stays bounded, and others go on."""

import os
import signal
import time

import child_misuse
import numpy as np
import pytest
import zmq
from test_limits import resident_nbytes

import rl_buffer as rb
from rl_buffer import frames, messages
from rl_buffer.frames import Commit, Credit
from rl_buffer.grants import MOST_DRAWS
from rl_buffer.spec import Field
from rl_buffer.stats_tracker import Episode

pytestmark = pytest.mark.timeout(240)

MIB = 1 << 20
SPEC = rb.TransitionSpec(obs=Field(()), action=Field(()))
TABLE = rb.ReplayTable(SPEC, capacity=1000, headroom=200, sampler=rb.Prioritized(), seed=0)
STEP = {"obs": [0.0], "action": [0.0], "reward": [0.0], "done": [False], "next_obs": [0.0]}
NOTHING, NO_ERRORS = np.empty(0, np.int64), np.empty(0)
CHANNEL = 1000


@pytest.fixture(scope="module")
def server():
    with rb.BufferServer({"replay": TABLE}) as server:
        yield server


@pytest.fixture
def filled(client):
    add_steps(client, 100)
    return client


def add_steps(client, num_steps):
    with client.writer("replay", num_envs=1) as writer:
        for _ in range(num_steps):
            writer.add(**STEP)


class Flooder:
    """A zmq socket in the name of an attached client, that sends and never reads: what it is sent stays unread."""

    def __init__(self, client, number=CHANNEL):
        self.epoch, self._connection = client._connection.epoch, client._connection
        self._socket = zmq.Context.instance().socket(zmq.DEALER)
        for option, value in ((zmq.RCVHWM, 1), (zmq.SNDHWM, 1), (zmq.RCVBUF, 4096), (zmq.LINGER, 0)):
            self._socket.setsockopt(option, value)
        self._socket.setsockopt(zmq.SNDTIMEO, 30_000)
        self._socket.setsockopt(zmq.IDENTITY, self._connection.token + number.to_bytes(4, "little"))
        self._socket.connect(self._connection.address.control_endpoint)

    def send(self, *parts):
        self._socket.send_multipart(parts)

    def ask(self, request, epoch=None):
        envelope = messages.Envelope(1, self.epoch if epoch is None else epoch, request)
        self.send(messages.encode_control(envelope))

    def close(self):
        self._socket.close()


@pytest.fixture
def flooder(client, connect):
    """Of a client of its own."""
    flooder = Flooder(connect(str(client._connection.address)))
    yield flooder
    flooder.close()


class Watch:
    """The server's memory, and how long others wait, since the `with` block began."""

    def __init__(self, server, client):
        self.pid, self._client = server.pid, client

    def __enter__(self):
        self.before_nbytes = self.peak_nbytes = resident_nbytes(self.pid)
        return self

    def look(self):
        started_s = time.monotonic()
        self._client.size("replay")
        assert time.monotonic() - started_s < 10.0
        self.peak_nbytes = max(self.peak_nbytes, resident_nbytes(self.pid))

    def __exit__(self, *_):
        self.look()

    @property
    def grown_nbytes(self):
        return self.peak_nbytes - self.before_nbytes


# ---- who never reads -----------------------------------------------------------------------------------------


def test_a_learner_that_is_stopped_with_all_its_credits_given_costs_its_batches_and_no_more(
    server, filled, children, pipe, receive
):
    batch_size, prefetch = 4096, 64
    batch_nbytes = 24 * (batch_size + 4 + batch_size // 16)
    here, there = pipe()
    with Watch(server, filled) as watch:
        address = server.address
        pid = children.start("learner", child_misuse.give_credits_and_stop, address, there, batch_size, prefetch)
        assert receive(here, children) == "asked"
        os.kill(pid, signal.SIGSTOP)
        add_steps(filled, 3000)
        watch.look()
        assert filled.info()["tables"]["replay"]["samples"] == prefetch * batch_size
    assert watch.grown_nbytes < 2 * prefetch * batch_nbytes + 4 * MIB
    os.kill(pid, signal.SIGCONT)
    here.send("go on")
    assert receive(here, children) == "sampled"
    assert filled.info()["num_undelivered"] == 0


def test_a_learner_that_goes_on_asking_and_never_reads_is_left_a_thousand_messages(server, filled, flooder, eventually):
    batch_size, num_samples = 1024, filled.info()["tables"]["replay"]["samples"]
    flooder.ask(messages.OpenSampler(CHANNEL, "replay", batch_size))
    with Watch(server, filled) as watch:
        for _ in range(150):
            flooder.send(Credit(flooder.epoch, 64, 0, NOTHING, NOTHING, NO_ERRORS).encode())
        eventually(lambda: filled.info()["tables"]["replay"]["samples"] == num_samples + 150 * 64 * batch_size)
        watch.look()
    assert filled.info()["num_undelivered"] > 2000  # of 3,200, with three batches each
    assert 1000 * 24 * 3 * batch_size / 2 < watch.grown_nbytes < 1.5 * 1100 * 24 * MOST_DRAWS


def test_an_actor_that_never_reads_its_grants_costs_no_more_than_a_thousand_of_them(
    server, filled, flooder, eventually
):
    flooder.ask(messages.OpenWriter(CHANNEL, "replay", 1, 1))
    before = filled.info()["num_undelivered"]
    with Watch(server, filled) as watch:
        for sequence in range(1, 5001):
            flooder.send(Commit(flooder.epoch, 0, sequence, 0, 0, None, []).encode())
        eventually(lambda: filled.info()["num_undelivered"] - before > 3000)
        watch.look()
    assert watch.grown_nbytes < 4 * MIB


def test_a_client_that_asks_and_never_reads_the_answers_costs_no_more_than_a_thousand_of_them(
    server, filled, flooder, eventually
):
    reply_nbytes = len(messages.encode_control(messages.ReplyEnvelope(1, 1, messages.Value(filled.info()))))
    before = filled.info()["num_undelivered"]
    with Watch(server, filled) as watch:
        for _ in range(5000):
            flooder.ask(messages.GetInfo())
        eventually(lambda: filled.info()["num_undelivered"] - before > 3000)
        watch.look()
    assert watch.grown_nbytes < 2 * 1100 * reply_nbytes + 4 * MIB


# ---- who sends too much --------------------------------------------------------------------------------------


def test_the_largest_messages_wait_with_their_sender_while_the_server_is_busy(
    server, filled, connect, flooder, eventually
):
    busy = Flooder(connect(server))
    busy.ask(messages.OpenWriter(CHANNEL, "replay", 1, 1))
    episodes = [Episode(0, 1.0, 1)] * 50_000  # a quarter of a second of its time
    for sequence in range(1, 5):
        busy.send(Commit(busy.epoch, 0, sequence, 0, 0, None, episodes).encode())
    largest = bytes((frames.COMMIT,)) + bytes(frames.MAX_MESSAGE_NBYTES - 1)
    before, peak_nbytes = filled.info()["num_refused"], 0
    with Watch(server, filled) as watch:
        for _ in range(40):
            flooder.send(largest)
            peak_nbytes = max(peak_nbytes, resident_nbytes(server.pid))
        eventually(lambda: filled.info()["num_refused"] == before + 40)
    assert peak_nbytes - watch.before_nbytes < (16 + 6) * frames.MAX_MESSAGE_NBYTES
    busy.close()


def test_a_message_beyond_the_limit_ends_the_connection_that_it_comes_on(server, filled, flooder):
    num_messages = filled.info()["num_messages"]
    with Watch(server, filled) as watch:
        for _ in range(3):
            flooder.send(bytes(frames.MAX_MESSAGE_NBYTES + 1))
        watch.look()
    assert filled.info()["num_messages"] == num_messages + 3, "our own: two sizes and this one"
    assert watch.grown_nbytes < 4 * MIB


def test_a_message_in_parts_is_refused(filled, flooder, eventually):
    before = filled.info()["num_refused"]
    frame = messages.encode_control(messages.Envelope(1, flooder.epoch, messages.Clear("replay")))
    flooder.send(frame, b"")
    flooder.send(*[frame] * 1000)
    eventually(lambda: filled.info()["num_refused"] == before + 2)
    assert filled.size("replay") == 100


def test_writers_opened_by_the_hundred_are_refused_beyond_the_limit_and_go_with_their_process(
    server, filled, flooder, eventually
):
    before = filled.info()
    with Watch(server, filled) as watch:
        for number in range(2000):
            flooder.ask(messages.OpenWriter(number, "replay", 1, 1))
        eventually(lambda: filled.info()["num_refused"] == before["num_refused"] + 2000 - 256)
    after = filled.info()
    assert "a client can have 256 writers and samplers" in after["last_refusal"]
    assert watch.grown_nbytes < 4 * MIB
    assert after["tables"]["replay"]["reserved_rows"] == 200, "all that there are"
    for number in range(256):
        flooder.ask(messages.CloseChannel(number))
    held = before["tables"]["replay"]["reserved_rows"]  # by flooders before: their process lives
    eventually(lambda: filled.info()["tables"]["replay"]["reserved_rows"] == held)
