"""A server is killed and another one started at its address: what clients notice, and what goes on."""

import contextlib
import gc
import math
import os
import re
import signal
import socket
import threading
import time
from types import SimpleNamespace

import child_processes as child
import numpy as np
import pytest
import torch
import zmq
from episode_envs import committed_leaves

import rl_buffer as rb
from rl_buffer import messages
from rl_buffer.connection import Connection
from rl_buffer.frames import Commit

pytestmark = pytest.mark.timeout(120)

DEADLINE_S = 30.0  # of every call here: only one that did not notice the end of its server reaches it
AT_ONCE_S = 15.0  # on a busy machine; the calls' own deadlines are longer
GAMMA = 0.5
CHUNK = 8
LIMIT = 21  # not a multiple of CHUNK
SPEC = rb.TransitionSpec(obs=rb.Field((2,), "int64"), action=rb.Field((), "int64"))
ROLLOUT_SPEC = rb.TransitionSpec(obs=rb.Field((3,)), action=rb.Field((), "int64"))
T, E = 4, 2
TABLES = {
    "n1": rb.ReplayTable(SPEC, capacity=256, gamma=GAMMA),
    "n3": rb.ReplayTable(SPEC, capacity=256, n_step=3, gamma=GAMMA),
    "prioritized": rb.ReplayTable(SPEC, capacity=64, sampler=rb.Prioritized(alpha=1.0, epsilon=1e-9), seed=0),
    # Takes LIMIT transitions, and one more for each that is sampled.
    "limited": rb.ReplayTable(
        SPEC, capacity=256, rate_limiter=rb.SampleToInsertRatio(1.0, min_size_to_sample=8, error_buffer=LIMIT - 8.0)
    ),
    "rollout": rb.RolloutTable(ROLLOUT_SPEC, T, E, num_fragments=6, gamma=0.9, gae_lambda=0.8),
}


@pytest.fixture
def server(tmp_path):
    with rb.BufferServer(TABLES, f"ipc://{tmp_path}/server") as server:
        yield server


@pytest.fixture
def client(server, connect):
    return connect(server)


def kill(server):
    """SIGKILL, and wait until the process is gone; a stopped one dies as well."""
    os.kill(server.pid, signal.SIGKILL)
    wait_for_end(server)


def wait_for_end(server):
    os.waitid(os.P_PID, server.pid, os.WEXITED | os.WNOWAIT)


def restart(server):
    kill(server)
    server.start()


@contextlib.contextmanager
def stopped(server, *writers):
    """While the server does not run, nothing that these writers send is acknowledged; at the end it is killed."""
    for writer in writers:  # or it would be stopped before they have any
        assert writer._outbox.reserve(2 * writer._chunk_steps, time.monotonic() + DEADLINE_S)
    os.kill(server.pid, signal.SIGSTOP)
    os.waitid(os.P_PID, server.pid, os.WSTOPPED | os.WNOWAIT)
    yield
    kill(server)


def add(writer, numbers):
    """Steps whose every field follows from a number; each fifth ends an episode."""
    for number in numbers:
        writer.add([number, -number], number, float(number), number % 5 == 4, [number + 1, -number - 1])


def numbers_in(client, table):
    """The numbers of all rows in a table that one writer filled for the first time, in the order of their commits."""
    leaves = committed_leaves(client, table)
    numbers = leaves["actions"]
    assert (leaves["observations"] == numbers[:, None] * [1, -1]).all()
    return numbers.tolist()


def table_info(client, table):
    return client.info()["tables"][table]


def add_until_no_step_can_be_staged(writer, start, is_expected=lambda: True):
    """Steps `start`, `start` + 1, ...; return the number of the first that was not added."""
    timeout_s, writer.timeout_s = writer.timeout_s, 0.05
    number = start
    while True:
        try:
            add(writer, [number])
            number += 1
        except rb.DeadlineExceeded:
            if is_expected():
                break
    writer.timeout_s = timeout_s
    return number


# ---- every call notices --------------------------------------------------------------------------------------


def for_ever(call):
    def run():
        while True:
            call()

    return run


