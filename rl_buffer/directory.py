"""The directory in which tables outlive their server: files of memory, their configuration, and whose they are now.

    DIRECTORY (0700)/   directory.lock   held by flock while a server uses it
                        tables.json      configuration; written last, so that with it everything is there
                        ledger           see `ledger`
                        0.rows, 0.generations, 1.rows, ...     of the tables, in the order of their names

On a tmpfs this is memory as a memfd is, and goes with the machine's power; on a disk it may be larger than memory. The
file system must keep the room that it has promised (ext4, xfs and tmpfs do; copy-on-write and network ones may not).
"""

import contextlib
import fcntl
import json
import os
from pathlib import Path
from typing import Any

from rl_buffer.address import require_private
from rl_buffer.errors import AddressInUse, InvalidInput, NotEnoughMemory
from rl_buffer.failpoints import reached
from rl_buffer.storage import FileSegment, Progress, check_memory

_LOCK, _TABLES = "directory.lock", "tables.json"
_BLOCK_NBYTES = 512  # the unit of st_blocks


class Directory:
    """A directory that this process owns until it closes it or ends. Nothing is waited for and nothing synchronised."""

    def __init__(self, path: str | os.PathLike[str], configuration: dict[str, Any]) -> None:
        """Lock the directory, making it where needed, and compare its configuration. Nothing else is touched.

        Args:
            path: of the directory.
            configuration: of the server, in the values of JSON.

        Raises:
            AddressInUse: another server uses it.
            ConnectionRefused: others may enter it.
            InvalidInput: it holds tables of another configuration.
        """
        self.path = Path(path).absolute()
        self._configuration: Any = json.loads(json.dumps(configuration))  # as it is read back: lists, not tuples
        self._made = not self.path.exists()
        self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
        require_private(self.path, "so that nobody else can change the tables")
        self._lock_fd = os.open(self.path / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            try:
                fcntl.flock(self._lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise AddressInUse(
                    f"another server keeps its tables in {self.path}; stop it, or choose another directory"
                ) from error
            self.is_new = not (self.path / _TABLES).exists()
            if not self.is_new:
                self._compare()
            self._files: list[Path] = []
        except BaseException:
            os.close(self._lock_fd)
            raise

    def _compare(self) -> None:
        try:
            found = json.loads((self.path / _TABLES).read_text())
        except ValueError as error:
            raise InvalidInput(f"{self.path / _TABLES} cannot be read: {error}; delete {self.path}") from error
        if difference := _first_difference("", found, self._configuration):
            where, before, now = difference
            raise InvalidInput(
                f"{self.path} holds tables of another configuration: {where} was {before}, and is {now}; start the "
                "server with what it was, or with another directory, or delete this one with all that is in it"
            )

    def check_room(self, nbytes: dict[str, int]) -> None:
        """Refuse files, by name and size, that the file system or the memory behind it has no room for.

        Raises:
            NotEnoughMemory: with need, have and a hint.
        """
        need_nbytes = sum(nbytes.values())
        if not self.is_new:
            need_nbytes -= sum((self.path / name).stat().st_blocks * _BLOCK_NBYTES for name in nbytes)
        file_system = os.statvfs(self.path)
        have_nbytes = file_system.f_bavail * file_system.f_frsize
        if need_nbytes > have_nbytes:
            raise NotEnoughMemory(
                f"the tables need {need_nbytes / 2**30:.2f} GiB in {self.path}, and its file system has "
                f"{have_nbytes / 2**30:.2f} GiB left; lower capacity or headroom, store observations in a smaller "
                "dtype, or choose a directory elsewhere"
            )
        if need_nbytes > 0 and _is_in_memory(self.path):
            check_memory(need_nbytes)

    def segment(
        self, name: str, nbytes: int, *, readers_only: bool = False, progress: Progress | None = None
    ) -> FileSegment:
        """Map a file of this directory, made with zeros if the directory is new.

        Raises:
            RLBufferError: it has another size.
            NotEnoughMemory: the file system has no room for it after all.
        """
        path = self.path / name
        if self.is_new:
            path.unlink(missing_ok=True)  # of a server that was killed while it began
            self._files.append(path)
        try:
            return FileSegment(path, nbytes, readers_only=readers_only, progress=progress)
        except OSError as error:
            raise NotEnoughMemory(f"could not reserve {nbytes:,} bytes for {path}: {error}") from error

    def complete(self) -> None:
        """All files are there and hold what they should: from here on the directory is one to go on from."""
        unfinished = self.path / f"{_TABLES}.unfinished"
        unfinished.touch(mode=0o600)
        unfinished.write_text(json.dumps(self._configuration, indent=1))
        reached("server.completing")
        unfinished.replace(self.path / _TABLES)
        self.is_new = False

    def close(self) -> None:
        """Let others have it. What was begun in a new one, and is not complete, is removed."""
        if self.is_new:
            for path in self._files:
                path.unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                if self._made:
                    (self.path / _LOCK).unlink()
                    self.path.rmdir()
        os.close(self._lock_fd)


def _first_difference(where: str, before: Any, now: Any) -> tuple[str, Any, Any] | None:
    """(path, then, now) of the first leaf in which two JSON values differ."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in sorted(before.keys() | now.keys()):
            inner = f"{where}.{key}" if where else key
            if found := _first_difference(inner, before.get(key, "not there"), now.get(key, "not there")):
                return found
        return None
    return None if before == now else (where, before, now)


def _is_in_memory(path: Path) -> bool:
    """Whether files at `path` lie in a tmpfs."""
    device = os.stat(path).st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        mount, _, source = line.partition(" - ")
        if mount.split()[2] == number:
            return source.split()[0] in ("tmpfs", "ramfs")
    return False
