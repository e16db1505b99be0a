"""Where a server's tables lie, and its core on top of them: memfds that end with it, or files that outlive it."""

import secrets
import time
from dataclasses import dataclass
from typing import Any

import msgspec

from rl_buffer.directory import Directory
from rl_buffer.errors import InvalidInput
from rl_buffer.failpoints import reached
from rl_buffer.mapped_ledger import MappedLedger, ledger_arrays, ledger_fields, ledger_nbytes
from rl_buffer.messages import ServerConfig
from rl_buffer.peers import find_again
from rl_buffer.recovery import Survivor, resume, resumed_table
from rl_buffer.server_core import ServerCore
from rl_buffer.storage import OwnedSegment, Progress, check_memory
from rl_buffer.table_states import new_state
from rl_buffer.tables import ReplayTable, RolloutTable

_INT64_NBYTES = 8
_DIRECTORY_FORMAT = 2


@dataclass(slots=True)
class TableMemory:
    """One table's memory, as clients map it."""

    config: ReplayTable | RolloutTable
    rows: OwnedSegment
    generations: OwnedSegment


class ServerMemory:
    """The memory of all tables, in memfds.

    Attributes:
        tables: by name.
        survivors: clients of an earlier server that may still write into rows.
    """

    def __init__(self, config: ServerConfig, progress: Progress) -> None:
        """Reserve all of it; `progress` is told how much.

        Raises:
            NotEnoughMemory: it does not fit.
        """
        self._config = config
        self.survivors: list[Survivor] = []
        self._total_nbytes = sum(table.rows_nbytes + table.num_rows * _INT64_NBYTES for table in config.tables.values())
        self._check_room()
        self.tables: dict[str, TableMemory] = {}
        reserved_nbytes = 0
        for name, table in config.tables.items():

            def table_progress(nbytes: int, _: int, base: int = reserved_nbytes) -> None:
                progress(base + nbytes, self._total_nbytes)

            memory = TableMemory(
                table,
                self._segment("rows", name, table.rows_nbytes, progress=table_progress),
                self._segment("generations", name, table.num_rows * _INT64_NBYTES, readers_only=True),
            )
            self.tables[name] = memory
            reserved_nbytes += memory.rows.nbytes + memory.generations.nbytes

    @property
    def _bookkeeping_nbytes(self) -> int:
        # Masses, their sums, the queues and what is watched of the rows: about 8 words a row, ordinary memory.
        return sum(table.num_rows * 8 * _INT64_NBYTES for table in self._config.tables.values())

    def _check_room(self) -> None:
        check_memory(self._total_nbytes + self._bookkeeping_nbytes)

    def _segment(
        self, kind: str, name: str, nbytes: int, *, readers_only: bool = False, progress: Progress | None = None
    ) -> OwnedSegment:
        return OwnedSegment(f"{kind}:{name}", nbytes, readers_only=readers_only, progress=progress)

    def new_core(self, epoch: int) -> ServerCore:
        """The bookkeeping on this memory; to be called once."""
        states = {}
        for name, memory in self.tables.items():
            generations = memory.generations.array("int64")
            generations[:] = _fresh_generation()
            states[name] = new_state(memory.config, generations)
        return ServerCore(epoch, states, self._config.stats)

    def complete(self, core: ServerCore) -> None:
        """The core is ready to serve, restored if it was to be."""

    def close(self) -> None:
        """Nothing will be served any more."""


class DirectoryMemory(ServerMemory):
    """The memory of all tables in the files of a directory, where a killed server's tables go on."""

    def __init__(self, config: ServerConfig, progress: Progress) -> None:
        """Lock the directory and map its files, which are made and reserved if it is new.

        Raises:
            AddressInUse: another server uses the directory.
            InvalidInput: it holds tables of another configuration, or ones that a checkpoint would overwrite.
            NotEnoughMemory: there is no room for the files.
        """
        assert config.directory is not None
        self._numbers = {name: number for number, name in enumerate(sorted(config.tables))}
        self._fields = ledger_fields(config.tables, config.stats)
        self._directory = Directory(config.directory, _identity(config))
        try:
            if config.restore is not None and not self._directory.is_new:
                raise InvalidInput(
                    f"{self._directory.path} holds tables, which {config.restore} would replace; restore it into "
                    "another directory, or start without it"
                )
            super().__init__(config, progress)
            self._ledger_segment = self._directory.segment("ledger", ledger_nbytes(self._fields))
        except BaseException:
            self._directory.close()
            raise

    def _check_room(self) -> None:
        check_memory(self._bookkeeping_nbytes)
        files = {"ledger": ledger_nbytes(self._fields)}
        for name, table in self._config.tables.items():
            files[self._file("rows", name)] = table.rows_nbytes
            files[self._file("generations", name)] = table.num_rows * _INT64_NBYTES
        self._directory.check_room(files)

    def _file(self, kind: str, name: str) -> str:
        return f"{self._numbers[name]}.{kind}"

    def _segment(
        self, kind: str, name: str, nbytes: int, *, readers_only: bool = False, progress: Progress | None = None
    ) -> OwnedSegment:
        return self._directory.segment(self._file(kind, name), nbytes, readers_only=readers_only, progress=progress)

    def new_core(self, epoch: int) -> ServerCore:
        """The bookkeeping as the last server left it, or of a new directory."""
        arrays = ledger_arrays(self._fields, self._ledger_segment.buffer)
        self._ledger = ledger = MappedLedger(arrays, self._config.tables, self._config.stats)
        gone = []
        for client, (token, process) in ledger.clients().items():
            try:
                pidfd = find_again(process)
            except LookupError:
                self.survivors.append(Survivor(client, token, 0, None))
            else:
                if pidfd is None:
                    gone.append(client)
                else:
                    self.survivors.append(Survivor(client, token, process.pid, pidfd))
        ledger.disown(gone)
        states = {}
        for name, memory in self.tables.items():
            generations = memory.generations.array("int64")
            if self._directory.is_new:
                generations[:] = _fresh_generation()
            states[name] = resumed_table(ledger, name, generations)
        core = ServerCore(epoch, states, self._config.stats, ledger)
        resume(core, ledger, self.survivors, time.monotonic())
        reached("server.resumed")
        return core

    def complete(self, core: ServerCore) -> None:
        """Make a new directory one to go on from."""
        if self._directory.is_new:
            if self._config.restore is not None:
                self._ledger.adopt(
                    {name: table.state for name, table in core.tables.items()}, core.stats, core.known_writers
                )
            self._directory.complete()

    def close(self) -> None:
        """Let another server have the directory."""
        self._directory.close()


def reserve_memory(config: ServerConfig, progress: Progress) -> ServerMemory:
    """The memory that this configuration asks for."""
    return ServerMemory(config, progress) if config.directory is None else DirectoryMemory(config, progress)


def _fresh_generation() -> int:
    # Even, and never those of another epoch: priorities for a batch that was drawn there match no row.
    return 2 * secrets.randbits(40)


def _identity(config: ServerConfig) -> dict[str, Any]:
    """What two servers must have in common for one to go on with the other's tables."""
    tables = {}
    for name, table in config.tables.items():
        tables[name] = msgspec.to_builtins(table, str_keys=True)
        tables[name].pop("seed", None)
        # Mappings are equal in any order, but rows are laid out in theirs.
        tables[name]["leaves"] = list(table.layout.fields)
    return {"format": _DIRECTORY_FORMAT, "tables": tables, "stats": msgspec.to_builtins(config.stats)}