def test_every_waiting_call_ends_with_server_lost_when_the_server_is_killed(server, connect, eventually):
    # All of them now: who only connects when the server is killed waits for the next one, as he should.
    names = "add begin clear close commit first flush info look n p sample size stats take u update_priorities"
    clients = {name: connect(server, name=name) for name in names.split()}
    clients["first"].publish_parameters({"w": np.zeros(2)})
    prioritized = clients["update_priorities"].writer("prioritized", num_envs=1)
    add(prioritized, range(8))
    prioritized.close()
    sampler = clients["update_priorities"].sampler("prioritized", 4)
    batch = sampler.sample()
    writers = {
        name: clients[name].writer("limited", num_envs=1, chunk_size=CHUNK) for name in ("add", "flush", "close")
    }
    rollout_writers = {name: clients[name].rollout_writer("rollout", autoreset=None) for name in ("begin", "commit")}
    reader = clients["take"].rollouts("rollout")
    waiting = clients["sample"].sampler("n1", 4)

    def finish(name):
        add(writers[name], range(1000, 1000 + CHUNK))
        getattr(writers[name], name)()

    def write_fragments(name):
        zeros = [0.0] * E
        while True:
            rollout_writers[name].begin()
            for _ in range(T):
                rollout_writers[name].add(np.zeros((E, 3)), [0] * E, zeros, zeros, zeros, zeros)
            rollout_writers[name].commit(zeros)

    calls = {
        "add": for_ever(lambda: add(writers["add"], range(100))),
        "flush": lambda: finish("flush"),
        "close": lambda: finish("close"),
        "sample": waiting.sample,
        "update_priorities": for_ever(lambda: sampler.update_priorities(batch, np.ones(4))),
        "begin": lambda: write_fragments("begin"),
        "take": lambda: reader.take(6, timeout_s=DEADLINE_S),
        "newer parameters": lambda: clients["n"].parameters("policy", newer_than=1, timeout_s=DEADLINE_S),
        "unknown parameters": lambda: clients["u"].parameters("none", timeout_s=DEADLINE_S),
        "looking at parameters": for_ever(clients["look"].parameters),
        "publish_parameters": for_ever(lambda: clients["p"].publish_parameters({"v": np.zeros(2)}, "other")),
        "info": for_ever(clients["info"].info),
        "stats": for_ever(clients["stats"].stats),
        "size": for_ever(lambda: clients["size"].size("n1")),
        "clear": for_ever(lambda: clients["clear"].clear("n1")),
    }
    raised = {}

    def run(name):
        try:
            calls[name]()
        except Exception as error:
            raised[name] = error

    threads = [threading.Thread(target=run, args=(name,), daemon=True) for name in calls]
    for thread in threads:
        thread.start()
        # The first fills the limited table, so that the next two have to wait for it.
        eventually(lambda: table_info(clients["first"], "limited")["waits"])
    eventually(lambda: table_info(clients["first"], "n1")["waits"] and table_info(clients["first"], "rollout")["waits"])
    assert not raised
    os.kill(server.pid, signal.SIGKILL)
    killed_s = time.monotonic()
    for thread in threads:
        thread.join(AT_ONCE_S)
    assert time.monotonic() - killed_s < AT_ONCE_S
    assert {name: type(error) for name, error in raised.items()} == dict.fromkeys(calls, rb.ServerLost)
    for error in raised.values():
        assert f"the server at {server.address} ended; start one there and call client.reconnect()" in str(error)


def test_every_call_after_the_server_was_killed_ends_with_server_lost_at_once(server, client):
    client.publish_parameters({"w": np.zeros(2)})
    writer = client.writer("n1", num_envs=1, chunk_size=CHUNK)
    staged = client.writer("prioritized", num_envs=1, chunk_size=CHUNK)
    add(staged, range(CHUNK - 1))
    staged.flush()
    sampler = client.sampler("prioritized", 4, prefetch=0)
    batch = sampler.sample()
    rollout_writer, reader = client.rollout_writer("rollout", autoreset=None), client.rollouts("rollout")
    full = full_rollout_writer(client)
    zeros = [0.0] * E
    full.commit(zeros)
    rollouts = reader.take(1)
    fill(full)
    kill(server)
    calls = {
        "add": for_ever(lambda: add(writer, [0])),
        "extend": lambda: writer.extend(batch),
        "flush": staged.flush,
        "close": staged.close,
        "sample": sampler.sample,
        "update_priorities": lambda: sampler.update_priorities(batch, np.ones(4)),
        "begin": rollout_writer.begin,
        "commit": lambda: full.commit(zeros),
        "take": reader.take,
        "take_all": lambda: reader.take_all(DEADLINE_S),
        "release": rollouts.release,
        "parameters": client.parameters,
        "unknown parameters": lambda: client.parameters("none", timeout_s=DEADLINE_S),
        "publish_parameters": lambda: client.publish_parameters({"w": np.zeros(2)}),
        "info": client.info,
        "stats": client.stats,
        "size": lambda: client.size("n1"),
        "clear": lambda: client.clear("n1"),
        "writer": lambda: client.writer("n1", num_envs=1),
        "sampler": lambda: client.sampler("n1", 4),
        "sampler.close": sampler.close,
        "rollout_writer.close": full.close,
        "reader.close": reader.close,
    }
    started_s = time.monotonic()
    for name, call in calls.items():
        with pytest.raises(rb.ServerLost):
            pytest.fail(f"{name} returned {call()}")
    assert time.monotonic() - started_s < AT_ONCE_S


