"""The command `rl-buffer`: serve tables, look at a server, have it write a checkpoint, look at the machine.

Exit status: 0 done; 1 it could not be done, and one line on standard error says why; 2 the command line is wrong.
argparse, because it is there: the package installs no parser for it. What a subcommand needs is imported by it.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rl_buffer.address import default_address
from rl_buffer.errors import InvalidInput, RLBufferError, ServerLost
from rl_buffer.table_file import EXAMPLE, read_tables

_START_TIMEOUT_S = 3600.0  # for a table of a TB, or a checkpoint of some hundred GB
_LOOK_EVERY_S = 0.2


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command; the process ends with its exit status."""
    options = parser().parse_args(arguments)
    try:
        status = options.run(options)
    except KeyboardInterrupt:
        status = 130
    except BrokenPipeError:  # `| head`; what is left in the buffer goes nowhere, and Python says nothing of it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 1
    except (RLBufferError, OSError) as error:
        print(f"rl-buffer: {type(error).__name__}: {error}", file=sys.stderr)
        status = 1
    sys.exit(status)


def parser() -> argparse.ArgumentParser:
    """All commands with their options; `run` of what it parses is the function that does it."""
    parser = argparse.ArgumentParser("rl-buffer", description="Serve experience tables and look at what goes on.")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    serve = _command(commands, "serve", _serve, "serve tables until Ctrl-C", deadline=False)
    serve.formatter_class = argparse.RawDescriptionHelpFormatter
    serve.epilog = f"A file of tables has the words of ReplayTable and RolloutTable, in TOML or JSON:\n\n{EXAMPLE}"
    serve.add_argument("tables", type=Path, metavar="FILE", help="of tables, .toml or .json; see below")
    serve.add_argument("--directory", type=Path, help="keep the tables in files here, and go on with them next time")
    serve.add_argument("--restore", type=Path, metavar="CHECKPOINT", help="begin with it")
    serve.add_argument("--metrics-port", type=int, metavar="N", help="serve Prometheus metrics there; 0: any port")
    serve.add_argument("--metrics-host", default="127.0.0.1", metavar="HOST", help="default: %(default)s, this machine")
    serve.add_argument("--stats-window", type=int, default=100, metavar="EPISODES", help="default: %(default)s")
    serve.add_argument("--extra-metrics", nargs="+", default=(), metavar="KEY", help="that writers pass in metrics=")
    serve.add_argument(
        "--done-reasons", nargs="+", default=(), metavar="KEY", help="that writers pass in done_reasons="
    )

    top = _command(commands, "top", _top, "watch a server, live; q or Ctrl-C ends it")
    top.add_argument("--interval", type=_seconds, default=1.0, metavar="SECONDS", help="between looks; default: 1")
    top.add_argument("--once", action="store_true", help="print one screen and end")

    info = _command(commands, "info", _info, "print tables, clients, rates, and who waits for what")
    info.add_argument("--json", action="store_true", help="all that client.info() returns")

    stats = _command(commands, "stats", _stats, "print the episode statistics of all actors together")
    stats.add_argument("--json", action="store_true", help="one object")

    checkpoint = _command(commands, "checkpoint", _checkpoint, "write all that the server holds to one file", 600.0)
    checkpoint.add_argument("path", type=Path, metavar="PATH", help="of the file; what is there is replaced at the end")

    doctor = commands.add_parser("doctor", help="look whether this machine is fit, and say what to mend")
    doctor.description = "Look whether this machine is fit. Exit status 1 if something fails; warnings leave it 0."
    doctor.set_defaults(run=_doctor)
    return parser


def _command(
    commands: Any, name: str, run: Any, help_text: str, timeout_s: float = 10.0, *, deadline: bool = True
) -> Any:
    parser = commands.add_parser(name, help=help_text, description=f"{help_text[0].upper()}{help_text[1:]}.")
    parser.add_argument("--address", default=default_address(), help="of the server; default: %(default)s")
    if deadline:
        help_text = f"deadline, for the server to be there and to answer; default: {timeout_s:g}"
        parser.add_argument("--timeout", type=_seconds, default=timeout_s, metavar="SECONDS", help=help_text)
    parser.set_defaults(run=run)
    return parser


def _seconds(text: str) -> float:
    seconds = float(text)
    if not 0.0 < seconds < 1e9:
        raise argparse.ArgumentTypeError(f"{text}: expected seconds above 0")
    return seconds


