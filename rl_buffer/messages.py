"""The protocol: what travels between clients and the server, and how it is laid out.

Three kinds of traffic, no pickle in any:

* attach  (AF_UNIX SEQPACKET, msgpack): hello, table descriptions and file descriptors; its end-of-file and the
  process behind it tell the server who is alive.
* control (zmq, msgpack): one request, one reply, matched by `request_id`.
* hot     (zmq): one frame each, a fixed little-endian header and raw arrays behind it.

      | kind u8 | 3 pad | count u32 | epoch u64 | header rest ... | arrays of `count` elements ... | tail |

Clients know rows by number only; everything that a frame names is checked by the server before it acts on it.
"""

import struct
from typing import Any, NamedTuple, TypeVar

import msgspec
import numpy as np
from numpy.typing import NDArray

from rl_buffer.errors import InvalidInput
from rl_buffer.spec import Field
from rl_buffer.stats_tracker import Episode
from rl_buffer.tables import ReplayTable, Sample, StatsConfig

_Message = TypeVar("_Message")

PROTOCOL_VERSION = 1
MAX_MESSAGE_NBYTES = 16 << 20
MAX_ROWS_PER_MESSAGE = 1 << 18  # 256 Ki rows of 32 bytes stay under the message limit
MAX_ATTACH_NBYTES = 1 << 17  # one SEQPACKET message; a network of 1,000 tensors needs about 50 KB
TOKEN_NBYTES = 16
CHANNEL_ID_NBYTES = TOKEN_NBYTES + 4

# First byte of every zmq frame.
CONTROL, COMMIT, GRANT, CREDIT, BATCH, REFUSAL = range(1, 7)

_HEAD = struct.Struct("<B3xIQ")
_COMMIT = struct.Struct("<B3xIQQqII")
_GRANT = struct.Struct("<B3xIQQ")
_CREDIT = struct.Struct("<B3xIQII")
_BATCH = struct.Struct("<B3xIQQdI4x")


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
    episodes = _decode(_EPISODES, frame[start:]) if len(frame) > start else []
    return Commit(epoch, num_rows, sequence, version, num_wanted, td_errors, episodes)


class Grant(NamedTuple):
    """Server to writer: commits up to `acknowledged` are published; these rows are yours to write, in this order."""

    epoch: int
    acknowledged: int
    rows: NDArray[np.int64]

    def encode(self) -> bytes:
        """One frame."""
        return _GRANT.pack(GRANT, len(self.rows), self.epoch, self.acknowledged) + self.rows.tobytes()


def decode_grant(frame: bytes) -> Grant:
    """Unpack; raises InvalidInput."""
    _, num_rows, epoch, acknowledged = _unpack(_GRANT, frame)
    return Grant(epoch, acknowledged, _array(frame, _GRANT.size, num_rows, np.int64))


class Credit(NamedTuple):
    """Sampler to server: new priorities, and leave to send `num_credits` more batches."""

    epoch: int
    num_credits: int
    num_overtaken: int  # rows replaced by spares since the last credit
    rows: NDArray[np.int64]  # [N] whose priorities change
    generations: NDArray[np.int64]  # [N]
    td_errors: NDArray[np.float64]  # [N]

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
    """Server to sampler: one granted batch, its spares last."""

    epoch: int
    batch_size: int
    sample: Sample

    def encode(self) -> bytes:
        """One frame."""
        sample = self.sample
        head = _BATCH.pack(BATCH, len(sample.rows), self.epoch, sample.num_items, sample.total_mass, self.batch_size)
        return b"".join((head, sample.rows.tobytes(), sample.generations.tobytes(), sample.masses.tobytes()))


def decode_batch(frame: bytes) -> Batch:
    """Unpack; raises InvalidInput."""
    _, count, epoch, num_items, total_mass, batch_size = _unpack(_BATCH, frame)
    start, step = _BATCH.size, 8 * count
    _check_length(frame, start + 3 * step)
    sample = Sample(
        _array(frame, start, count, np.int64),
        _array(frame, start + step, count, np.int64),
        _array(frame, start + 2 * step, count, np.float64),
        total_mass,
        num_items,
    )
    return Batch(epoch, batch_size, sample)


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


# ---- control requests and replies ------------------------------------------------------------------------


class _Request(msgspec.Struct, frozen=True, tag=True):
    """What all control requests share: their class name tags them."""


class OpenWriter(_Request, frozen=True):
    """Let channel `channel` of this client write to `table`; a Grant of `num_wanted` rows follows the reply Opened.

    Its commits are of at most `max_commit_rows`, and it never asks to hold more than `num_wanted` rows at once.
    """

    channel: int
    table: str
    max_commit_rows: int
    num_wanted: int


class OpenSampler(_Request, frozen=True):
    """Let channel `channel` of this client sample `batch_size` items at a time from `table`."""

    channel: int
    table: str
    batch_size: int


class CloseChannel(_Request, frozen=True):
    """The writer or sampler of channel `channel` of the same client is done and will not touch rows again."""

    channel: int


class ReserveParameters(_Request, frozen=True):
    """Which slot may I write the next version of `name` to? The reply is Slot."""

    name: str


class PublishParameters(_Request, frozen=True):
    """Slot `slot` of `name` is written: make it the newest version. The reply is Slot with its version."""

    name: str
    slot: int


class Clear(_Request, frozen=True):
    """Forget all committed items of `table`."""

    table: str


