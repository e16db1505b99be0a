"""What happens when processes die, stop, or are not there: nobody else is harmed, and no wait is endless."""

import contextlib
import os
import resource
import signal
import socket
import threading
import time
from pathlib import Path

import child_processes as child
import numpy as np
import pytest
from child_processes import NUMBERED_SPEC, numbered_row
from episode_envs import committed_leaves

import rl_buffer as rb

pytestmark = pytest.mark.timeout(90)

CAPACITY = 64
AT_ONCE_S = 15.0  # on a busy machine; deadlines that must not be waited for are DEADLINE_S of conftest, 60 s
TABLE = rb.ReplayTable(NUMBERED_SPEC, capacity=CAPACITY, headroom=128, sampler=rb.Prioritized(), seed=0)


def replay_info(client):
    return client.info()["tables"]["replay"]


def add_numbers(client, numbers):
    with client.writer("replay", num_envs=1, chunk_size=8) as writer:
        for number in numbers:
            writer.add(**numbered_row(number))


def add_for_ever(writer):
    while True:
        writer.add(**numbered_row(0))


def actions(client):
    return sorted(committed_leaves(client, "replay")["actions"].tolist())


@pytest.fixture(scope="module")
def shared_server():
    with rb.BufferServer({"replay": TABLE}) as server:
        yield server


@pytest.fixture
def client(shared_server, connect):
    """On a server that survives the test; with an empty table."""
    client = connect(shared_server)
    client.clear("replay")
    return client


@pytest.fixture
def address(shared_server):
    return shared_server.address


# ---- writers -------------------------------------------------------------------------------------------------


def test_a_writer_killed_half_way_harms_nobody(client, address, children, pipe, receive, eventually):
    add_numbers(client, range(20))
    here, there = pipe()
    pid = children.start("half", child.write_half, address, there)
    assert receive(here, children) == "half"
    held = replay_info(client)["reserved_rows"]
    assert held > 0
    os.kill(pid, signal.SIGKILL)
    eventually(lambda: replay_info(client)["reserved_rows"] == 0, timeout_s=1.0)
    assert client.size("replay") == 20
    assert len(client.info()["clients"]) == 1
    add_numbers(client, range(20, 20 + 3 * CAPACITY))  # over all rows, its own as well
    assert actions(client) == [7 * number for number in range(20 + 2 * CAPACITY, 20 + 3 * CAPACITY)]


def test_a_stopped_writer_blocks_nobody_and_its_commit_lands(client, address, children, pipe, receive, eventually):
    here, there = pipe()
    pid = children.start("half", child.write_half, address, there)
    assert receive(here, children) == "half"
    os.kill(pid, signal.SIGSTOP)
    held = replay_info(client)["reserved_rows"]
    last = 3 * (CAPACITY + 128)  # three laps over every row there is
    add_numbers(client, range(last))
    before = [7 * number for number in range(last - CAPACITY, last)]
    assert actions(client) == before
    assert replay_info(client)["reserved_rows"] == held
    os.kill(pid, signal.SIGCONT)
    here.send("go on")
    assert receive(here, children) == "done"
    assert actions(client) == before[8:] + [7 * number for number in range(1_000_000, 1_000_008)]
    leaves = committed_leaves(client, "replay")
    numbers = leaves["actions"] // 7
    assert (leaves["observations"] == numbers[:, None]).all()
    assert (leaves["next_observations"] == numbers[:, None] + 1).all()
    assert (leaves["extras/checksum"] == child.checksum(numbers)).all()
    eventually(lambda: replay_info(client)["reserved_rows"] == 0)


