"""Hot messages: one zmq frame each, a fixed little-endian header and raw arrays behind it.

    | kind u8 | 3 pad | count u32 | epoch u64 | header rest ... | arrays of `count` elements ... | tail |

Rows are known by number only; everything that a frame names is checked by the server before it acts on it. The typed
messages off the hot path are in `messages`.
"""

import struct
from typing import Annotated, Any, NamedTuple, TypeVar

import msgspec
import numpy as np
from numpy.typing import NDArray

from rl_buffer.errors import InvalidInput
from rl_buffer.stats_tracker import Episode
from rl_buffer.tables import Sample

_Message = TypeVar("_Message")

MAX_MESSAGE_NBYTES = 16 << 20
MAX_ROWS_PER_MESSAGE = 1 << 18  # 256 Ki rows of 32 bytes stay under the message limit
MAX_EPISODES_PER_MESSAGE = MAX_ROWS_PER_MESSAGE // 2  # as many as rows in a commit; each costs the server 5 us
TOKEN_NBYTES = 16
CHANNEL_ID_NBYTES = TOKEN_NBYTES + 4

_EPISODES = msgspec.msgpack.Decoder(Annotated[list[Episode], msgspec.Meta(max_length=MAX_EPISODES_PER_MESSAGE)])

# First byte of every zmq frame.
CONTROL, COMMIT, GRANT, CREDIT, BATCH, REFUSAL = range(1, 7)

_HEAD = struct.Struct("<B3xIQ")
_COMMIT = struct.Struct("<B3xIQQqII")
_GRANT = struct.Struct("<B3xIQQQ")
_CREDIT = struct.Struct("<B3xIQII")
_BATCH = struct.Struct("<B3xIQQdII")


class Commit(NamedTuple):
    """Writer to server: publish the oldest `num_rows` rows that I hold, and let me hold `num_wanted` more."""

    epoch: int
    num_rows: int
    sequence: int  # 1, 2, ... per writer; a repeated or skipped one is refused
    parameter_version: int  # that the actor used last, 0 if none
    num_wanted: int
    td_errors: NDArray[np.float64] | None  # [num_rows], NaN: unknown
    episodes: list[Episode]

    def encode(self) -> bytes:
        """One frame."""
        head = _COMMIT.pack(
            COMMIT,
            self.num_rows,
            self.epoch,
            self.sequence,
            self.parameter_version,
            self.num_wanted,
            self.td_errors is not None,
        )
        td_errors = b"" if self.td_errors is None else np.ascontiguousarray(self.td_errors, np.float64).tobytes()
        tail = msgspec.msgpack.encode(self.episodes) if self.episodes else b""
        return b"".join((head, td_errors, tail))


def decode_commit(frame: bytes) -> Commit:
    """Check and unpack; raises InvalidInput."""
    _, num_rows, epoch, sequence, version, num_wanted, has_td_errors = _unpack(_COMMIT, frame)
    start, td_errors = _COMMIT.size, None
    if has_td_errors:
        td_errors = _array(frame, start, num_rows, np.float64)
        start += td_errors.nbytes
    episodes = decode_msgpack(_EPISODES, frame[start:]) if len(frame) > start else []
    return Commit(epoch, num_rows, sequence, version, num_wanted, td_errors, episodes)


class Grant(NamedTuple):
    """Server to writer: commits up to `acknowledged` are published; these rows are yours to write, in this order."""

    epoch: int
    number: int  # 1, 2, ... per channel
    acknowledged: int
    rows: NDArray[np.int64]

    def encode(self) -> bytes:
        """One frame."""
        return _GRANT.pack(GRANT, len(self.rows), self.epoch, self.number, self.acknowledged) + self.rows.tobytes()


def decode_grant(frame: bytes, expected_number: int | None = None) -> Grant:
    """Unpack; raises InvalidInput, also where another grant was expected: then the two sides' queues of rows differ."""
    _, num_rows, epoch, number, acknowledged = _unpack(_GRANT, frame)
    if expected_number not in (None, number):
        raise InvalidInput(f"grant {number} came instead of {expected_number}; close this writer and make a new one")
    return Grant(epoch, number, acknowledged, _array(frame, _GRANT.size, num_rows, np.int64))


