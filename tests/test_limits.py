"""How many clients there can be, what those too many are told, and that nothing stays of those who were there."""

import os
import resource
import select
import signal
import socket

import child_misuse
import pytest
from child_processes import NUMBERED_SPEC, numbered_row

import rl_buffer as rb
from rl_buffer.descriptors import MAX_STRANGERS, PER_CHANNEL, PER_CLIENT

pytestmark = pytest.mark.timeout(240)

TABLE = rb.ReplayTable(NUMBERED_SPEC, capacity=64, headroom=1024)


def num_descriptors(pid):
    return len(os.listdir(f"/proc/{pid}/fd"))


def resident_nbytes(pid):
    with open(f"/proc/{pid}/statm") as statm:
        fields = [int(field) * resource.getpagesize() for field in statm.read().split()]
    return fields[1] - fields[2]  # without what is shared: the tables


def cpu_ticks(pid):
    with open(f"/proc/{pid}/stat") as stat:
        fields = stat.read().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


def is_idle(pid):
    """Whether a process uses less than a tenth of a core, as long as one looks."""
    pidfd = os.pidfd_open(pid)
    try:
        before = cpu_ticks(pid)
        poller = select.poll()
        poller.register(pidfd, select.POLLIN)
        assert not poller.poll(500), "it has ended"
        return (cpu_ticks(pid) - before) / os.sysconf("SC_CLK_TCK") < 0.05
    finally:
        os.close(pidfd)


def attach_path(address):
    return f"{address.removeprefix('ipc://')}/attach.sock"


def until_refused(call, kind):
    """What ends it."""
    for _ in range(1000):
        try:
            call()
        except kind as error:
            return error
    raise AssertionError(f"never {kind.__name__}")


@pytest.fixture
def serve_with_limit(children, pipe, receive):
    """Start a server that may open so many descriptors: (address, process id)."""

    def start(limit):
        here, there = pipe()
        children.start("server", child_misuse.serve_with_limit, there, {"replay": TABLE}, limit)
        return receive(here, children)

    return start


@pytest.fixture
def clients():
    """Those that a test has connected, closed at its end."""
    opened = []
    yield opened
    for client in opened:
        client.close()


# ---- descriptors ---------------------------------------------------------------------------------------------


def test_a_client_costs_three_descriptors_and_a_channel_one(serve, connect):
    server = serve(TABLE)
    before = num_descriptors(server.pid)
    client = connect(server)
    client.info()
    assert num_descriptors(server.pid) - before == PER_CLIENT - 1, "the fourth is for a channel in the making"
    writers = [client.writer("replay", num_envs=1) for _ in range(3)]
    assert num_descriptors(server.pid) - before == PER_CLIENT - 1 + 3 * PER_CHANNEL
    for writer in writers:
        writer.close()


def test_clients_beyond_the_limit_of_descriptors_are_refused_and_the_others_go_on(
    serve_with_limit, clients, eventually
):
    limit = 256
    address, pid = serve_with_limit(limit)
    base, writers = num_descriptors(pid), []

    def come_with_a_writer():
        clients.append(rb.connect(address, 10.0))
        writers.append(clients[-1].writer("replay", num_envs=1, chunk_size=1))

    refused = until_refused(come_with_a_writer, rb.ConnectionRefused)
    assert 10 < len(clients) < (limit - base) / PER_CLIENT
    text = str(refused)
    assert f"{len(clients)} clients with {len(clients)} writers, samplers and readers are attached" in text
    assert "limit of open descriptors (RLIMIT_NOFILE) allows; close some, or raise it (ulimit -n)" in text
    refused = until_refused(lambda: writers.append(clients[0].writer("replay", num_envs=1)), rb.RequestRefused)
    assert "RLIMIT_NOFILE" in str(refused)
    assert num_descriptors(pid) < limit - MAX_STRANGERS
    assert clients[0].info()["num_refused"] == 2
    for number, writer in enumerate(writers):  # those who are there go on
        writer.add(**numbered_row(number))
    for writer in writers:
        writer.close()
    for client in clients:
        client.close()
    eventually(lambda: num_descriptors(pid) == base)
    clients.append(rb.connect(address, 10.0))
    assert clients[-1].size("replay") == len(writers)