def _serve(options: argparse.Namespace) -> int:
    from rl_buffer.server import BufferServer

    if options.metrics_port is not None:
        _require("prometheus_client", "prometheus", "--metrics-port")
    tables = read_tables(options.tables)
    server = BufferServer(
        tables,
        options.address,
        directory=options.directory,
        restore=options.restore,
        stats_window=options.stats_window,
        extra_metrics_keys=options.extra_metrics,
        done_reason_keys=options.done_reasons,
    )
    signal.signal(signal.SIGTERM, lambda *_: _interrupt())
    with contextlib.ExitStack() as stack, contextlib.suppress(KeyboardInterrupt):
        stack.callback(server.stop)
        nbytes = sum(table.rows_nbytes for table in tables.values())
        print(f"reserving {nbytes / 2**20:,.0f} MiB", flush=True)
        server.start(_START_TIMEOUT_S)
        if options.metrics_port is not None:
            from rl_buffer.prometheus_metrics import serve_metrics

            port = stack.enter_context(serve_metrics(server.address, options.metrics_port, options.metrics_host))
            print(f"metrics at http://{options.metrics_host}:{port}/metrics", flush=True)
        names = ", ".join(tables)
        print(f"serving {names} at {server.address} (pid {server.pid}); Ctrl-C ends it", flush=True)
        while server.is_alive():
            time.sleep(_LOOK_EVERY_S)
        raise ServerLost("the server process ended; its own error stands above")
    print("stopped")
    return 0


def _interrupt() -> None:
    raise KeyboardInterrupt


def _top(options: argparse.Namespace) -> int:
    _require("rich", "cli", "rl-buffer top")
    from rl_buffer.top import watch

    watch(options.address, options.timeout, options.interval, once=options.once)
    return 0


def _info(options: argparse.Namespace) -> int:
    from rl_buffer.client import connect

    with connect(options.address, options.timeout, name="rl-buffer info") as client:
        info = client.info()
    print(json.dumps(_finite(info), indent=2) if options.json else "\n".join(_lines(info)))
    return 0


def _stats(options: argparse.Namespace) -> int:
    from rl_buffer.client import connect

    with connect(options.address, options.timeout, name="rl-buffer stats") as client:
        stats = client.stats()
    if options.json:
        print(json.dumps(_finite(stats), indent=2))
    elif not stats:
        print("no episode has ended yet")
    else:
        width = max(map(len, stats))
        print("\n".join(f"{key:{width}}  {value:.6g}" for key, value in stats.items()))
    return 0


def _checkpoint(options: argparse.Namespace) -> int:
    from rl_buffer.client import connect

    with connect(options.address, min(10.0, options.timeout), name="rl-buffer checkpoint") as client:
        report = client.checkpoint(options.path, options.timeout)
    items = ", ".join(f"{count:,} in {name}" for name, count in sorted(report.num_items.items()))
    print(f"{report.path}: {report.nbytes:,} bytes in {report.duration_s:.1f} s; {items}")
    print(f"the server stood still for {report.pause_ms:.1f} ms, writers for {report.writers_waited_ms:.1f} ms")
    return 0


def _doctor(_: argparse.Namespace) -> int:
    from rl_buffer.doctor import FAIL, OK, examine

    findings = list(examine())
    width = max(len(finding.what) for finding in findings)
    for finding in findings:
        print(f"{finding.status:4}  {finding.what:{width}}  {finding.found}")
        if finding.advice:
            print(f"{'':4}  {'':{width}}  -> {finding.advice}")
    failed = sum(finding.status == FAIL for finding in findings)
    warned = sum(finding.status not in (OK, FAIL) for finding in findings)
    print(f"{failed} failed, {warned} warned")
    return 1 if failed else 0


def _require(module: str, extra: str, purpose: str) -> None:
    """Say which extra is missing, before anything else is done."""
    if importlib.util.find_spec(module) is None:
        raise InvalidInput(f"{purpose} needs {module}, which is not installed: pip install 'rl_buffer[{extra}]'")


def _finite(value: Any) -> Any:
    """JSON has no infinity: null."""
    if isinstance(value, dict):
        return {key: _finite(child) for key, child in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(child) for child in value]
    return None if isinstance(value, float) and not abs(value) < float("inf") else value


def _lines(info: dict[str, Any]) -> list[str]:
    """A page to read."""
    lines = [f"server {info['epoch']}: {info['num_messages']:,} messages, {info['num_refused']:,} refused"]
    for name, table in info["tables"].items():
        lines += [
            f"table {name}: {table['size']:,} of {table['capacity']:,} items, {table['inserts_per_s']:,.0f} inserts/s, "
            f"{table['samples_per_s']:,.0f} samples/s, {table['samples_per_insert']:.2f} samples per insert"
        ]
        age, lag = table["sampled_items"]["age_s"], table["sampled_items"]["version_lag"]
        if age is not None:
            lag_words = "" if lag is None else f", {lag['p50']:.0f} versions behind"
            lines.append(f"  drawn items (median): {age['p50']:.1f} s old{lag_words}")
        lines += [f"  waits: {sentence}" for sentence in table["waits"]]
    for name, version in info["parameters"].items():
        lines.append(f"parameters {name}: version {version:,}")
    for client in info["clients"]:
        lines.append(
            f"client {client['name']} (pid {client['pid']}{'' if client['connected'] else ', gone'}): "
            f"{client['inserts_per_s']:,.0f} inserts/s, {client['samples_per_s']:,.0f} samples/s, "
            f"{client['reserved_rows']:,} rows held, last message {client['last_message_s']:.1f} s ago"
        )
    if info["last_refusal"]:
        lines.append(f"last refusal: {info['last_refusal']}")
    return lines


if __name__ == "__main__":
    main()