def test_a_call_that_waits_for_a_stopped_server_to_read_ends_when_that_is_killed(server, client, eventually):
    add(writer := client.writer("prioritized", num_envs=1), range(8))
    writer.close()
    sampler = client.sampler("prioritized", 4, prefetch=0)
    batch, sent, raised = sampler.sample(), threading.Event(), []

    def flood():
        try:
            while True:
                sampler.update_priorities(batch, np.ones(4))
                sent.set()
        except rb.RLBufferError as error:
            raised.append(error)

    def is_stuck():
        sent.clear()
        return not sent.wait(0.3)

    with stopped(server):
        thread = threading.Thread(target=flood, daemon=True)
        thread.start()
        eventually(is_stuck)
        assert not raised
    killed_s = time.monotonic()
    thread.join(AT_ONCE_S)
    assert time.monotonic() - killed_s < AT_ONCE_S
    assert [type(error) for error in raised] == [rb.ServerLost]


def fill(writer, numbers=range(T)):
    for number in numbers:
        writer.add(np.full((E, 3), number), [number] * E, [1.0] * E, [False] * E, [0.5 * number] * E, [-1.0] * E)


def full_rollout_writer(client, **options):
    writer = client.rollout_writer("rollout", autoreset=None, **options)
    fill(writer)
    assert writer.is_full
    return writer


# ---- attaching again -----------------------------------------------------------------------------------------


def test_reconnecting_to_a_server_that_lives_changes_nothing(server, client):
    writer = client.writer("n1", num_envs=1, chunk_size=CHUNK)
    sampler = client.sampler("n1", 4)
    add(writer, range(CHUNK + 3))
    epoch = client.info()["epoch"]
    channels = writer._channel, sampler._channel
    assert client.reconnect() is False
    assert (writer._channel, sampler._channel) == channels
    add(writer, range(CHUNK + 3, 20))
    writer.flush()
    assert numbers_in(client, "n1") == list(range(20))
    info = client.info()
    assert (info["epoch"], len(info["clients"]), info["num_refused"]) == (epoch, 1, 0)


def test_nobody_at_the_address_is_a_deadline_and_reconnect_can_be_called_again(server, client):
    writer = client.writer("n1", num_envs=1, chunk_size=CHUNK)
    with stopped(server, writer):
        add(writer, range(2 * CHUNK))
    for _ in range(2):
        with pytest.raises(rb.DeadlineExceeded, match=f"no server came up at {server.address} within 0.1 s"):
            client.reconnect(timeout_s=0.1)
        with pytest.raises(rb.ServerLost):
            add(writer, [2 * CHUNK])
        with pytest.raises(rb.ServerLost):
            client.info()
    server.start()
    assert client.reconnect() is True
    assert client.reconnect() is False
    add(writer, [2 * CHUNK])
    writer.flush()
    assert numbers_in(client, "n1") == list(range(2 * CHUNK + 1))


def test_reconnect_waits_for_a_server_that_is_not_up_yet(server, client):
    kill(server)
    starting = threading.Thread(target=server.start)
    starting.start()
    assert client.reconnect(timeout_s=DEADLINE_S) is True
    starting.join(DEADLINE_S)
    assert client.size("n1") == 0


@pytest.mark.parametrize(
    "failpoint",
    ["server.greeted", "server.welcomed", "server.opened:1", "server.opened:3"],
)
def test_a_server_that_is_lost_again_during_reconnect_costs_nothing(server, client, monkeypatch, failpoint):
    writers = [client.writer(table, num_envs=1, chunk_size=CHUNK) for table in ("n1", "n3")]
    sampler = client.sampler("n1", 4)
    rollout_writer = full_rollout_writer(client)
    for writer in writers:
        add(writer, range(5))
        writer.flush()
    with stopped(server, *writers):
        for writer in writers:
            add(writer, range(5, 2 * CHUNK))
    monkeypatch.setenv("RL_BUFFER_FAILPOINT", failpoint)
    server.start()
    with pytest.raises(rb.ServerLost):
        client.reconnect()
    wait_for_end(server)
    with pytest.raises(rb.DeadlineExceeded):
        client.reconnect(timeout_s=0.0)
    monkeypatch.delenv("RL_BUFFER_FAILPOINT")
    server.start()
    assert client.reconnect() is True
    for writer in writers:
        add(writer, range(2 * CHUNK, 20))
        writer.close()
    assert numbers_in(client, "n1") == list(range(5, 20))
    assert numbers_in(client, "n3") == list(range(5, 20))
    assert sampler.sample().actions.min() >= 5
    rollout_writer.commit([0.0] * E)
    assert client.rollouts("rollout").take(1).num_transitions == T * E
    assert client.info()["num_refused"] == 0