class GetSize(_Request, frozen=True):
    """How many items does `table` hold? The reply is Value."""

    table: str


class GetInfo(_Request, frozen=True):
    """Describe tables, clients and rates. The reply is Value with a dict."""


class GetStats(_Request, frozen=True):
    """The merged StatsTracker. The reply is Value with a dict."""


Request = (
    OpenWriter
    | OpenSampler
    | CloseChannel
    | ReserveParameters
    | PublishParameters
    | Clear
    | GetSize
    | GetInfo
    | GetStats
)


class Opened(msgspec.Struct, frozen=True, tag=True):
    """Done; nothing more to say."""


class Slot(msgspec.Struct, frozen=True, tag=True):
    """A slot of the parameter channel and the version that it holds (0: none yet)."""

    slot: int
    version: int


class Value(msgspec.Struct, frozen=True, tag=True):
    """An answer in plain values."""

    value: Any


class Refused(msgspec.Struct, frozen=True, tag=True):
    """Nothing was changed, for this reason."""

    reason: str


Reply = Opened | Slot | Value | Refused


class Envelope(msgspec.Struct, frozen=True, array_like=True):
    """A control request with the number that its reply repeats."""

    request_id: int
    epoch: int
    request: Request


class ReplyEnvelope(msgspec.Struct, frozen=True, array_like=True):
    """A control reply."""

    request_id: int
    epoch: int
    reply: Reply


# ---- attach ------------------------------------------------------------------------------------------------


class Hello(msgspec.Struct, frozen=True, tag=True):
    """Client to server, first message on the attach connection."""

    protocol_version: int
    name: str  # shown in info(), e.g. "actor-3"


class SegmentInfo(msgspec.Struct, frozen=True):
    """A descriptor that comes with this message, by its position there, and the size to expect."""

    position: int
    nbytes: int


class TableInfo(msgspec.Struct, frozen=True):
    """A table and where its memory is."""

    config: ReplayTable
    digest: str  # of the row layout
    rows: SegmentInfo
    generations: SegmentInfo


class Welcome(msgspec.Struct, frozen=True, tag=True):
    """Server to client: you are attached."""

    epoch: int
    token: bytes  # first part of the routing id of each of the client's zmq sockets
    tables: dict[str, TableInfo]
    stats: StatsConfig


class GetParameters(msgspec.Struct, frozen=True, tag=True):
    """Send me the memory of parameter set `name`."""

    name: str


class CreateParameters(msgspec.Struct, frozen=True, tag=True):
    """The same, made with these fields if it does not exist."""

    name: str
    fields: list[tuple[str, Field]]


class ParametersInfo(msgspec.Struct, frozen=True, tag=True):
    """A parameter set: fields in order, slots, and its memory; `rows` is None while nobody has created it."""

    fields: list[tuple[str, Field]]
    num_slots: int
    rows: SegmentInfo | None
    board: SegmentInfo | None


AttachRequest = Hello | GetParameters | CreateParameters
AttachReply = Welcome | ParametersInfo | Refused

_EPISODES = msgspec.msgpack.Decoder(list[Episode])
_ENVELOPE = msgspec.msgpack.Decoder(Envelope)
_REPLY_ENVELOPE = msgspec.msgpack.Decoder(ReplyEnvelope)
_ATTACH_REQUEST: msgspec.msgpack.Decoder[AttachRequest] = msgspec.msgpack.Decoder(AttachRequest)
_ATTACH_REPLY: msgspec.msgpack.Decoder[AttachReply] = msgspec.msgpack.Decoder(AttachReply)


def encode_control(envelope: Envelope | ReplyEnvelope) -> bytes:
    """One frame: the kind byte and msgpack."""
    return bytes((CONTROL,)) + msgspec.msgpack.encode(envelope)


def decode_control_request(frame: bytes) -> Envelope:
    """Check and unpack; raises InvalidInput."""
    return _decode(_ENVELOPE, frame[1:])


def decode_control_reply(frame: bytes) -> ReplyEnvelope:
    """Unpack; raises InvalidInput."""
    return _decode(_REPLY_ENVELOPE, frame[1:])


def encode_attach(message: AttachRequest | AttachReply) -> bytes:
    """One packet."""
    return msgspec.msgpack.encode(message)


def decode_attach_request(packet: bytes) -> AttachRequest:
    """Check and unpack; raises InvalidInput."""
    return _decode(_ATTACH_REQUEST, packet)


def decode_attach_reply(packet: bytes) -> AttachReply:
    """Unpack; raises InvalidInput."""
    return _decode(_ATTACH_REPLY, packet)


def _decode(decoder: msgspec.msgpack.Decoder[_Message], payload: bytes) -> _Message:
    try:
        return decoder.decode(payload)
    except (msgspec.MsgspecError, InvalidInput, UnicodeDecodeError, RecursionError) as error:
        raise InvalidInput(f"malformed message: {error}") from error


# ---- parent and server process -----------------------------------------------------------------------------


class ServerConfig(msgspec.Struct, frozen=True):
    """What the parent sends by stdin."""

    address: str
    tables: dict[str, ReplayTable]
    stats: StatsConfig


class ServerStatus(msgspec.Struct, frozen=True):
    """What the server says by stdout, a line each: reserved bytes while it starts, then `ready` or `error`."""

    ready: bool = False
    error: str = ""
    error_class: str = ""
    reserved_nbytes: int = 0
    total_nbytes: int = 0
