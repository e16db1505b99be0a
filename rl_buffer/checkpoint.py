"""What a checkpoint holds: everything that a server knows of its tables at one moment, and their committed rows.

    take_cut (server, one turn)  -->  copy (a process of its own)  -->  restore (another server, before it is bound)

The bookkeeping of all tables is taken at once, which makes them consistent with each other, and the rows in it stay as
they are until they are copied, in the order of their commits and without the free ones. So a checkpoint fits a table of
another headroom, or of more capacity. Rows that are reserved or wait for the limiter are not in it, nor are episodes
that a commit brought which is not published whole.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from rl_buffer.checkpoint_file import CheckpointReader, Part
from rl_buffer.errors import InvalidInput
from rl_buffer.parameter_slots import NUM_SLOTS, ParameterSlots
from rl_buffer.spec import Field
from rl_buffer.stats_tracker import StatsTracker
from rl_buffer.table_states import TableState
from rl_buffer.tables import ReplayTable, RolloutTable

_FORMAT = 1
_WORD_NBYTES = 8
_MAY_DIFFER = {"capacity", "headroom", "num_fragments", "seed"}


class TableContents(msgspec.Struct, frozen=True):
    """A table without its rows."""

    config: ReplayTable | RolloutTable
    digest: str  # of the row layout
    num_items: int
    values: dict[str, Any]  # see `TableCut`


class ParameterContents(msgspec.Struct, frozen=True):
    """The newest version of a parameter set without its arrays."""

    fields: list[tuple[str, Field]]
    version: int


class Contents(msgspec.Struct, frozen=True):
    """The description in the file's header."""

    format: int
    tables: dict[str, TableContents]
    parameters: dict[str, ParameterContents]
    stats: dict[str, Any]
    writers: dict[str, tuple[int, int]]  # what is published of each, by writer_id in hexadecimal


class Source(msgspec.Struct, frozen=True):
    """A part of the file, and the rows that it is made of: some of a segment's, in an order that the cut has."""

    part: str
    segment: str  # the part that it is the memory of; "" is that of the cut
    offset: int  # of row 0 in the segment, in bytes
    num_rows: int  # of the segment
    shape: tuple[int, ...]  # of one row: (words of 8 bytes,), or () for a number
    dtype: str
    order_offset: int  # in the cut: int64 [num_items], which rows
    num_items: int

    @property
    def file_part(self) -> Part:
        """As it will be in the file."""
        return Part((self.num_items, *self.shape), self.dtype)


class ParameterMemory(NamedTuple):
    """A parameter set as the server has it."""

    slots: ParameterSlots
    fields: list[tuple[str, Field]]
    slot_nbytes: int
    fd: int  # of all slots


class Cut(NamedTuple):
    """One moment. The arrays are views, to be put one behind the other before anything else happens."""

    contents: Contents
    sources: list[Source]  # in the order to copy them in
    arrays: list[NDArray[Any]]


def cut_nbytes(tables: Mapping[str, TableState]) -> int:
    """About the bytes that the arrays of a `Cut` will take."""
    return _WORD_NBYTES * sum(2 * state.config.num_rows for state in tables.values())