def test_what_was_not_opened_again_before_a_deadline_is_opened_by_the_next_call(server, client, monkeypatch):
    writers = {table: client.writer(table, num_envs=1, chunk_size=CHUNK) for table in ("n1", "n3", "prioritized")}
    with stopped(server, *writers.values()):
        for writer in writers.values():
            add(writer, range(2 * CHUNK))
    monkeypatch.setenv("RL_BUFFER_FAILPOINT", "server.opened:2:SIGSTOP")  # the writer does not hear that it is open
    server.start()
    client.timeout_s = 2.0
    with pytest.raises(rb.DeadlineExceeded, match="OpenWriter"):
        client.reconnect(timeout_s=DEADLINE_S)
    os.waitid(os.P_PID, server.pid, os.WSTOPPED | os.WNOWAIT)
    os.kill(server.pid, signal.SIGCONT)
    client.timeout_s = DEADLINE_S
    assert client.reconnect() is True
    assert client.reconnect() is False
    for table, writer in writers.items():
        add(writer, range(2 * CHUNK, 20))
        writer.flush()
        assert numbers_in(client, table) == list(range(20))
    (session,) = client.info()["clients"]
    assert session["writers"] == 3


def test_other_threads_may_ask_all_the_while(server, client):
    epochs, unexpected, ends = set(), [], threading.Event()

    def ask():
        while not ends.is_set():
            try:
                epochs.add(client.info()["epoch"])
                client.parameters("none")
            except rb.ServerLost:
                pass
            except Exception as error:
                unexpected.append(error)

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(2):
            restart(server)
            assert client.reconnect() is True
            client._connection._lines.attach.shutdown(socket.SHUT_RDWR)
            assert client.reconnect() is True
            epochs.add(client.info()["epoch"])
    finally:
        ends.set()
        for thread in threads:
            thread.join(DEADLINE_S)
    assert not unexpected
    assert len(epochs) in (2, 3)


OTHER_TABLES = {
    "capacity": {**TABLES, "n1": rb.ReplayTable(SPEC, capacity=255, gamma=GAMMA)},
    "spec": {**TABLES, "n1": rb.ReplayTable(ROLLOUT_SPEC, capacity=256, gamma=GAMMA)},
    "no table 'n3'": {name: table for name, table in TABLES.items() if name != "n3"},
    "num_steps": {**TABLES, "rollout": rb.RolloutTable(ROLLOUT_SPEC, T + 1, E, num_fragments=6)},
}


def test_other_tables_are_refused_by_name_and_the_right_ones_can_still_come(server, client):
    writer = client.writer("n1", num_envs=1, chunk_size=CHUNK)
    with stopped(server, writer):
        add(writer, range(2 * CHUNK))
    for difference in (*OTHER_TABLES, "statistics"):
        options = {"stats_window": 7} if difference == "statistics" else {}
        with rb.BufferServer(OTHER_TABLES.get(difference, TABLES), server.address, **options) as other:
            with pytest.raises(rb.InvalidInput, match=f"{difference}.*; start it with the tables of the one before"):
                client.reconnect()
            with pytest.raises(rb.ServerLost):
                client.info()
            with rb.connect(other.address) as someone:
                assert table_info(someone, "n1")["inserts"] == 0
                assert len(someone.info()["clients"]) == 1
    server.start()
    assert client.reconnect() is True
    writer.flush()
    assert numbers_in(client, "n1") == list(range(2 * CHUNK))


def test_a_table_more_is_none_of_the_clients_business(server, client):
    kill(server)
    with rb.BufferServer({**TABLES, "more": TABLES["n1"]}, server.address):
        assert client.reconnect() is True
        assert "more" in client.tables


def test_only_what_somebody_still_has_open_is_opened_again(server, client):
    kept, closed = client.writer("n1", num_envs=1), client.writer("n1", num_envs=1)
    samplers = [client.sampler("n1", 4) for _ in range(3)]
    samplers[0].close()
    closed.close()
    client.writer("n1", num_envs=1)  # dropped
    del samplers[2]
    restart(server)
    client.reconnect()
    (session,) = client.info()["clients"]
    assert (session["writers"], session["samplers"]) == (1, 1)
    with pytest.raises(rb.Closed):
        closed.flush()
    kept.flush()


def test_a_closed_client_does_not_come_back(server, connect):
    clients = connect(server), connect(server)
    kill(server)
    with pytest.raises(rb.DeadlineExceeded):
        clients[1].reconnect(timeout_s=0.0)
    for client in clients:
        client.close()
        with pytest.raises(rb.Closed):
            client.reconnect()


