"""One checkpoint on disk: a description and arrays, each with a checksum, written and read piece by piece. No pickle.

It is a safetensors file, so that other programs can look into it:

    | header's length u64 | header: JSON, with the description | part | part | ... | checksums int64 |

    checksums: CRC-32 of each part in order, and at last of all that comes before the first part and of those checksums

A part is an array of int64 or float64. The file grows beside its name, as `.NAME.unfinished`, locked by its writer, and
takes the name when it is on the disk. So a kill at any moment leaves the file before it, and an unfinished file whose
lock is free is nobody's.
"""

import contextlib
import fcntl
import json
import math
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rl_buffer.errors import InvalidInput
from rl_buffer.failpoints import reached

PIECE_NBYTES = 4 << 20  # read or written at a time
_KEY = "rl_buffer_checkpoint"
_CHECKSUMS = "checksums"
_DTYPES = {"I64": np.dtype(np.int64), "F64": np.dtype(np.float64)}
_MAX_HEADER_NBYTES = 100 << 20  # the limit of safetensors
_LENGTH_NBYTES = 8


class Part(NamedTuple):
    """One array: int64 or float64."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        """Of its elements."""
        return 8 * math.prod(self.shape)


class CheckpointWriter:
    """The file that becomes a checkpoint when `finish` is called, and is removed if its `with` block ends before."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Make the unfinished file, in the place of one whose writer was killed.

        Raises:
            InvalidInput: `path` cannot be a checkpoint, or somebody else is writing one there.
            OSError: it cannot be made.
        """
        self._path = Path(path)
        if not self._path.parent.is_dir():
            raise InvalidInput(f"there is no directory {self._path.parent} for a checkpoint; make it first")
        if self._path.is_dir():
            raise InvalidInput(f"{self._path} is a directory; a checkpoint is one file")
        self._fd = _lock_unfinished(self._path)
        self._nbytes = self._need_nbytes = 0
        self._unwritten: list[int] = []  # bytes still to come of each part
        self._checksums: list[int] = []  # of the parts so far, the last one still growing
        self._header_checksum = 0

    def __enter__(self) -> "CheckpointWriter":
        return self

    def __exit__(self, *_: object) -> None:
        if self._fd >= 0:
            unfinished_path(self._path).unlink(missing_ok=True)
            self._close()

    def begin(self, description: str, parts: Mapping[str, Part]) -> None:
        """Write the header with a description in JSON; the parts follow by `write`, in their order.

        Raises:
            OSError: it cannot be written.
        """
        listed = {**parts, _CHECKSUMS: Part((len(parts) + 1,), "int64")}
        tensors: dict[str, Any] = {"__metadata__": {_KEY: description}}
        offset = 0
        codes = {str(dtype): code for code, dtype in _DTYPES.items()}
        for name, part in listed.items():
            end = offset + part.nbytes
            tensors[name] = {"dtype": codes[part.dtype], "shape": part.shape, "data_offsets": (offset, end)}
            offset = end
        header = json.dumps(tensors).encode()
        header += b" " * (-len(header) % 8)  # so that a mapping of the file is aligned
        prefix = len(header).to_bytes(_LENGTH_NBYTES, "little") + header
        self._need_nbytes = len(prefix) + offset
        self._unwritten = [part.nbytes for part in parts.values()]
        self._checksums = [0]
        self._header_checksum = zlib.crc32(prefix)
        self._append(memoryview(prefix))
        self._end_parts()

    def write(self, piece: NDArray[Any]) -> None:
        """Append to the part that is not complete yet; a contiguous array that does not go beyond it.

        Raises:
            OSError: it cannot be written, such as for want of room.
        """
        assert piece.nbytes <= self._unwritten[0], "more than the part was to have"
        data = bytes_of(piece)
        self._checksums[-1] = zlib.crc32(data, self._checksums[-1])
        self._append(data)
        self._unwritten[0] -= len(data)
        self._end_parts()

    def finish(self) -> int:
        """Put the file on the disk and give it its name; return its bytes.

        Raises:
            OSError: it cannot be written. What was there before is there.
        """
        assert not self._unwritten, f"{len(self._unwritten)} parts are not complete"
        checksums = np.array(self._checksums)
        checksums[-1] = _last_checksum(self._header_checksum, checksums)
        self._append(bytes_of(checksums))
        reached("checkpoint.written")
        os.fsync(self._fd)
        reached("checkpoint.synchronised")
        os.replace(unfinished_path(self._path), self._path)
        reached("checkpoint.renamed")
        directory = os.open(self._path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)  # the name
        finally:
            os.close(directory)
        self._close()
        return self._nbytes

    def _end_parts(self) -> None:
        while self._unwritten and not self._unwritten[0]:
            del self._unwritten[0]
            self._checksums.append(0)

    def _append(self, data: memoryview) -> None:
        try:
            while data:
                num_written = os.write(self._fd, data)
                self._nbytes += num_written
                data = data[num_written:]
        except OSError as error:
            status = os.statvfs(self._path.parent)
            raise OSError(
                f"{error.strerror} after {self._nbytes:,} of the {self._need_nbytes:,} bytes of the checkpoint; "
                f"{self._path.parent} has {status.f_bavail * status.f_frsize:,} free"
            ) from error

    def _close(self) -> None:
        os.close(self._fd)  # and the lock goes
        self._fd = -1


def unfinished_path(path: str | os.PathLike[str]) -> Path:
    """Where the checkpoint `path` grows."""
    path = Path(path)
    return path.with_name(f".{path.name}.unfinished")


def remove_unfinished(path: str | os.PathLike[str]) -> None:
    """Remove what a killed writer of `path` left, if anything; nobody else's.

    Raises:
        OSError: it cannot be removed.
    """
    if unfinished_path(path).exists():
        with contextlib.suppress(InvalidInput), CheckpointWriter(path):
            pass


def _lock_unfinished(path: Path) -> int:
    """The unfinished file, empty, ours as long as the returned descriptor is open."""
    unfinished = unfinished_path(path)
    while True:
        # Not readable by others: nor is the server's socket.
        fd = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Between our open and our lock the last writer may have renamed it: then it is a checkpoint.
            with contextlib.suppress(FileNotFoundError):
                if os.fstat(fd).st_ino == os.stat(unfinished).st_ino:
                    os.ftruncate(fd, 0)
                    return fd
        except BlockingIOError:
            os.close(fd)
            raise InvalidInput(f"another process is writing a checkpoint to {path}; choose another path") from None
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)


class CheckpointReader:
    """A checkpoint whose header is whole; each part is compared with its checksum when it is read.

    Use it in a `with` block.

    Attributes:
        path: of the file.
        description: as it was given.
        parts: by name, in order.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Open it.

        Raises:
            InvalidInput: there is none, or it is damaged.
        """
        self.path = os.fspath(path)
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise InvalidInput(f"there is no checkpoint at {self.path}: {error.strerror}") from error
        try:
            self.description: dict[str, Any]
            self.parts, self._offsets, self._checksums = self._read_header()
        except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError, OSError) as error:
            os.close(self._fd)
            if isinstance(error, InvalidInput):
                raise
            raise InvalidInput(f"{self.path} is no checkpoint, or its header is damaged: {error!r}") from error
        except BaseException:
            os.close(self._fd)
            raise

    def __enter__(self) -> "CheckpointReader":
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)

    def read_into(self, name: str, array: NDArray[Any]) -> None:
        """Fill a contiguous array of the part's size.

        Raises:
            InvalidInput: there is no such part, it is of another size, or it is damaged: the array's content is then
                worth nothing.
        """
        if name not in self.parts:
            raise InvalidInput(f"{self.path} has no part {name!r}; it has {sorted(self.parts)}")
        data = bytes_of(array)
        if len(data) != self.parts[name].nbytes:
            raise InvalidInput(f"part {name!r} of {self.path} has {self.parts[name].nbytes} bytes, not {len(data)}")
        checksum = 0
        for start in range(0, len(data), PIECE_NBYTES):
            piece = data[start : start + PIECE_NBYTES]
            self._read(piece, self._offsets[name] + start)
            checksum = zlib.crc32(piece, checksum)
        if checksum != self._checksums[name]:
            raise InvalidInput(
                f"part {name!r} of {self.path} is damaged: its checksum is {checksum:08x}, and was "
                f"{self._checksums[name]:08x} when it was written; use another checkpoint"
            )

    def array(self, name: str) -> NDArray[Any]:
        """One part.

        Raises:
            InvalidInput: there is no such part, or it is damaged.
        """
        part = self.parts.get(name, Part((0,), "int64"))
        array = np.empty(part.shape, part.dtype)
        self.read_into(name, array)
        return array

    def _read_header(self) -> tuple[dict[str, Part], dict[str, int], dict[str, int]]:
        file_nbytes = os.fstat(self._fd).st_size
        length = bytearray(_LENGTH_NBYTES)
        self._read(memoryview(length), 0)
        header_nbytes = int.from_bytes(length, "little")
        if header_nbytes > min(file_nbytes, _MAX_HEADER_NBYTES):
            raise ValueError(f"a header of {header_nbytes} bytes")
        header = bytearray(header_nbytes)
        self._read(memoryview(header), _LENGTH_NBYTES)
        tensors = json.loads(header)
        self.description = json.loads(tensors.pop("__metadata__")[_KEY])
        parts, offsets, start = {}, {}, _LENGTH_NBYTES + header_nbytes
        for name, tensor in tensors.items():
            part = Part(tuple(tensor["shape"]), str(_DTYPES[tensor["dtype"]]))
            if min(part.shape) < 0 or tensor["data_offsets"][1] - tensor["data_offsets"][0] != part.nbytes:
                raise ValueError(f"part {name!r} is {tensor}")
            parts[name], offsets[name] = part, start
            start += part.nbytes
        if start != file_nbytes:
            raise ValueError(f"the file has {file_nbytes} bytes, and the parts in its header would end at {start}")
        checksums = np.empty(parts.pop(_CHECKSUMS).shape, np.int64)
        self._read(bytes_of(checksums), offsets[_CHECKSUMS])
        if checksums[-1] != _last_checksum(zlib.crc32(length + header), checksums):
            raise ValueError("it does not have its checksum")
        return parts, offsets, dict(zip(parts, checksums[:-1].tolist(), strict=True))

    def _read(self, data: memoryview, offset: int) -> None:
        while data:
            num_read = os.preadv(self._fd, [data], offset)
            if not num_read:
                raise InvalidInput(f"{self.path} is no checkpoint, or cut short: it ends after {offset} bytes")
            data, offset = data[num_read:], offset + num_read


def _last_checksum(header_checksum: int, checksums: NDArray[np.int64]) -> int:
    return zlib.crc32(bytes_of(checksums[:-1]), header_checksum)


def bytes_of(array: NDArray[Any]) -> memoryview:
    """Of a contiguous array; nothing is copied."""
    # Not cast("B"), which refuses arrays without elements.
    data: Any = array.reshape(-1).view(np.uint8)
    return memoryview(data)
