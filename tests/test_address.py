import os
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from rl_buffer.address import Address, default_address, fresh_address
from rl_buffer.errors import AddressInUse, ConnectionRefused, InvalidInput


@pytest.fixture
def directory(tmp_path):
    """Short enough for a socket below it."""
    path = tmp_path / "server"
    assert len(str(path)) < 90
    return path


def bound(path):
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(str(path))
    return listener


@pytest.mark.parametrize("text", ["ipc://{}", "{}"])
def test_an_address_is_a_directory_with_or_without_its_scheme(directory, text):
    address = Address(text.format(directory))
    assert address.directory == directory
    assert str(address) == f"ipc://{directory}"
    assert address.control_endpoint == f"ipc://{directory}/control.sock"
    assert Address(directory).attach == directory / "attach.sock"
    assert not directory.exists(), "parsing touches nothing"


def test_a_relative_directory_is_made_absolute(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert Address("ipc://here").directory == tmp_path / "here"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tcp://host:1", r"address 'tcp://host:1': expected ipc:///some/directory"),
        ("", r"address '' names no directory"),
        ("ipc://", r"address 'ipc://' names no directory"),
        ("/" + "x" * 95, r"is too long: .* must be at most 107 bytes, a limit of Unix sockets; choose a shorter"),
        ("/" + "ö" * 48, r"is too long"),
    ],
)
def test_an_address_that_no_socket_could_have_is_refused(text, message):
    with pytest.raises(InvalidInput, match=message):
        Address(text)


def test_the_longest_address_can_be_bound(tmp_path):
    directory = tmp_path / "x"
    directory = tmp_path / ("x" * (107 - len(os.fsencode(directory / "control.sock")) + 1))
    address = Address(directory)
    fd = address.acquire()
    bound(address.control).close()
    address.release(fd)
    with pytest.raises(InvalidInput, match="too long"):
        Address(f"{directory}x")


def test_a_second_owner_is_refused_while_the_first_lives_and_not_afterwards(directory):
    first, second = Address(directory), Address(directory)
    fd = first.acquire()
    listener = bound(first.attach)
    with pytest.raises(AddressInUse, match=f"another server is running at ipc://{directory}; stop it, or choose"):
        second.acquire()
    assert first.attach.exists(), "a refused owner removes nothing"
    listener.close()
    first.release(fd)
    second.release(second.acquire())


HOLD = """
import socket, sys
from rl_buffer.address import Address
address = Address(sys.argv[1])
fd = address.acquire()
sockets = [socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(2)]
sockets[0].bind(str(address.attach))
sockets[1].bind(str(address.control))
print("holding", flush=True)
sys.stdin.read()
"""


def test_the_sockets_of_a_killed_owner_are_reclaimed(directory):
    command = [sys.executable, "-c", HOLD, str(directory)]
    address = Address(directory)
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as owner:
        assert owner.stdout.readline() == b"holding\n"
        with pytest.raises(AddressInUse):
            address.acquire()
        owner.send_signal(signal.SIGKILL)
        owner.wait()
    assert {path.name for path in directory.iterdir()} == {"owner.lock", "attach.sock", "control.sock"}
    fd = address.acquire()
    assert {path.name for path in directory.iterdir()} == {"owner.lock"}
    bound(address.attach).close()
    address.release(fd)


def test_releasing_removes_the_directory_and_closes_the_lock(directory):
    address = Address(directory)
    fd = address.acquire()
    bound(address.attach).close()
    address.release(fd)
    assert not directory.exists()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


def test_releasing_leaves_the_files_of_others(directory):
    address = Address(directory)
    fd = address.acquire()
    (directory / "notes.txt").write_text("mine")
    address.release(fd)
    assert [path.name for path in directory.iterdir()] == ["notes.txt"]


def test_the_directory_is_made_private_with_its_parents(tmp_path):
    address = Address(tmp_path / "a" / "b")
    fd = address.acquire()
    assert address.directory.stat().st_mode & 0o777 == 0o700
    assert os.get_inheritable(fd) is False
    address.release(fd)


@pytest.mark.parametrize("mode", [0o755, 0o770, 0o701, 0o720])
def test_a_directory_that_others_can_enter_is_refused(directory, mode):
    directory.mkdir()
    directory.chmod(mode)
    address = Address(directory)
    for refuses in (address.check_private, address.acquire):
        with pytest.raises(ConnectionRefused, match=f"has owner {os.getuid()} and mode {mode:04o}; expected .* 0700"):
            refuses()
    assert list(directory.iterdir()) == []


def test_a_directory_of_another_user_is_refused(directory, monkeypatch):
    directory.mkdir(mode=0o700)
    other = os.getuid() + 1
    monkeypatch.setattr(os, "getuid", lambda: other)
    with pytest.raises(ConnectionRefused, match=f"expected owner {other} and mode 0700"):
        Address(directory).check_private()


@pytest.mark.parametrize("vanishes_before", ["check_private", "open", "flock"])
def test_an_owner_that_leaves_while_another_comes_does_not_fool_it(directory, monkeypatch, vanishes_before):
    """The last owner removes lock and directory between any two steps of the next one."""
    address, leaving = Address(directory), Address(directory)
    fds = [leaving.acquire()]

    def leave_first(function):
        def stepped(*arguments):
            if fds:
                leaving.release(fds.pop())
            return function(*arguments)

        return stepped

    if vanishes_before == "check_private":
        monkeypatch.setattr(address, "check_private", leave_first(address.check_private))
    elif vanishes_before == "open":
        monkeypatch.setattr(os, "open", leave_first(os.open))
    else:
        monkeypatch.setattr("fcntl.flock", leave_first(__import__("fcntl").flock))
    fd = address.acquire()
    assert os.fstat(fd).st_ino == os.stat(address.lock).st_ino, "the lock of a removed file keeps nobody out"
    with pytest.raises(AddressInUse):
        Address(directory).acquire()
    monkeypatch.undo()
    address.release(fd)


def test_fresh_addresses_differ_and_make_nothing_before_a_server_takes_them():
    addresses = [Address(fresh_address()) for _ in range(2)]
    assert addresses[0].directory != addresses[1].directory
    for address in addresses:
        assert not address.directory.exists()
        assert address.directory.parent.is_dir()


def test_a_fresh_address_is_below_the_runtime_directory(monkeypatch):
    with tempfile.TemporaryDirectory(dir="/tmp") as directory:  # pytest's own are too long for a socket's path
        monkeypatch.setenv("XDG_RUNTIME_DIR", directory)
        assert Address(fresh_address()).directory.parent == Path(directory)


def test_the_default_address_is_one_per_user():
    assert default_address() == default_address()
    assert default_address().endswith(f"rl_buffer-{os.getuid()}")
