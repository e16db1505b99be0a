"""Shared memory: how it is reserved, handed over and mapped.

A `Segment` is one memfd, or a file of a `directory`, and one mapping of it. The server creates segments and passes
their descriptors to clients. A memfd has no name: nothing is left of it when every process is killed. Rows are mapped
read-write by everybody, generations read-write by the server only (F_SEAL_FUTURE_WRITE, or a descriptor that is open
for reading only). No torch, no sockets.
"""

import contextlib
import fcntl
import mmap
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rl_buffer.errors import ForkedClient, NotEnoughMemory, RLBufferError

_RESERVE_STEP_NBYTES = 256 << 20  # 0.1 s at the 2.6 GB/s of posix_fallocate: how often progress is reported
_MEMORY_KEPT_FREE_NBYTES = 256 << 20
_CGROUP_FILES = (  # limit, usage, and of this what is inactive file cache; of versions 2 and 1
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)
_F_SEAL_FUTURE_WRITE = 0x10  # linux/fcntl.h; Python 3.11's fcntl lacks it
_SIZE_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW

Progress = Callable[[int, int], None]  # (bytes reserved so far, bytes in all)


class Segment:
    """Memory of fixed size, mapped as long as this object or an array over it lives."""

    def __init__(self, fd: int, nbytes: int, *, writable: bool, sealed: bool = True) -> None:
        """Map an open memfd; the descriptor stays the caller's.

        Args:
            fd: of it.
            nbytes: its size, as the server said.
            writable: may be written through this mapping.
            sealed: False for a file, whose size nothing fixes but that nobody has a reason to cut it short.

        Raises:
            RLBufferError: its size or seals are not what the server promised; mapping it could end in SIGBUS.
        """
        actual_nbytes = os.fstat(fd).st_size
        if actual_nbytes != nbytes:
            raise RLBufferError(f"shared memory has {actual_nbytes} bytes, the server promised {nbytes}")
        if sealed and _seals(fd) & _SIZE_SEALS != _SIZE_SEALS:
            raise RLBufferError("shared memory is not sealed against resizing; it is not from this server")
        self.nbytes = nbytes
        self.sealed = sealed
        access = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
        self.buffer = mmap.mmap(fd, nbytes, mmap.MAP_SHARED, access)
        # A forked child would write into rows that its parent holds; without the mapping it cannot.
        self.buffer.madvise(mmap.MADV_DONTFORK)

    def array(self, dtype: Any) -> NDArray[Any]:
        """The whole segment as a flat array."""
        return np.frombuffer(self.buffer, dtype)


def _seals(fd: int) -> int:
    try:
        return fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    except OSError:  # no memfd at all
        return 0