class Credit(NamedTuple):
    """Sampler to server: new priorities, and leave to send `num_credits` more batches."""

    epoch: int
    num_credits: int
    num_overtaken: int  # rows replaced by spares since the last credit
    rows: NDArray[np.int64]  # [N] whose priorities change
    generations: NDArray[np.int64]  # [N]
    td_errors: NDArray[np.float64]  # [N]; NaN: this item of a table whose items leave was copied

    def encode(self) -> bytes:
        """One frame."""
        head = _CREDIT.pack(CREDIT, len(self.rows), self.epoch, self.num_credits, self.num_overtaken)
        if not len(self.rows):
            return head
        return b"".join((head, self.rows.tobytes(), self.generations.tobytes(), self.td_errors.tobytes()))


def decode_credit(frame: bytes) -> Credit:
    """Check and unpack; raises InvalidInput."""
    _, count, epoch, num_credits, num_overtaken = _unpack(_CREDIT, frame)
    start, step = _CREDIT.size, 8 * count
    _check_length(frame, start + 3 * step)
    return Credit(
        epoch,
        num_credits,
        num_overtaken,
        _array(frame, start, count, np.int64),
        _array(frame, start + step, count, np.int64),
        _array(frame, start + 2 * step, count, np.float64),
    )


class Batch(NamedTuple):
    """Server to sampler: granted batches, drawn at one moment, one after the other, each with its spares last."""

    epoch: int
    batch_size: int
    sample: Sample  # of all of them
    num_batches: int = 1

    def encode(self) -> bytes:
        """One frame."""
        sample = self.sample
        head = _BATCH.pack(
            BATCH,
            len(sample.rows),
            self.epoch,
            sample.num_items,
            sample.total_mass,
            self.batch_size,
            self.num_batches,
        )
        return b"".join((head, sample.rows.tobytes(), sample.generations.tobytes(), sample.masses.tobytes()))

    def samples(self) -> list[Sample]:
        """That of each batch, as views."""
        rows, generations, masses, total_mass, num_items = self.sample
        step = len(rows) // self.num_batches
        parts = [slice(number * step, (number + 1) * step) for number in range(self.num_batches)]
        return [Sample(rows[part], generations[part], masses[part], total_mass, num_items) for part in parts]


def decode_batch(frame: bytes) -> Batch:
    """Unpack; raises InvalidInput."""
    _, count, epoch, num_items, total_mass, batch_size, num_batches = _unpack(_BATCH, frame)
    _check_length(frame, _BATCH.size + 24 * count)
    if not num_batches or count % num_batches:
        raise InvalidInput(f"message has {count} rows for {num_batches} batches")
    numbers = np.frombuffer(frame, np.int64, -1, _BATCH.size)
    masses = numbers[2 * count :].view(np.float64)
    sample = Sample(numbers[:count], numbers[count : 2 * count], masses, total_mass, num_items)
    return Batch(epoch, batch_size, sample, num_batches)


def encode_refusal(epoch: int, reason: str) -> bytes:
    """Server to a writer or sampler: your last message changed nothing, for this reason."""
    return _HEAD.pack(REFUSAL, 0, epoch) + reason.encode()


def decode_refusal(frame: bytes) -> tuple[int, str]:
    """(epoch of the server that refused, reason)."""
    _, _, epoch = _unpack(_HEAD, frame)
    return epoch, frame[_HEAD.size :].decode(errors="replace")


def kind_of(frame: bytes) -> int:
    """First byte, or 0 of an empty frame."""
    return frame[0] if frame else 0


def _unpack(layout: struct.Struct, frame: bytes) -> tuple[Any, ...]:
    if len(frame) < layout.size:
        raise InvalidInput(f"message of {len(frame)} bytes is shorter than its header of {layout.size}")
    fields = layout.unpack_from(frame)
    if fields[1] > MAX_ROWS_PER_MESSAGE:
        raise InvalidInput(f"message names {fields[1]} rows, more than the limit of {MAX_ROWS_PER_MESSAGE}")
    return fields


def _array(frame: bytes, start: int, count: int, dtype: type) -> NDArray[Any]:
    if len(frame) < start + 8 * count:
        raise InvalidInput(f"message of {len(frame)} bytes is too short for {count} elements at byte {start}")
    return np.frombuffer(frame, dtype, count, start)


def _check_length(frame: bytes, nbytes: int) -> None:
    if len(frame) != nbytes:
        raise InvalidInput(f"message has {len(frame)} bytes, its counts say {nbytes}")


def decode_msgpack(decoder: msgspec.msgpack.Decoder[_Message], payload: bytes) -> _Message:
    """Decode and check against the type; raises InvalidInput for anything else."""
    try:
        return decoder.decode(payload)
    except (msgspec.MsgspecError, InvalidInput, UnicodeDecodeError, RecursionError) as error:
        raise InvalidInput(f"malformed message: {error}") from error
