"""Serve a replay table for one environment until Ctrl-C. Actors and learner connect to the address that it prints."""

import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # actors and learner are not installed

import tyro

import rl_buffer as rb
from actors.crew import CrewOptions
from actors.environments import transition_spec
from learner.agent import TABLE
from learner.algorithms import ALGORITHMS, AlgorithmName
from learner.script import options_from_command_line, run_script
from rl_buffer.address import default_address

_LOOK_EVERY_S = 0.2
_START_TIMEOUT_S = 60.0
_RESTORE_TIMEOUT_S = 3600.0  # a disk gives perhaps 0.3 GB/s


@dataclass
class Serve:
    """Options of the server; those of the table are the algorithm's."""

    algo: AlgorithmName
    """Algorithm that the table is for; --algo NAME --help shows its options."""
    env: str
    """Gymnasium environment whose transitions are stored."""
    crew: tyro.conf.OmitArgPrefixes[CrewOptions]
    table: tyro.conf.OmitArgPrefixes[object]
    address: str = field(default_factory=default_address)
    """Where to listen: ipc:// and a directory, which is made private."""
    seed: int = 0
    """Of the sampler."""
    restore: Path | None = None
    """Checkpoint to begin with, as `client.checkpoint(path)` writes it."""
    directory: Path | None = None
    """Keep the table in files here, on a tmpfs or a disk, and go on with it when the server is started again."""
    allowed_uids: tuple[int, ...] = ()
    """Numbers of other users whose processes may attach; they pass server_uid= to rl_buffer.connect."""


def main(options: Serve) -> None:
    """Start the server, say where it is, and watch it."""
    table = ALGORITHMS[options.algo].make_table(options.table, options.crew, transition_spec(options.env), options.seed)
    server = rb.BufferServer(
        {TABLE: table},
        options.address,
        directory=options.directory,
        restore=options.restore,
        allowed_uids=options.allowed_uids,
    )
    print(
        f"reserving {table.rows_nbytes / 2**20:,.0f} MiB for {table.num_rows:,} rows of {table.layout.stride_nbytes} B"
    )
    with server.start(_RESTORE_TIMEOUT_S if options.restore else _START_TIMEOUT_S):
        print(f"serving {options.env} at {server.address} (pid {server.pid}); Ctrl-C ends it", flush=True)
        while server.is_alive():
            time.sleep(_LOOK_EVERY_S)
    raise rb.ServerLost("the server process ended; its own error stands above")


if __name__ == "__main__":
    run_script(lambda: main(options_from_command_line(Serve, __doc__)))
