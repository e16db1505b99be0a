"""Typed messages off the hot path, in msgpack: what a client asks, what the server answers.

* attach  (AF_UNIX SEQPACKET): hello, table descriptions and file descriptors; its end-of-file and the process behind it
  tell the server who is alive.
* control (zmq): one request, one reply, matched by `request_id`.
* stdin and stdout of the server process (JSON): configuration, and when it is ready.

The messages that flow all the time are in `frames`. No pickle in any.
"""

from typing import Any

import msgspec

from rl_buffer.frames import CONTROL, decode_msgpack
from rl_buffer.rate_limiters import LimiterConfig
from rl_buffer.spec import Field
from rl_buffer.tables import CheckpointReport, ReplayTable, RolloutTable, StatsConfig

PROTOCOL_VERSION = 5
MAX_ATTACH_NBYTES = 1 << 17  # one SEQPACKET message; a network of 1,000 tensors needs about 50 KB

# ---- control requests and replies ------------------------------------------------------------------------


class _Request(msgspec.Struct, frozen=True, tag=True):
    """What all control requests share: their class name tags them."""


class OpenWriter(_Request, frozen=True):
    """Let channel `channel` of this client write to `table`; a Grant of `num_wanted` rows follows the reply Opened.

    Its commits are of at most `max_commit_rows`, and it never asks to hold more than `num_wanted` rows at once. One
    that goes on, because its server or its connection was lost, says which `writer_id` it had.
    """

    channel: int
    table: str
    max_commit_rows: int
    num_wanted: int
    writer_id: bytes = b""  # 16 random bytes, made once per writer; none: it will not go on
    acknowledged: int = 0  # the last commit of which it knows that all is published


class OpenSampler(_Request, frozen=True):
    """Let channel `channel` of this client sample `batch_size` items at a time from `table`."""

    channel: int
    table: str
    batch_size: int


class OpenReader(_Request, frozen=True):
    """Let channel `channel` of this client read the fragments of rollout table `table`, as many as it gives credits."""

    channel: int
    table: str


class CloseChannel(_Request, frozen=True):
    """The writer, sampler or reader of channel `channel` of this client is done and will not touch rows again."""

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


class SetRateLimiter(_Request, frozen=True):
    """Let `table` work by another rate limiter from now on."""

    table: str
    limiter: LimiterConfig


class GetSize(_Request, frozen=True):
    """How many items does `table` hold? The reply is Value."""

    table: str


class GetInfo(_Request, frozen=True):
    """Describe tables, clients and rates. The reply is Value with a dict."""


class GetStats(_Request, frozen=True):
    """The statistics of all episodes, if wanted of each client as well. The reply is Value with a dict of numbers."""

    per_client: bool = False


class Checkpoint(_Request, frozen=True):
    """Write everything to the file `path`, absolute. The reply is CheckpointReport, when it is on the disk."""

    path: str


Request = (
    OpenWriter
    | OpenSampler
    | OpenReader
    | CloseChannel
    | ReserveParameters
    | PublishParameters
    | Clear
    | SetRateLimiter
    | GetSize
    | GetInfo
    | GetStats
    | Checkpoint
)


class Opened(msgspec.Struct, frozen=True, tag=True):
    """Done. Of a writer the server knows more: how much of what it sent is published, and must not be sent again.

    Commits up to `sequence` are, and of the next one, as it was first sent, the first `num_published` rows. The commits
    on this channel are numbered `sequence` + 1, `sequence` + 2, ...
    """

    sequence: int = 0
    num_published: int = 0


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


Reply = Opened | Slot | Value | CheckpointReport | Refused


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
    previous: bytes = b""  # the token of this process's session before: nothing is written any more into what it held


class SegmentInfo(msgspec.Struct, frozen=True):
    """A descriptor that comes with this message, by its position there, and the size to expect."""

    position: int
    nbytes: int
    sealed: bool = True  # False: a file of a directory


class TableInfo(msgspec.Struct, frozen=True):
    """A table and where its memory is."""

    config: ReplayTable | RolloutTable
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

_ENVELOPE = msgspec.msgpack.Decoder(Envelope)
_REPLY_ENVELOPE = msgspec.msgpack.Decoder(ReplyEnvelope)
_ATTACH_REQUEST: msgspec.msgpack.Decoder[AttachRequest] = msgspec.msgpack.Decoder(AttachRequest)
_ATTACH_REPLY: msgspec.msgpack.Decoder[AttachReply] = msgspec.msgpack.Decoder(AttachReply)


def encode_control(envelope: Envelope | ReplyEnvelope) -> bytes:
    """One frame: the kind byte and msgpack."""
    return bytes((CONTROL,)) + msgspec.msgpack.encode(envelope)


def decode_control_request(frame: bytes) -> Envelope:
    """Check and unpack; raises InvalidInput."""
    return decode_msgpack(_ENVELOPE, frame[1:])


def decode_control_reply(frame: bytes) -> ReplyEnvelope:
    """Unpack; raises InvalidInput."""
    return decode_msgpack(_REPLY_ENVELOPE, frame[1:])


def encode_attach(message: AttachRequest | AttachReply) -> bytes:
    """One packet."""
    return msgspec.msgpack.encode(message)


def decode_attach_request(packet: bytes) -> AttachRequest:
    """Check and unpack; raises InvalidInput."""
    return decode_msgpack(_ATTACH_REQUEST, packet)


def decode_attach_reply(packet: bytes) -> AttachReply:
    """Unpack; raises InvalidInput."""
    return decode_msgpack(_ATTACH_REPLY, packet)


# ---- parent and server process -----------------------------------------------------------------------------


class ServerConfig(msgspec.Struct, frozen=True):
    """What the parent sends by stdin."""

    address: str
    tables: dict[str, ReplayTable | RolloutTable]
    stats: StatsConfig
    parent_pid: int
    restore: str | None = None  # path of a checkpoint
    directory: str | None = None  # where the tables are kept; None: in memory that ends with the server
    allowed_uids: tuple[int, ...] = ()  # users besides the server's own whose processes may attach


class ServerStatus(msgspec.Struct, frozen=True):
    """What the server says by stdout, a line each: reserved bytes while it starts, then `ready` or `error`."""

    ready: bool = False
    error: str = ""
    error_class: str = ""
    reserved_nbytes: int = 0
    total_nbytes: int = 0