def test_a_limit_that_is_too_low_for_a_single_client_is_said_at_the_start(serve_with_limit):
    text = serve_with_limit(128)
    assert "this server may open 128 descriptors (RLIMIT_NOFILE), and needs" in text
    assert "raise the limit (ulimit -n)" in text


def test_connections_that_say_nothing_are_dropped_when_there_are_too_many(serve, connect, eventually):
    server = serve(TABLE)
    before = num_descriptors(server.pid)
    silent = []
    try:
        for _ in range(3 * MAX_STRANGERS):
            silent.append(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
            silent[-1].settimeout(10.0)
            silent[-1].connect(attach_path(server.address))
        for dropped in silent[: 2 * MAX_STRANGERS]:
            assert f"{MAX_STRANGERS} others have come and said nothing".encode() in dropped.recv(1000)
            assert dropped.recv(1000) == b""
        assert num_descriptors(server.pid) == before + 2 * MAX_STRANGERS
        client = connect(server)
        assert client.info()["num_refused"] == 2 * MAX_STRANGERS + 1
        assert is_idle(server.pid)
    finally:
        for connection in silent:
            connection.close()
    eventually(lambda: num_descriptors(server.pid) == before + PER_CLIENT - 1)


def test_a_server_without_a_free_descriptor_turns_clients_away_and_is_idle(serve, connect):
    server = serve(TABLE)
    client = connect(server)
    client.info()
    limits = resource.prlimit(server.pid, resource.RLIMIT_NOFILE)
    for num_left, reason in ((0, "Too many open files"), (1, "as many descriptors open as it may")):
        limit = num_descriptors(server.pid) + num_left
        resource.prlimit(server.pid, resource.RLIMIT_NOFILE, (limit, limits[1]))
        for _ in range(3):
            with pytest.raises(rb.ConnectionRefused, match=reason):
                rb.connect(server.address, 10.0)
        assert is_idle(server.pid)
    assert client.info()["num_refused"] == 6
    resource.prlimit(server.pid, resource.RLIMIT_NOFILE, limits)
    assert connect(server).size("replay") == 0


# ---- many clients --------------------------------------------------------------------------------------------


def test_a_thousand_clients_that_connect_write_and_vanish_leave_nothing(
    serve, connect, children, pipe, receive, eventually
):
    server = serve(TABLE)
    client = connect(server)

    def state():
        info = client.info()
        return len(info["clients"]), info["tables"]["replay"]["reserved_rows"], num_descriptors(server.pid)

    before = state()
    assert before[:2] == (1, 0)
    per_process, resident = 50, []
    for batch in range(5):  # of 200 clients
        processes = []
        for number in range(4):
            here, there = pipe()
            pid = children.start(f"{batch}-{number}", child_misuse.visit, server.address, there, per_process)
            processes.append((pid, here))
        for _, end in processes:
            assert receive(end, children) == "wrote"
        now = state()
        assert now[0] == 1 + 4 * per_process
        assert now[1] >= 4 * per_process
        assert now[2] == before[2] + 4 * per_process * (PER_CLIENT - 1 + PER_CHANNEL)
        closing, dying = processes[:2], processes[2:]
        for pid, _ in dying:
            os.kill(pid, signal.SIGKILL)
        for _, end in closing:
            end.send("close")
        for _, end in closing:
            assert receive(end, children) == "closed"
        eventually(lambda: state() == before)
        resident.append(resident_nbytes(server.pid))
        for _, end in closing:
            end.send("end")
    assert client.size("replay") == 64
    # It grows by half as much with every batch (20 of them: 67, 73, 76, 78, 79, ... 81, 81 MiB): no leak.
    assert resident[-1] - resident[2] < 5 << 20, f"the last 400 clients left {resident} bytes"