# ---- writers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("table", "chunk_size"), [("n1", CHUNK), ("n3", 1), ("n3", CHUNK)])
def test_a_writer_sends_what_was_not_acknowledged_again_once_and_in_order(server, client, table, chunk_size):
    writer = client.writer(table, num_envs=1, chunk_size=chunk_size)
    add(writer, range(13))
    writer.flush()  # all that is complete is acknowledged, and lost with the server
    num_acknowledged = len(numbers_in(client, table))
    with stopped(server, writer):
        added = add_until_no_step_can_be_staged(writer, 13)  # two commits are under way, and a third is complete
    assert added >= num_acknowledged + 3 * chunk_size
    with pytest.raises(rb.ServerLost):
        add(writer, [added])
    server.start()
    assert client.reconnect() is True
    add(writer, range(added, 60))
    writer.close()
    assert numbers_in(client, table) == list(range(num_acknowledged, 60))
    if table == "n3":
        leaves, n = committed_leaves(client, table), np.arange(num_acknowledged, 60)
        # Windows of three steps that end with their episode, also those over which the server died.
        length = np.minimum(3, 5 - n % 5)
        assert (leaves["n_steps"] == length).all()
        assert leaves["rewards"].tolist() == [
            sum(GAMMA**k * (first + k) for k in range(steps)) for first, steps in zip(n, length, strict=True)
        ]
        assert (leaves["next_observations"][:, 0] == n + length).all()
    # Episodes 0 and 1 were acknowledged. Each of the others ends at a step 5 i + 4 and has the reward 25 i + 10.
    rewards = [25 * i + 10 for i in range(2, 12)]
    stats = client.stats()
    assert stats["train/num_episodes"] == len(rewards)
    assert stats["train/lifetime_rewards_mean"] == pytest.approx(np.mean(rewards))
    info = client.info()
    assert info["num_refused"] == 0
    assert info["tables"][table]["reserved_rows"] == 0


@pytest.mark.parametrize("chunk_size", [1, CHUNK])
def test_an_add_that_raises_server_lost_did_not_take_the_step(server, client, chunk_size):
    writer = client.writer("n3", num_envs=1, chunk_size=chunk_size)
    add(writer, range(3))
    writer.flush()  # step 0, whose window is complete
    kill(server)
    number, num_restarts = 3, 0
    while number < 50:
        try:
            add(writer, [number])
            number += 1
        except rb.ServerLost:
            num_restarts += 1
            server.start()
            client.reconnect()
    writer.close()
    assert num_restarts == 1
    assert numbers_in(client, "n3") == list(range(1, 50))


def test_a_writer_whose_commits_the_limiter_holds_back_sends_them_to_a_limiter_that_does_too(
    server, client, eventually
):
    writer = client.writer("limited", num_envs=1, chunk_size=CHUNK)
    added = add_until_no_step_can_be_staged(writer, 0, lambda: table_info(client, "limited")["inserts"] == LIMIT)
    restart(server)
    client.reconnect()
    # Two commits, which may have become longer while the writer waited for rows; the next was published in part.
    num_acknowledged = writer.num_acknowledged
    assert LIMIT - CHUNK < num_acknowledged < LIMIT

    def all_that_may_pass_has_passed():
        with pytest.raises(rb.DeadlineExceeded):
            writer.flush(timeout_s=0.2)
        return table_info(client, "limited")["inserts"] == LIMIT

    eventually(all_that_may_pass_has_passed)
    assert numbers_in(client, "limited") == list(range(num_acknowledged, num_acknowledged + LIMIT))
    sample(client, added - num_acknowledged - LIMIT)
    writer.flush()
    assert numbers_in(client, "limited") == list(range(num_acknowledged, added))


def sample(client, num_samples):
    """Let the limiter take so many more."""
    with client.sampler("limited", 8, prefetch=0) as sampler:
        for _ in range(math.ceil(num_samples / 8)):
            sampler.sample()


def test_initial_priorities_are_sent_again_with_their_rows(server, client):
    writer = client.writer("prioritized", num_envs=1, chunk_size=4)
    with stopped(server, writer):
        for number in range(8):
            writer.add([number, -number], number, 0.0, False, [0, 0], priority=number + 1)
    server.start()
    client.reconnect()
    writer.flush()
    batch = client.sampler("prioritized", 256, beta=1.0, prefetch=0).sample()
    # Weight is 1 / mass over the largest: mass is the number + 1.
    largest = float(((batch.actions + 1) * batch.weights).max())
    assert torch.allclose((batch.actions + 1) * batch.weights, torch.tensor(largest))


def test_offline_data_goes_in_once_and_the_error_says_how_far_it_came(server, client):
    writer = client.writer("n1", num_envs=1, chunk_size=CHUNK)
    most = writer._history.max_items
    numbers = np.arange(10 * most)
    data = {
        "observations": numbers[:, None] * [1, -1],
        "actions": numbers,
        "rewards": numbers,
        "next_observations": numbers[:, None] * [1, -1],
        "terminateds": np.zeros(len(numbers)),
    }
    writer.timeout_s = 0.2
    with (
        stopped(server, writer),
        pytest.raises(rb.DeadlineExceeded, match=rf"the first {2 * most} of {10 * most} items"),
    ):
        writer.extend(data)
    with pytest.raises(rb.ServerLost):
        writer.extend(data)
    server.start()
    client.reconnect()
    writer.timeout_s = DEADLINE_S
    writer.extend({key: values[2 * most :] for key, values in data.items()})
    writer.flush()
    assert numbers_in(client, "n1") == numbers.tolist()


