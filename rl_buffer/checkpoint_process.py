"""The process that writes one checkpoint, so that neither the disk nor this interpreter stops the server.

Started by the server as `python -m rl_buffer.checkpoint_process`, with its end of a socket (SEQPACKET) as stdin:

    server                      this process
    WriteCheckpoint  ------->   opens the file, reserves memory for the cut
                     <-------   CutMemory, with its descriptor
    CutTaken         ------->   with the segments' descriptors; copies
                     <-------   RowsCopied, after every piece: these rows may be written again
                     <-------   CheckpointWritten: it is on the disk

    or, at any time  <-------   CheckpointFailed

When the server is gone it ends with the next piece, and removes what it has written; after the last one it finishes.
What it leaves when it is killed itself is for the server to remove, or for whoever writes to the same path next.
"""

import contextlib
import mmap
import os
import socket
import sys
from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np

from rl_buffer.checkpoint import Source
from rl_buffer.checkpoint_file import PIECE_NBYTES, CheckpointWriter, remove_unfinished
from rl_buffer.errors import NotEnoughMemory, RLBufferError
from rl_buffer.failpoints import reached
from rl_buffer.storage import available_memory_nbytes

_MAX_PACKET_NBYTES = 1 << 17
_MAX_FDS = 253  # SCM_MAX_FD of Linux


class WriteCheckpoint(msgspec.Struct, frozen=True, tag=True):
    """Write one to `path`."""

    path: str
    cut_nbytes: int  # to reserve


class RemoveUnfinished(msgspec.Struct, frozen=True, tag=True):
    """Remove what a killed process left of `path`, and end."""

    path: str


class CutMemory(msgspec.Struct, frozen=True, tag=True):
    """Write the cut into the memory that comes with this."""


class CutTaken(msgspec.Struct, frozen=True, tag=True):
    """The cut is written; copy these. The segments' descriptors come with this, in their order."""

    sources: list[Source]
    segments: list[str]
    contents_offset: int  # of the JSON for the file's header, in the cut's memory
    contents_nbytes: int


class RowsCopied(msgspec.Struct, frozen=True, tag=True):
    """`num_rows` more rows of a part are in the file, in its order."""

    part: str
    num_rows: int


class CheckpointWritten(msgspec.Struct, frozen=True, tag=True):
    """The checkpoint has its name and is on the disk."""

    nbytes: int


class CheckpointFailed(msgspec.Struct, frozen=True, tag=True):
    """There is no new checkpoint; the one before is as it was."""

    reason: str


Order = WriteCheckpoint | RemoveUnfinished
Status = CutMemory | RowsCopied | CheckpointWritten | CheckpointFailed


def send(end: socket.socket, message: Order | Status | CutTaken, fds: Sequence[int] = ()) -> None:
    """One packet."""
    socket.send_fds(end, [msgspec.msgpack.encode(message)], list(fds))


def receive(end: socket.socket, kinds: Any) -> tuple[Any, list[int]]:
    """The next packet, of one of these kinds, and the descriptors that came with it.

    Raises:
        EOFError: the other side has ended.
    """
    packet, fds, _, _ = socket.recv_fds(end, _MAX_PACKET_NBYTES, _MAX_FDS)
    if not packet:
        raise EOFError
    return msgspec.msgpack.decode(packet, type=kinds), fds


def main() -> None:
    """Do what the server asks."""
    server = socket.socket(fileno=os.dup(sys.stdin.fileno()))
    try:
        match receive(server, Order)[0]:
            case RemoveUnfinished(path=path):
                remove_unfinished(path)
            case WriteCheckpoint(path=path, cut_nbytes=cut_nbytes):
                with CheckpointWriter(path) as file:
                    _write(file, cut_nbytes, server)
    except (RLBufferError, OSError, EOFError) as error:
        with contextlib.suppress(OSError):  # the server is gone
            send(server, CheckpointFailed(str(error)))


def _write(file: CheckpointWriter, cut_nbytes: int, server: socket.socket) -> None:
    reached("checkpoint.opened")
    available_nbytes = available_memory_nbytes()
    if cut_nbytes > available_nbytes:
        raise NotEnoughMemory(
            f"a checkpoint needs {cut_nbytes:,} bytes of memory, for a copy of priorities and row numbers, and "
            f"{available_nbytes:,} are available"
        )
    cut_fd = os.memfd_create("rl_buffer:cut", os.MFD_CLOEXEC)
    if cut_nbytes:
        os.posix_fallocate(cut_fd, 0, cut_nbytes)  # here, because it would take the server as long as writing does
    reached("checkpoint.reserved")
    send(server, CutMemory(), [cut_fd])
    cut, fds = receive(server, CutTaken)
    memory = {
        name: mmap.mmap(fd, 0, mmap.MAP_SHARED, mmap.PROT_READ)
        for name, fd in zip(["", *cut.segments], [cut_fd, *fds], strict=True)
    }
    contents = memory[""][cut.contents_offset : cut.contents_offset + cut.contents_nbytes].decode()
    file.begin(contents, {source.part: source.file_part for source in cut.sources})
    reached("checkpoint.begun")
    for source in cut.sources:
        rows = np.ndarray((source.num_rows, *source.shape), source.dtype, memory[source.segment], source.offset)
        order = np.frombuffer(memory[""], np.int64, source.num_items, source.order_offset)
        rows_per_piece = max(1, PIECE_NBYTES // rows[:1].nbytes)
        for start in range(0, source.num_items, rows_per_piece):
            piece = rows.take(order[start : start + rows_per_piece], axis=0)
            file.write(piece)
            reached("checkpoint.copied")
            send(server, RowsCopied(source.part, len(piece)))
    nbytes = file.finish()
    reached("checkpoint.finished")
    send(server, CheckpointWritten(nbytes))


if __name__ == "__main__":
    main()
