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


def main(options: Serve) -> None:
    """Start the server, say where it is, and watch it."""
    table = ALGORITHMS[options.algo].make_table(options.table, options.crew, transition_spec(options.env), options.seed)
    server = rb.BufferServer({TABLE: table}, options.address)
    print(
        f"reserving {table.rows_nbytes / 2**20:,.0f} MiB for {table.num_rows:,} rows of {table.layout.stride_nbytes} B"
    )
    with server:
        print(f"serving {options.env} at {server.address} (pid {server.pid}); Ctrl-C ends it", flush=True)
        while server.is_alive():
            time.sleep(_LOOK_EVERY_S)
    raise rb.ServerLost("the server process ended; its own error stands above")


if __name__ == "__main__":
    run_script(lambda: main(options_from_command_line(Serve, __doc__)))