def take_cut(
    tables: Mapping[str, TableState],
    parameters: Mapping[str, ParameterMemory],
    stats: StatsTracker,
    writers: Mapping[str, tuple[int, int]],
) -> Cut:
    """Take everything as it is now; what `rows:TABLE` and `parameters:NAME` lie in stays so until it is `copied`."""
    cut = Cut(Contents(_FORMAT, {}, {}, stats.state(), dict(writers)), [], [])
    for name, (slots, fields, slot_nbytes, _) in parameters.items():
        if slots.version:
            cut.contents.parameters[name] = ParameterContents(fields, slots.version)
            part, order = f"parameters:{name}", _append(cut, [np.array([slots.freeze()])])
            words = (slot_nbytes // _WORD_NBYTES,)
            cut.sources.append(Source(part, part, 0, NUM_SLOTS, words, "int64", order, 1))
    layouts = {name: state.config.layout for name, state in tables.items()}
    # The small ones first: they are copied soon, and then their writers have all of their headroom again.
    for name in sorted(tables, key=lambda name: len(tables[name]) * layouts[name].stride_nbytes):
        config, layout, table = tables[name].config, layouts[name], tables[name].freeze()
        num_items = sum(map(len, table.rows))
        cut.contents.tables[name] = TableContents(config, layout.digest, num_items, table.values)
        order = _append(cut, table.rows)
        if table.masses is not None:
            offset = _append(cut, [table.masses])
            masses = Source(f"masses:{name}", "", offset, config.num_rows, (), "float64", order, num_items)
            cut.sources.append(masses)
        part, words = f"rows:{name}", (layout.stride_nbytes // _WORD_NBYTES,)
        cut.sources.append(Source(part, part, 0, config.num_rows, words, "int64", order, num_items))
    return cut


def _append(cut: Cut, arrays: list[NDArray[Any]]) -> int:
    """Put arrays behind those that are there; the offset of the first."""
    offset = sum(array.nbytes for array in cut.arrays)
    cut.arrays.extend(arrays)
    return offset


def read_contents(reader: CheckpointReader, tables: Mapping[str, ReplayTable | RolloutTable]) -> Contents:
    """What is in a checkpoint, if it fits these tables.

    Raises:
        InvalidInput: it is of another version, or of tables that differ in more than room and seed.
    """
    try:
        contents = msgspec.convert(reader.description, Contents)
    except msgspec.MsgspecError as error:
        raise InvalidInput(f"{reader.path} was written by another version of rl_buffer: {error}") from error
    if contents.format != _FORMAT:
        raise InvalidInput(f"{reader.path} has format {contents.format}, this version reads {_FORMAT}")
    if contents.tables.keys() != tables.keys():
        raise InvalidInput(f"{reader.path} has tables {sorted(contents.tables)}, this server has {sorted(tables)}")
    for name, config in tables.items():
        saved = contents.tables[name]
        what = f"table {name!r} of {reader.path} was saved with"
        if type(saved.config) is not type(config):
            raise InvalidInput(f"{what} {type(saved.config).__name__}, this server has {type(config).__name__}")
        for key in sorted(set(config.__struct_fields__) - _MAY_DIFFER):
            before, now = getattr(saved.config, key), getattr(config, key)
            if before != now:
                raise InvalidInput(f"{what} {key} {before}, this server has {now}")
        if saved.digest != config.layout.digest:
            raise InvalidInput(f"{what} another order of fields: {list(saved.config.layout.fields)}")
        # What learners held comes back, and then more wait than the capacity of a table whose items leave.
        room = config.num_rows
        if isinstance(config, ReplayTable) and not config.max_times_sampled:
            room = config.capacity
        if saved.num_items > room:
            raise InvalidInput(f"{what} {saved.num_items} items, this server has room for {room}")
    return contents


def restore(
    reader: CheckpointReader,
    contents: Contents,
    tables: Mapping[str, TableState],
    rows: Mapping[str, NDArray[np.int64]],
    stats: StatsTracker,
) -> None:
    """Fill new tables, and read every part of theirs.

    Args:
        reader: whose `read_contents` this is.
        contents: of the file.
        tables: that nobody has used.
        rows: [num_rows, words] of each.
        stats: that nobody has used.

    Raises:
        InvalidInput: a part is damaged, or the file contradicts itself. What was filled is worth nothing.
    """
    for name, saved in contents.tables.items():
        masses = reader.array(f"masses:{name}") if f"masses:{name}" in reader.parts else None
        reader.read_into(f"rows:{name}", rows[name][: saved.num_items])
        try:
            tables[name].restore_cut(saved.num_items, masses, saved.values)
        except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
            raise InvalidInput(f"{reader.path} does not hold the state of table {name!r}: {error!r}") from error
    stats.restore(contents.stats)