class OwnedSegment(Segment):
    """A segment that this process created and whose descriptor it hands out."""

    def __init__(self, name: str, nbytes: int, *, readers_only: bool = False, progress: Progress | None = None) -> None:
        """Create, reserve, seal and map.

        Args:
            name: seen in /proc/PID/maps only.
            nbytes: size, at least 1.
            readers_only: every later mapping can only be read.
            progress: called after each reserved piece.

        Raises:
            NotEnoughMemory: the kernel cannot back all of it now. Nothing is kept.
        """
        # The kernel takes 249 bytes without a zero; a client chose the name of its parameters.
        shown_name = f"rl_buffer:{ascii(name)[1:-1]:.200}"
        self.fd = os.memfd_create(shown_name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            _reserve(self.fd, nbytes, progress)
            fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, _SIZE_SEALS)
            super().__init__(self.fd, nbytes, writable=True)
            if readers_only:  # after our own mapping, which stays writable
                fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, _F_SEAL_FUTURE_WRITE)
            fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SEAL)  # or a client could lock out later ones
        except OSError as error:
            os.close(self.fd)
            raise NotEnoughMemory(f"could not reserve {nbytes:,} bytes for {name}: {error}") from error
        except BaseException:
            os.close(self.fd)
            raise

    def close(self) -> None:
        """Give up the descriptor; the memory lives until the last mapping of it is gone."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


class FileSegment(OwnedSegment):
    """A segment in a file, which outlives this process. Nobody must cut the file short: who has it mapped would die."""

    def __init__(
        self, path: Path, nbytes: int, *, readers_only: bool = False, progress: Progress | None = None
    ) -> None:
        """Open the file, or make it, private and with all of its blocks, so that no later write finds the disk full.

        Raises:
            RLBufferError: it is there with another size.
            OSError: the file system has no room for it, or it cannot be opened.
        """
        self.fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            if os.fstat(self.fd).st_size == 0:
                _reserve(self.fd, nbytes, progress)
            super(OwnedSegment, self).__init__(self.fd, nbytes, writable=True, sealed=False)
            if readers_only:  # what is handed out
                writable_fd, self.fd = self.fd, os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                os.close(writable_fd)
        except BaseException:
            self.close()
            raise


def _reserve(fd: int, nbytes: int, progress: Progress | None) -> None:
    """Give an empty file its size and all of its memory or blocks."""
    os.ftruncate(fd, nbytes)
    for start in range(0, nbytes, _RESERVE_STEP_NBYTES):
        step = min(_RESERVE_STEP_NBYTES, nbytes - start)
        os.posix_fallocate(fd, start, step)
        if progress is not None:
            progress(start + step, nbytes)


class ProcessGuard:
    """Remembers which process it was made in, because mappings and sockets do not survive a fork."""

    def __init__(self) -> None:
        self._pid = os.getpid()

    def check(self) -> None:
        """Raise ForkedClient in any other process than the one that made this object."""
        if os.getpid() != self._pid:
            raise ForkedClient(
                f"this client belongs to process {self._pid}, not to its forked child {os.getpid()}; "
                "call rl_buffer.connect(address) in the child"
            )


def check_memory(
    need_nbytes: int,
    what: str = "the tables",
    hint: str = "lower capacity or headroom, store observations in a smaller dtype",
) -> None:
    """Refuse what this machine or container cannot hold, before anything is reserved.

    Raises:
        NotEnoughMemory: with need, have and a hint.
    """
    have_nbytes = available_memory_nbytes()
    if need_nbytes + _MEMORY_KEPT_FREE_NBYTES > have_nbytes:
        need_nbytes = min(need_nbytes, 1 << 90)  # a client may ask for more than a float can hold
        raise NotEnoughMemory(
            f"{what} need {need_nbytes / 2**30:.2f} GiB, and {have_nbytes / 2**30:.2f} GiB are available (of which "
            f"{_MEMORY_KEPT_FREE_NBYTES / 2**20:.0f} MiB stay free); {hint}, or raise the container's memory limit"
        )


def available_memory_nbytes() -> int:
    """What can still be allocated without swapping: the machine's MemAvailable, or less under a cgroup limit."""
    meminfo = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    available = int(meminfo["MemAvailable"].split()[0]) * 1024
    for group in _cgroups():
        for limit_name, used_name, cache_name in _CGROUP_FILES:
            with contextlib.suppress(OSError, ValueError):  # ValueError: the limit is the word "max"
                limit = int((group / limit_name).read_text())
                used = int((group / used_name).read_text())
                available = min(available, limit - used + _reclaimable_nbytes(group, cache_name))
    return max(0, available)


def _reclaimable_nbytes(group: Path, name: str) -> int:
    """Of what a cgroup uses: file cache that the kernel drops first. After a look at a data set it is nearly all."""
    with contextlib.suppress(OSError):
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        return int(stat.get(name, 0))
    return 0


def _cgroups() -> list[Path]:
    """This process's cgroups and all above them: each may carry a limit."""
    groups: list[Path] = []
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers in ("", "memory"):  # version 2, or 1
                root = Path("/sys/fs/cgroup", controllers)
                group = root / path.lstrip("/")
                groups += [group, *(parent for parent in group.parents if parent.is_relative_to(root))]
    return groups