@pytest.mark.parametrize("close_socket", [True, False])
def test_rows_stay_with_a_process_that_lives_and_come_back_when_it_ends(
    client, address, children, pipe, receive, eventually, close_socket
):
    here, there = pipe()
    children.start("holder", lambda: child.hold_rows(address, there, close_socket=close_socket))
    assert receive(here, children) == "holding"

    def holder():
        return next(session for session in client.info()["clients"] if session["name"] == "holder")

    eventually(lambda: holder()["connected"] != close_socket)
    held = holder()["reserved_rows"]
    assert held > 0
    add_numbers(client, range(3 * CAPACITY))
    assert holder()["reserved_rows"] == held
    here.send("end")
    eventually(lambda: replay_info(client)["reserved_rows"] == 0, timeout_s=2.0)
    eventually(lambda: len(client.info()["clients"]) == 1)


def test_clients_that_come_and_vanish_leave_nothing_behind(serve, connect, children, pipe, receive, eventually):
    server = serve(TABLE)
    client = connect(server)

    def state():
        info = client.info()
        num_descriptors = len(os.listdir(f"/proc/{server.pid}/fd"))
        return len(info["clients"]), info["tables"]["replay"]["reserved_rows"], num_descriptors

    before = state()
    assert before[:2] == (1, 0)
    for batch in range(10):  # of 20 clients that hold 4 rows each, more than fit twice
        ends = []
        for number in range(4):
            here, there = pipe()
            children.start(f"{batch}-{number}", child.visit_often, server.address, there, 5)
            ends.append(here)
        for here in ends:
            assert receive(here, children) == "wrote"
        assert state()[:2] == (21, 80)
        for here in ends:
            here.send("vanish")
        eventually(lambda: state() == before)
        assert all(ended.exit_code == -signal.SIGKILL for ended in children.reap())
    assert client.size("replay") == CAPACITY


# ---- the server ----------------------------------------------------------------------------------------------


def test_every_blocking_call_notices_that_the_server_was_killed(serve, connect, eventually):
    limiter = rb.SampleToInsertRatio(1.0, min_size_to_sample=8, error_buffer=16.0)
    tables = {"replay": TABLE, "limited": rb.ReplayTable(NUMBERED_SPEC, capacity=64, rate_limiter=limiter)}
    server = serve(tables)
    clients = [connect(server) for _ in range(7)]
    first = clients[0]
    first.publish_parameters({"w": np.zeros(2)})
    writer = clients[1].writer("limited", num_envs=1, chunk_size=1)
    sampler = clients[2].sampler("replay", batch_size=4)
    flushed = clients[4].writer("limited", num_envs=1, chunk_size=16)

    def flush():
        for number in range(16):
            flushed.add(**numbered_row(number))
        flushed.flush()

    def ask():
        while True:
            clients[5].info()

    blocking = {
        "add": lambda: add_for_ever(writer),
        "sample": sampler.sample,
        "first parameters": lambda: clients[3].parameters("none", timeout_s=30.0),
        "newer parameters": lambda: clients[6].parameters("policy", newer_than=1, timeout_s=30.0),
        "flush": flush,
        "info": ask,
    }
    raised = {}

    def run(name, call):
        started_s = time.monotonic()
        try:
            call()
        except Exception as error:
            raised[name] = (type(error), str(error), time.monotonic() - started_s)

    threads = []
    for item in blocking.items():
        threads.append(threading.Thread(target=run, args=item, daemon=True))
        threads[-1].start()
        # The first fills the table, so that flush has to wait as well.
        eventually(lambda: first.info()["tables"]["limited"]["waits"])
    eventually(lambda: replay_info(first)["waits"])
    os.kill(server.pid, signal.SIGKILL)
    killed_s = time.monotonic()
    for thread in threads:
        thread.join(AT_ONCE_S)
    assert time.monotonic() - killed_s < AT_ONCE_S
    assert set(raised) == set(blocking), raised
    for name, (kind, message, _) in raised.items():
        assert kind is rb.ServerLost, (name, kind, message)
        assert server.address in message
        assert "connect again" in message
    for call in (first.stats, lambda: first.clear("replay"), lambda: first.publish_parameters({"w": np.zeros(2)})):
        with pytest.raises(rb.ServerLost):
            call()