def test_a_second_restart_before_everything_was_sent_again_loses_nothing(server, client):
    writer = client.writer("limited", num_envs=1, chunk_size=CHUNK)
    with stopped(server, writer):
        add(writer, range(2 * CHUNK))  # two commits, and the third in the making
        add(writer, range(2 * CHUNK, 2 * CHUNK + 3))
    server.start()
    other = rb.connect(server.address, DEADLINE_S)
    others = other.writer("limited", num_envs=1, chunk_size=4)
    add(others, range(100, 100 + LIMIT - 1))  # room for one row of two commits
    others.flush()
    client.reconnect()
    with pytest.raises(rb.DeadlineExceeded):
        writer.flush(timeout_s=0.2)
    other.close()
    for _ in range(2):
        restart(server)
        client.reconnect()
    writer.flush()
    assert numbers_in(client, "limited") == list(range(2 * CHUNK + 3))


def test_a_served_buffer_goes_on(server, client):
    buffer = client.replay_buffer("n1")
    add(buffer, range(6))
    assert len(buffer) == 6
    batch = buffer.get(4)
    with stopped(server):
        add(buffer, range(6, 9))
    with pytest.raises(rb.ServerLost):
        buffer.get(4)
    server.start()
    client.reconnect()
    add(buffer, range(9, 12))
    assert len(buffer) == 6
    assert set(buffer.get(64).actions.tolist()) == set(range(6, 12))
    assert batch.actions.max() < 6  # the one of before is as it was


# ---- messages of an earlier epoch ----------------------------------------------------------------------------


def test_messages_of_an_earlier_epoch_are_refused_and_counted(server, connect, eventually):
    old, client = connect(server), connect(server)
    writer, old_writer = (c.writer("n1", num_envs=1, chunk_size=CHUNK) for c in (client, old))
    add(writer, range(3))
    writer.flush()
    add(old_writer, range(3))
    old_epoch = old._connection.epoch
    restart(server)
    client.reconnect()
    commit = Commit(old_epoch, 3, 1, 0, 3, None, []).encode()
    ask = messages.encode_control(messages.Envelope(1, old_epoch, messages.Clear("n1")))

    def refused():
        return client.info()["num_refused"]

    # From a channel of the earlier epoch, which zmq connects to whoever has the address.
    old_writer._channel._socket.send(commit)
    eventually(lambda: refused() == 1)
    # From a socket that was none, and then from a writer of this epoch.
    with zmq.Context() as context, context.socket(zmq.DEALER) as impostor:
        impostor.setsockopt(zmq.LINGER, 0)
        impostor.setsockopt(zmq.IDENTITY, old._connection.token + (999).to_bytes(4, "little"))
        impostor.connect(old._connection.address.control_endpoint)
        for number, frame in enumerate((commit, ask), start=2):
            impostor.send(frame)
            eventually(lambda number=number: refused() == number)
    writer._channel.send(commit)
    eventually(lambda: refused() == 4)
    assert f"message of epoch {old_epoch:016x}" in client.info()["last_refusal"]
    writer._channel._socket.poll(DEADLINE_S * 1000)
    with pytest.raises(rb.RequestRefused):
        add(writer, range(1000))
    assert table_info(client, "n1")["inserts"] == 0


def test_priorities_for_a_batch_of_an_earlier_epoch_are_dropped_and_counted(server, client):
    writer = client.writer("prioritized", num_envs=1, chunk_size=4)
    sampler = client.sampler("prioritized", 16, prefetch=0)

    def fill():
        for number in range(64):  # the same rows for the same numbers, the table full
            writer.add([number, -number], number, 0.0, False, [0, 0], priority=1.0)
        writer.flush()

    fill()
    batch = sampler.sample()
    restart(server)
    client.reconnect()
    fill()
    sampler.update_priorities(batch, np.full(16, 1e6))
    assert table_info(client, "prioritized")["stale_updates"] == 16
    assert (sampler.sample(beta=1.0).weights == 1.0).all()  # all masses are as they were
    fresh = sampler.sample()
    sampler.update_priorities(fresh, np.full(16, 2.0))
    assert table_info(client, "prioritized")["stale_updates"] == 16


# ---- parameters ----------------------------------------------------------------------------------------------


def test_versions_of_parameters_begin_anew_and_one_of_before_counts_as_none(server, connect):
    learner, actor = connect(server), connect(server)
    for number in range(3):
        learner.publish_parameters({"w": np.full(4, number)})
    assert actor.parameters()[0] == 3
    restart(server)
    for client in (learner, actor):
        with pytest.raises(rb.ServerLost):
            client.parameters(newer_than=3)
        client.reconnect()
        assert client.parameters(newer_than=3) == (3, None)
    assert learner.publish_parameters({"other": np.full((2, 2), 9.0)}) == 1  # another network, while we are at it
    version, parameters = actor.parameters(newer_than=3, timeout_s=DEADLINE_S)
    assert version == 1
    assert parameters["other"].tolist() == [[9.0, 9.0], [9.0, 9.0]]
    assert actor.parameters(newer_than=1) == (1, None)
    assert actor.parameters(newer_than=3)[0] == 1  # of a thread that has not looked since
    for _ in range(4):
        learner.publish_parameters({"other": np.zeros((2, 2))})
    assert actor.parameters(newer_than=1)[0] == 5
    assert actor.parameters(newer_than=3)[0] == 5
    assert actor.parameters(newer_than=5, timeout_s=0.01) == (5, None)


