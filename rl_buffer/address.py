"""Where a server can be found: one private directory with two sockets and a lock.

    DIRECTORY (0700)/   owner.lock     held by flock while the server lives, so that a dead one's is free
                        attach.sock    AF_UNIX SEQPACKET, file descriptors
                        control.sock   zmq

An address is `ipc://DIRECTORY`, or the directory alone. Nobody but its owner can put anything there, so a socket in it
is the owner's. A server that serves other users as well makes the directory 0711 and the sockets 0666: they can go
through it and connect, and each connection is judged by its user.
"""

import contextlib
import fcntl
import os
import stat
import tempfile
from pathlib import Path

from rl_buffer.errors import AddressInUse, ConnectionRefused, InvalidInput

_SCHEME = "ipc://"
_MAX_SOCKET_PATH_NBYTES = 107  # sun_path of Linux, less the closing zero
_LOCK, _ATTACH, _CONTROL = "owner.lock", "attach.sock", "control.sock"
_PRIVATE, _PASSABLE = _MODES = 0o700, 0o711
_ROOT = 0


class Address:
    """Paths of one server; creating the object touches nothing."""

    def __init__(self, address: str | os.PathLike[str], server_uid: int | None = None) -> None:
        """Parse `ipc:///some/directory` or `/some/directory`.

        Args:
            address: the text.
            server_uid: for clients: the user whose server it is, if that is neither this one nor root.

        Raises:
            InvalidInput: another scheme, or too long for a socket path.
        """
        text = os.fspath(address)
        if "://" in text and not text.startswith(_SCHEME):
            raise InvalidInput(f"address {text!r}: expected {_SCHEME}/some/directory (this version knows one machine)")
        if not text.removeprefix(_SCHEME):
            raise InvalidInput(f"address {text!r} names no directory; expected {_SCHEME}/some/directory")
        self.server_uids = (os.getuid(), _ROOT) if server_uid is None else (server_uid,)
        self.directory = Path(text.removeprefix(_SCHEME)).absolute()
        self.lock = self.directory / _LOCK
        self.attach = self.directory / _ATTACH
        self.control = self.directory / _CONTROL
        if len(os.fsencode(self.control)) > _MAX_SOCKET_PATH_NBYTES:
            raise InvalidInput(
                f"address {text!r} is too long: {self.control} must be at most {_MAX_SOCKET_PATH_NBYTES} bytes, "
                "a limit of Unix sockets; choose a shorter directory"
            )

    def __str__(self) -> str:
        return f"{_SCHEME}{self.directory}"

    @property
    def control_endpoint(self) -> str:
        """The zmq endpoint."""
        return f"{_SCHEME}{self.control}"

    def check_private(self) -> None:
        """For servers: refuse a directory in which somebody else could have put something.

        Raises:
            ConnectionRefused: other owner, or accessible to others in another way than `acquire` makes it.
        """
        require_private(self.directory, "so that nobody else can listen there", modes=_MODES)

    def check_trusted(self) -> None:
        """For clients: the same of a directory of this user, of root or of `server_uid`.

        Raises:
            ConnectionRefused: other owner, or accessible to others in another way, or not to this user.
        """
        with contextlib.suppress(PermissionError):  # of a directory above
            require_private(
                self.directory,
                "so that nobody else can listen there; if you trust another user's server, pass server_uid= to "
                "rb.connect",
                owners=self.server_uids,
                modes=_MODES,
            )
        if not os.access(self.directory, os.X_OK):
            raise ConnectionRefused(
                f"{self.directory} is private to its owner, and this process runs as user {os.getuid()}; that server "
                f"lets it in if it is started with allowed_uids=({os.getuid()},)"
            )

    def acquire(self, *, serves_others: bool = False) -> int:
        """Take the owner lock, making the directory where needed; return the lock's descriptor.

        Sockets that a killed server left are removed. The lock goes when the descriptor is closed.

        Args:
            serves_others: let other users go through the directory, to the sockets.

        Raises:
            AddressInUse: a live server holds it.
            ConnectionRefused: the directory is not private.
        """
        while True:
            self.directory.mkdir(mode=_PRIVATE, parents=True, exist_ok=True)
            try:
                self.check_private()
                fd = os.open(self.lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            except FileNotFoundError:  # the last owner is just removing the directory
                continue
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                os.close(fd)
                raise AddressInUse(
                    f"another server is running at {self}; stop it, or choose another address"
                ) from error
            # The last owner may have removed the file between our open and our lock.
            with contextlib.suppress(FileNotFoundError):
                if os.fstat(fd).st_ino == os.stat(self.lock).st_ino:
                    break
            os.close(fd)
        for path in (self.attach, self.control):
            path.unlink(missing_ok=True)
        self.directory.chmod(_PASSABLE if serves_others else _PRIVATE)
        return fd

    def release(self, lock_fd: int) -> None:
        """Remove sockets, lock and the directory if it is then empty."""
        for path in (self.attach, self.control, self.lock):
            path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self.directory.rmdir()
        os.close(lock_fd)


def require_private(
    directory: Path, purpose: str, *, owners: tuple[int, ...] = (), modes: tuple[int, ...] = (_PRIVATE,)
) -> None:
    """Refuse a directory that is not this user's alone.

    Args:
        directory: to look at.
        purpose: what the message ends with.
        owners: other users that it may belong to instead.
        modes: that it may have.

    Raises:
        ConnectionRefused: other owner, or accessible to others.
    """
    status = directory.stat()
    owner, mode, owners = status.st_uid, stat.S_IMODE(status.st_mode), owners or (os.getuid(),)
    if owner not in owners or mode & 0o077 not in (allowed & 0o077 for allowed in modes):
        raise ConnectionRefused(
            f"{directory} has owner {owner} and mode {mode:04o}; expected owner "
            f"{' or '.join(map(str, dict.fromkeys(owners)))} and mode {_PRIVATE:04o}, {purpose}"
        )


def fresh_address() -> str:
    """An address that no other server has, below the user's runtime or temporary directory."""
    parent = os.environ.get("XDG_RUNTIME_DIR") or tempfile.gettempdir()
    return f"{_SCHEME}{parent}/rl_buffer-{os.urandom(6).hex()}"


def default_address() -> str:
    """The address that scripts agree on when none is given: one per user."""
    return f"{_SCHEME}{tempfile.gettempdir()}/rl_buffer-{os.getuid()}"