def test_a_killed_servers_address_serves_again_and_old_clients_learn_of_it(tmp_path, serve, connect, eventually):
    address = f"ipc://{tmp_path}/server"
    first = serve(TABLE, address=address)
    old = connect(address)
    add_numbers(old, range(5))
    writer = old.writer("replay", num_envs=1, chunk_size=1)
    os.kill(first.pid, signal.SIGKILL)
    os.waitid(os.P_PID, first.pid, os.WEXITED | os.WNOWAIT)
    second = rb.BufferServer({"replay": TABLE}, address)
    with second:
        new = connect(address)
        assert new.size("replay") == 0
        with pytest.raises(rb.ServerLost):
            old.size("replay")
        # zmq reconnects by itself: what was sent before anybody looked reaches the new server, which refuses it.
        writer._channel._socket.send(b"to whom?")
        eventually(lambda: new.info()["num_refused"] > 0)
        assert writer._channel._socket.poll(30_000)
        with pytest.raises(rb.ServerLost), writer:
            add_for_ever(writer)
        assert new.size("replay") == 0
        assert len(new.info()["clients"]) == 1
    assert not (tmp_path / "server").exists()


def test_a_server_object_starts_again_after_its_process_was_killed(tmp_path, connect):
    server = rb.BufferServer({"replay": TABLE}, f"ipc://{tmp_path}/server")
    with server:
        os.kill(server.pid, signal.SIGKILL)
        os.waitid(os.P_PID, server.pid, os.WEXITED | os.WNOWAIT)
        assert not server.is_alive()
        server.start()
        assert connect(server).size("replay") == 0
        with pytest.raises(rb.InvalidInput, match="runs already"):
            server.start()
    assert not server.is_alive()


def test_a_second_server_is_refused_and_the_first_goes_on(client, address):
    second = rb.BufferServer({"replay": TABLE}, address)
    with pytest.raises(rb.AddressInUse, match=f"another server is running at {address}"):
        second.start()
    assert not second.is_alive()
    add_numbers(client, range(3))
    with rb.connect(address) as late:
        assert late.size("replay") == 3


def test_a_server_ends_with_its_killed_parent_even_if_a_forked_child_lives(
    tmp_path, serve, children, pipe, receive, connect
):
    here, there = pipe()
    address = f"ipc://{tmp_path}/server"
    parent = children.start("parent", child.serve_and_wait, there, address, {"replay": TABLE})
    server_pid, forked_pid = receive(here, children)
    server_pidfd = os.pidfd_open(server_pid)
    try:
        client = connect(address)
        os.kill(parent, signal.SIGKILL)
        with pytest.raises(rb.ServerLost):
            client.parameters("none", timeout_s=AT_ONCE_S)
        assert not (tmp_path / "server").exists()
    finally:
        os.kill(forked_pid, signal.SIGKILL)
        os.close(server_pidfd)


def test_a_server_stops_in_order_while_a_forked_child_of_its_parent_lives(children, pipe, receive):
    # Gymnasium's AsyncVectorEnv forks; its workers inherit every pipe.
    here, there = pipe()
    children.start("parent", child.stop_with_forked_child, there, {"replay": TABLE})
    seconds, address_is_gone = receive(here, children)
    assert seconds < 4.0
    assert address_is_gone