# ---- rollouts ------------------------------------------------------------------------------------------------


def expected_rollout(numbers):
    buffer = rb.RolloutBuffer(T, E, 3, (), action_dtype="int64", gamma=0.9, gae_lambda=0.8, autoreset=None)
    fill(buffer, numbers)
    buffer.compute_returns_and_advantages([2.0] * E)
    return next(buffer.get(shuffle=False))


def assert_is_rollout(rollouts, numbers):
    batch, expected = next(rollouts.get(shuffle=False)), expected_rollout(numbers)
    for name in ("observations", "actions", "values", "log_probs", "advantages", "returns"):
        assert torch.equal(getattr(batch, name), getattr(expected, name)), name


def test_a_fragment_that_was_not_acknowledged_is_sent_again_and_the_reader_gets_it(server, client):
    writer = client.rollout_writer("rollout", autoreset=None, number=7)
    reader = client.rollouts("rollout")
    client.publish_parameters({"w": np.zeros(2)})
    fill(writer, range(4))
    writer.commit([2.0] * E)
    writer.begin()
    fill(writer, range(4, 8))
    taken = reader.take(1)
    with stopped(server):
        writer.commit([2.0] * E)
    with pytest.raises(rb.ServerLost):
        writer.begin()
    server.start()
    client.reconnect()
    taken.release()  # it is the lost server's: nothing to do
    assert_is_rollout(taken, range(4))
    fill(writer, range(8, 12))
    writer.commit([2.0] * E)
    for numbers in (range(4, 8), range(8, 12)):
        rollouts = reader.take(1, timeout_s=DEADLINE_S)
        assert_is_rollout(rollouts, numbers)
        assert rollouts.writers.tolist() == [7]
        assert rollouts.versions.tolist() == [[0]] * T  # version 1 of before is none of this server's
        rollouts.release()
        taken.release()
    info = client.info()
    assert info["num_refused"] == 0
    assert (info["tables"]["rollout"]["inserts"], info["tables"]["rollout"]["reading"]) == (2, 0)


@pytest.mark.parametrize("num_written", [1, T])
def test_a_fragment_in_work_goes_on(server, client, num_written):
    client.publish_parameters({"w": np.zeros(2)})
    writer, reader = client.rollout_writer("rollout", autoreset=None), client.rollouts("rollout")
    fill(writer, range(10, 10 + num_written))
    restart(server)
    client.reconnect()
    assert writer.is_full == (num_written == T)
    client.publish_parameters({"w": np.zeros(2)})
    client.publish_parameters({"w": np.zeros(2)})
    fill(writer, range(10 + num_written, 10 + T))
    writer.commit([2.0] * E)
    rollouts = reader.take(1, timeout_s=DEADLINE_S)
    assert_is_rollout(rollouts, range(10, 10 + T))
    assert rollouts.versions[:, 0].tolist() == [0] * num_written + [2] * (T - num_written)


def test_a_commit_that_finds_the_server_lost_sent_nothing_and_can_be_made_again(server, client):
    writer, reader = client.rollout_writer("rollout", autoreset=None), client.rollouts("rollout")
    fill(writer, range(4))
    kill(server)
    for _ in range(2):
        with pytest.raises(rb.ServerLost):
            writer.commit([2.0] * E)
    server.start()
    client.reconnect()
    writer.commit([2.0] * E)
    assert_is_rollout(reader.take(1), range(4))
    assert table_info(client, "rollout")["inserts"] == 1


def test_closing_a_rollout_writer_on_a_lost_server_keeps_it_open_until_its_commit_is_in(server, client):
    writer, reader = client.rollout_writer("rollout", autoreset=None), client.rollouts("rollout")
    fill(writer)
    with stopped(server):
        writer.commit([2.0] * E)
    with pytest.raises(rb.ServerLost):
        writer.close()
    server.start()
    client.reconnect()
    writer.close()
    assert_is_rollout(reader.take(1), range(T))
    with pytest.raises(rb.Closed):
        writer.begin()


# ---- what is left behind -------------------------------------------------------------------------------------


def mapped_segments():
    """Inodes of the servers' memory that this process has mapped, by name."""
    with open("/proc/self/maps") as maps:
        found = re.findall(r"(\d+) +/memfd:(rl_buffer:\S+)", maps.read())
    return {(name, inode) for inode, name in found}


