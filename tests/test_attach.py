"""Who may attach: the server's own user, those that it lists, and nobody else; and whose server a client trusts."""

import os
import signal
import socket
import stat
import tempfile
import threading
from pathlib import Path

import child_users
import pytest
import zmq
from child_processes import NUMBERED_SPEC

import rl_buffer as rb
from rl_buffer import messages

pytestmark = pytest.mark.timeout(240)

TABLE = rb.ReplayTable(NUMBERED_SPEC, capacity=64, headroom=64)
GUEST, STRANGER = 61_001, 61_002

needs_root = pytest.mark.skipif(os.getuid() != 0, reason="only root can start processes of other users")


@pytest.fixture
def address():
    """A directory that other users can come to, if its own mode lets them; pytest's own are closed to them."""
    with tempfile.TemporaryDirectory(prefix="rl_buffer-", dir="/tmp") as directory:
        os.chmod(directory, 0o711)
        yield f"ipc://{directory}/server"


def paths(address):
    directory = Path(address.removeprefix("ipc://"))
    return directory, directory / "attach.sock", directory / "control.sock", directory / "owner.lock"


def modes(address):
    return [stat.S_IMODE(path.stat().st_mode) for path in paths(address)]


def test_a_server_is_private_unless_it_lists_other_users(serve, address):
    server = serve(TABLE, address=address)
    assert modes(address) == [0o700, 0o600, 0o600, 0o600]
    server.stop()
    server = serve(TABLE, address=address, allowed_uids=(GUEST,))
    assert modes(address) == [0o711, 0o666, 0o666, 0o600]
    os.kill(server.pid, signal.SIGKILL)  # what it leaves does not stay open to others
    server.stop()
    serve(TABLE, address=address)
    assert modes(address) == [0o700, 0o600, 0o600, 0o600]


@needs_root
def test_another_user_is_refused_by_default_and_told_what_to_do(serve, address, children, pipe, receive):
    serve(TABLE, address=address)
    here, there = pipe()
    children.start("stranger", child_users.connect_as, STRANGER, there, address)
    kind, text = receive(here, children)
    assert kind == "ConnectionRefused"
    assert f"is private to its owner, and this process runs as user {STRANGER}" in text
    assert f"allowed_uids=({STRANGER},)" in text


@needs_root
def test_a_user_who_is_not_listed_is_refused_by_both_sockets_and_counted(
    serve, connect, address, children, pipe, receive, eventually
):
    server = serve(TABLE, address=address, allowed_uids=(GUEST,))
    client = connect(server)
    client.info()  # now all of its descriptors are there
    num_descriptors = len(os.listdir(f"/proc/{server.pid}/fd"))
    here, there = pipe()
    children.start("stranger", child_users.connect_as, STRANGER, there, address)
    kind, text = receive(here, children)
    assert kind == "ConnectionRefused"
    reason = f"the other side runs as user {STRANGER}, and this one expects user 0 or {GUEST}"
    assert reason in text
    info = client.info()
    assert (info["num_refused"], len(info["clients"])) == (1, 1)
    assert reason in info["last_refusal"]
    control = os.fspath(paths(address)[2])
    for uid, name in ((STRANGER, "stranger at control"), (GUEST, "guest at control")):
        children.start(name, child_users.greet_control_as, uid, there, control)
        greeting = receive(here, children)
        assert (greeting[:1] == b"\xff") == (uid == GUEST), f"zmq says {greeting} to user {uid}"
    eventually(lambda: len(os.listdir(f"/proc/{server.pid}/fd")) == num_descriptors)


@needs_root
def test_a_listed_user_writes_and_its_rows_come_back_when_it_is_killed(
    serve, connect, address, children, pipe, receive, eventually
):
    server = serve(TABLE, address=address, allowed_uids=(GUEST,))
    client = connect(server)
    here, there = pipe()
    pid = children.start("guest", child_users.write_as, GUEST, there, address)
    assert receive(here, children) == "wrote"
    assert client.size("replay") == 8
    assert [session["pid"] for session in client.info()["clients"] if session["name"] == "guest"] == [pid]
    assert client.info()["tables"]["replay"]["reserved_rows"] > 0
    os.kill(pid, signal.SIGKILL)
    eventually(lambda: client.info()["tables"]["replay"]["reserved_rows"] == 0)
    assert client.size("replay") == 8


@needs_root
def test_a_client_trusts_the_server_of_another_user_only_if_it_is_named(address, children, pipe, receive):
    home = Path(address.removeprefix("ipc://")).parent
    os.chown(home, GUEST, GUEST)
    here, there = pipe()
    children.start("server", child_users.serve_as, GUEST, there, address, {"replay": TABLE}, (0, STRANGER))
    assert receive(here, children) == "serving"
    with pytest.raises(rb.ConnectionRefused, match=rf"has owner {GUEST} and mode 0711; expected owner 0 .*server_uid="):
        rb.connect(address, 5.0)
    with pytest.raises(rb.ConnectionRefused, match=rf"has owner {GUEST} .* expected owner {STRANGER} and mode"):
        rb.connect(address, 5.0, server_uid=STRANGER)
    with rb.connect(address, 5.0, server_uid=GUEST) as client:
        assert client.size("replay") == 0
    children.start("stranger", child_users.connect_as, STRANGER, there, address)
    assert receive(here, children)[0] == "ConnectionRefused"
    os.chown(paths(address)[0], 0, 0)  # root's directory, and not root's server
    children.start("another stranger", child_users.connect_as, STRANGER, there, address)
    kind, text = receive(here, children)
    assert (kind, f"the other side runs as user {GUEST}" in text) == ("ConnectionRefused", True)


def test_a_server_that_lists_users_still_refuses_a_directory_that_others_can_write_to(tmp_path):
    tmp_path.chmod(0o731)
    with pytest.raises(rb.ConnectionRefused, match="mode 0731; expected"):
        rb.BufferServer({"replay": TABLE}, f"ipc://{tmp_path}", allowed_uids=(GUEST,)).start()


def test_a_reason_that_was_sent_before_the_client_said_hello_is_heard(tmp_path, monkeypatch):
    tmp_path.chmod(0o700)
    closed = threading.Event()
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(os.fspath(tmp_path / "attach.sock"))
        listener.listen()

        def refuse():
            connection, _ = listener.accept()
            connection.send(messages.encode_attach(messages.Refused("we are full")))
            connection.close()
            closed.set()

        threading.Thread(target=refuse, daemon=True).start()
        context = zmq.Context  # made between connecting and Hello
        monkeypatch.setattr(zmq, "Context", lambda: context() if closed.wait(30.0) else None)
        with pytest.raises(rb.ConnectionRefused, match="refused: we are full"):
            rb.connect(f"ipc://{tmp_path}", 30.0)