def test_a_stopped_server_makes_calls_reach_their_deadline_and_not_more(serve):
    server = serve(TABLE)
    client = rb.connect(server.address, timeout_s=5.0)
    os.kill(server.pid, signal.SIGSTOP)
    backlog = []
    try:
        started_s = time.monotonic()
        client.timeout_s = 0.2
        with pytest.raises(rb.DeadlineExceeded, match=r"GetInfo: the server at .* did not answer within 0.2 s"):
            client.info()
        with pytest.raises(rb.DeadlineExceeded, match=r"did not answer within 0.2 s; is it stopped\?"):
            rb.connect(server.address, timeout_s=0.2)
        # Nor when so many wait to be let in that the kernel takes no more.
        path = os.fspath(Path(server.address.removeprefix("ipc://"), "attach.sock"))
        with contextlib.suppress(BlockingIOError):
            while len(backlog) < 1000:
                backlog.append(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK))
                backlog[-1].connect(path)
        assert 100 < len(backlog) < 1000
        with pytest.raises(rb.DeadlineExceeded, match=r"no server came up at .* within 0.2 s"):
            rb.connect(server.address, timeout_s=0.2)
        assert time.monotonic() - started_s < AT_ONCE_S
    finally:
        for waiting in backlog:
            waiting.close()
        os.kill(server.pid, signal.SIGCONT)
    client.timeout_s = 30.0
    assert client.size("replay") == 0  # the answer that came too late is not taken for this one's
    client.close()


def test_connecting_to_nothing_ends_in_time_and_says_where(tmp_path):
    started_s = time.monotonic()
    for address in (f"ipc://{tmp_path}/nowhere", f"ipc://{tmp_path}"):
        tmp_path.chmod(0o700)
        with pytest.raises(rb.DeadlineExceeded, match=f"no server came up at {address} within 0.1 s .*serve.py"):
            rb.connect(address, timeout_s=0.1)
    assert time.monotonic() - started_s < AT_ONCE_S


def test_a_directory_that_others_may_write_to_is_refused(tmp_path):
    tmp_path.chmod(0o777)
    with pytest.raises(rb.ConnectionRefused, match=r"mode 0777; expected .* 0700"):
        rb.connect(f"ipc://{tmp_path}", timeout_s=0.1)
    with pytest.raises(rb.ConnectionRefused, match="mode 0777"):
        rb.BufferServer({"replay": TABLE}, f"ipc://{tmp_path}").start()


def test_a_server_may_have_as_many_descriptors_as_the_system_lets_it(serve):
    # libzmq aborts the process when there are none left, and a login's soft limit is 1024.
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 512), hard))
    try:
        server = serve(TABLE)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert resource.prlimit(server.pid, resource.RLIMIT_NOFILE) == (hard, hard)


def test_tables_that_do_not_fit_are_refused_with_need_and_have(tmp_path):
    huge = rb.ReplayTable(NUMBERED_SPEC, capacity=10**10)
    server = rb.BufferServer({"replay": huge}, f"ipc://{tmp_path}/server")
    with pytest.raises(rb.NotEnoughMemory, match=r"the tables need \d+\.\d\d GiB, and \d+\.\d\d GiB are available"):
        server.start()
    assert not server.is_alive()
    assert not (tmp_path / "server").exists()


def test_a_forked_child_gets_an_error_and_its_parent_goes_on(address, client, children, pipe, receive):
    here, there = pipe()
    children.start("parent", child.use_after_fork, address, there)
    raised = receive(here, children)
    assert raised.pop("connect") == "1"
    assert set(raised.values()) == {"ForkedClient"}, raised
    assert receive(here, children) == 2


def test_nothing_is_left_in_dev_shm_or_at_the_address(serve, connect, eventually):
    before = set(os.listdir("/dev/shm"))
    server = serve(TABLE)
    client = connect(server)
    add_numbers(client, range(10))
    client.publish_parameters({"w": np.zeros(3)})
    eventually(lambda: set(os.listdir("/dev/shm")) <= before)  # other tests have semaphores there for a moment
    directory = Path(server.address.removeprefix("ipc://"))
    assert directory.is_dir()
    server.stop()
    server.stop()
    assert not directory.exists()


def test_a_processor_with_another_memory_order_is_refused(address, monkeypatch):
    uname = os.uname()
    monkeypatch.setattr(os, "uname", lambda: type(uname)((*uname[:4], "aarch64")))
    with pytest.raises(rb.RLBufferError, match="this processor is aarch64"):
        rb.connect(address)