@pytest.fixture
def no_garbage_collection():
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("no_garbage_collection")
def test_memory_of_the_lost_server_goes_away_at_once_and_batches_stay(server, connect):
    before = mapped_segments()
    client = connect(server)
    buffer = client.replay_buffer("prioritized")
    writer, reader = full_rollout_writer(client), client.rollouts("rollout")
    add(buffer, range(8))
    batch = buffer.get(8)
    actions = batch.actions.clone()
    writer.commit([0.0] * E)
    rollouts = reader.take(1)
    client.publish_parameters({"w": np.zeros(2)})
    client.parameters()
    of_the_first = mapped_segments() - before
    assert len(of_the_first) == 2 * len(TABLES) + 2
    restart(server)
    with contextlib.suppress(rb.ServerLost):
        client.info()
    client.reconnect()
    now = mapped_segments() - before
    assert not now & of_the_first
    assert len(now) == 2 * len(TABLES)
    assert torch.equal(batch.actions, actions)
    assert rollouts.num_transitions == T * E
    add(buffer, range(8, 16))
    buffer.get(8)
    writer.begin()


def num_descriptors():
    return len(os.listdir("/proc/self/fd"))


def test_restarts_leave_no_descriptors_and_no_sessions_behind(server, client):
    writer, sampler = client.writer("n1", num_envs=1), client.sampler("n1", 4)
    counts = []
    for _ in range(3):
        restart(server)
        client.reconnect()
        add(writer, range(10))
        writer.flush()
        sampler.sample()
        counts.append(num_descriptors())
        assert len(client.info()["clients"]) == 1
    assert len(set(counts)) == 1, counts


# ---- the connection alone is lost ----------------------------------------------------------------------------


def test_when_only_the_attach_connection_breaks_nothing_is_lost_or_counted_twice(server, client, connect, eventually):
    writer = client.writer("limited", num_envs=1, chunk_size=CHUNK)
    reader, rollout_writer = client.rollouts("rollout"), full_rollout_writer(client)
    rollout_writer.commit([2.0] * E)
    rollouts = reader.take(1)
    version = client.publish_parameters({"w": np.zeros(2)})
    observer = connect(server)
    added = add_until_no_step_can_be_staged(writer, 0, lambda: table_info(observer, "limited")["inserts"] == LIMIT)
    server_descriptors = len(os.listdir(f"/proc/{server.pid}/fd"))
    epoch = client._connection.epoch
    for _ in range(3):
        client._connection._lines.attach.shutdown(socket.SHUT_RDWR)
        assert client.reconnect() is True
        assert client._connection.epoch == epoch
        assert client.reconnect() is False
        with pytest.raises(rb.DeadlineExceeded):
            writer.flush(timeout_s=0.2)
        assert table_info(observer, "limited")["inserts"] == LIMIT
        assert len(observer.info()["clients"]) == 2
    rollouts.release()  # the fragment went back, and is handed out again
    assert_is_rollout(reader.take(1), range(T))
    assert client.parameters(newer_than=version) == (version, None)
    sample(observer, added - LIMIT)
    writer.flush()
    assert numbers_in(client, "limited") == list(range(added))
    assert observer.stats()["train/num_episodes"] == added // 5
    eventually(lambda: len(os.listdir(f"/proc/{server.pid}/fd")) <= server_descriptors)


def test_after_an_attempt_in_vain_nothing_is_written_into_rows_that_may_be_anothers(server, client):
    writer, rollout_writer = client.writer("n1", num_envs=1, chunk_size=CHUNK), full_rollout_writer(client)
    add(writer, range(CHUNK + 1))
    writer.flush()
    os.kill(server.pid, signal.SIGSTOP)
    os.waitid(os.P_PID, server.pid, os.WSTOPPED | os.WNOWAIT)
    client._connection._lines.attach.shutdown(socket.SHUT_RDWR)
    with pytest.raises(rb.DeadlineExceeded):
        client.reconnect(timeout_s=0.1)
    for call in (writer.flush, lambda: add(writer, [0]), lambda: fill(rollout_writer), client.info):
        with pytest.raises(rb.ServerLost):
            call()
    os.kill(server.pid, signal.SIGCONT)
    assert client.reconnect() is True
    add(writer, range(CHUNK + 1, 20))
    writer.flush()
    assert numbers_in(client, "n1") == list(range(20))
    rollout_writer.commit([2.0] * E)
    assert_is_rollout(client.rollouts("rollout").take(1), range(T))
    assert len(client.info()["clients"]) == 1


def test_nobody_frees_the_rows_of_another_process_by_its_token(server, client, children, pipe, receive, eventually):
    here, there = pipe()
    pid = children.start("holder", child.hold_rows_and_tell_token, server.address, there)
    token = receive(here, children)
    held = table_info(client, "n1")["reserved_rows"]
    assert held > 0
    thief = Connection(client._connection.address, "thief", DEADLINE_S, previous=SimpleNamespace(token=token))
    with contextlib.closing(thief):
        assert table_info(client, "n1")["reserved_rows"] == held
        assert len(client.info()["clients"]) == 3
    os.kill(pid, signal.SIGKILL)  # the server still sees that
    eventually(lambda: table_info(client, "n1")["reserved_rows"] == 0)
