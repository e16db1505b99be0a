"""Rows belong to a process until it ends, whatever becomes of its connection and whatever number it goes by."""

import gc
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import child_misuse
import child_processes as child
import pytest
from child_processes import NUMBERED_SPEC, numbered_row
from episode_envs import committed_leaves

import rl_buffer as rb

pytestmark = pytest.mark.timeout(240)

CAPACITY = 64
TABLE = rb.ReplayTable(NUMBERED_SPEC, capacity=CAPACITY, headroom=32, sampler=rb.Prioritized())
TESTS = Path(__file__).parent


def replay_info(client):
    return client.info()["tables"]["replay"]


def add_numbers(client, numbers):
    with client.writer("replay", num_envs=1, chunk_size=8) as writer:
        for number in numbers:
            writer.add(**numbered_row(number))


def test_a_client_that_was_forgotten_without_close_is_given_up_by_the_collector(serve, connect, eventually):
    server = serve(TABLE)
    observer = connect(server)
    gc.collect()
    num_descriptors = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        forgotten = rb.connect(server.address, 60.0)
        users = forgotten.writer("replay", num_envs=1, chunk_size=2), forgotten.sampler("replay", 2)
        del forgotten, users
        # The context of zmq must not end before its sockets, for which it waits without a deadline.
        gc.collect()
    assert len(os.listdir("/proc/self/fd")) == num_descriptors
    eventually(lambda: [session["connected"] for session in observer.info()["clients"]].count(True) == 1)


def test_a_client_that_closes_its_connection_and_writes_on_harms_no_committed_row(
    serve, connect, children, pipe, receive, eventually
):
    server = serve(TABLE)
    client = connect(server)
    here, there = pipe()
    children.start("scribbler", child_misuse.scribble_after_close, server.address, there)
    held = receive(here, children)
    assert len(held) > 0
    eventually(lambda: not all(session["connected"] for session in client.info()["clients"]))
    for _ in range(3):
        add_numbers(client, range(CAPACITY + 32))
        leaves = committed_leaves(client, "replay")
        assert (leaves["observations"] == leaves["actions"][:, None] // 7).all()
        assert (leaves["extras/checksum"] == child.checksum(leaves["actions"] // 7)).all()
    assert replay_info(client)["reserved_rows"] == len(held)
    here.send("end")
    assert receive(here, children) > 0, "it did write all the time"
    eventually(lambda: replay_info(client)["reserved_rows"] == 0)


# ---- PID namespaces ------------------------------------------------------------------------------------------


def in_new_pid_namespace(program, *arguments):
    """Start Python as process 1 of a new PID namespace; skip where that is not allowed."""
    unshare = shutil.which("unshare")
    for options in ([], ["--user", "--map-root-user"]):
        command = [str(unshare), *options, "--pid", "--fork", "--kill-child"]
        if unshare and subprocess.run([*command, "true"], capture_output=True).returncode == 0:
            break
    else:
        pytest.skip("this system does not let us make PID namespaces (unshare --pid)")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join((str(TESTS.parent), str(TESTS)))}
    return subprocess.Popen(
        [*command, sys.executable, "-c", program, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )


WRITE = """
import os, sys
import child_misuse
import child_processes as child
import rl_buffer as rb

client = rb.connect(sys.argv[1], 30.0, name="namespaced")
writer = client.writer("replay", num_envs=1, chunk_size=4)
for number in range(8):
    writer.add(**child.numbered_row(number))
writer.flush()
print(os.getpid(), flush=True)
sys.stdin.read()
"""


def test_the_rows_of_a_client_in_another_pid_namespace_come_back_when_it_is_killed(serve, connect, eventually):
    server = serve(TABLE)
    client = connect(server)
    with in_new_pid_namespace(WRITE, server.address) as process:
        assert int(process.stdout.readline()) == 1, "the number that it has for itself"
        assert client.size("replay") == 8
        (session,) = [session for session in client.info()["clients"] if session["name"] == "namespaced"]
        assert session["pid"] not in (0, 1, process.pid), "the number that it has here"
        held = session["reserved_rows"]
        assert held > 0
        add_numbers(client, range(3 * CAPACITY))
        assert replay_info(client)["reserved_rows"] == held
        os.kill(session["pid"], signal.SIGKILL)
        eventually(lambda: replay_info(client)["reserved_rows"] == 0, timeout_s=5.0)
        assert len(client.info()["clients"]) == 1


SERVE = """
import sys
import child_misuse
import child_processes as child
import rl_buffer as rb

table = rb.ReplayTable(child.NUMBERED_SPEC, capacity=64, headroom=32)
with rb.BufferServer({"replay": table}, sys.argv[1]) as server:
    print(server.address, flush=True)
    sys.stdin.read()
"""


def test_a_server_sees_the_end_of_a_client_whose_process_has_no_number_in_its_namespace(
    tmp_path, connect, children, pipe, receive, eventually
):
    with in_new_pid_namespace(SERVE, f"ipc://{tmp_path}/server") as process:
        address = process.stdout.readline().strip()
        client = connect(address)
        here, there = pipe()
        pid = children.start("half", child.write_half, address, there)
        assert receive(here, children) == "half"
        assert [session["pid"] for session in client.info()["clients"]] == [0, 0], "it cannot be named there"
        assert replay_info(client)["reserved_rows"] > 0
        os.kill(pid, signal.SIGKILL)
        eventually(lambda: replay_info(client)["reserved_rows"] == 0, timeout_s=5.0)
        assert len(client.info()["clients"]) == 1
        process.stdin.close()
        with pytest.raises(rb.ServerLost):
            client.parameters("none", timeout_s=30.0)
