"""The command rl-buffer as a user runs it: processes, a terminal, signals, exit statuses."""

import contextlib
import fcntl
import importlib.metadata
import json
import os
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
import tomllib
import urllib.request
from pathlib import Path

import numpy as np
import pytest

import rl_buffer as rb
from rl_buffer import cli
from rl_buffer.table_file import EXAMPLE

pytestmark = pytest.mark.timeout(240)

ROOT = Path(__file__).resolve().parent.parent
DEADLINE_S = 60.0  # for what takes a second or two: only a hang reaches it
COMMAND = (sys.executable, "-m", "rl_buffer.cli")
SPEC = rb.TransitionSpec(obs=rb.Field((4,)), action=rb.Field((), "int64"))
TABLES = {
    "replay": rb.ReplayTable(SPEC, 1_000, rb.Prioritized()),
    "rollout": rb.RolloutTable(SPEC, num_steps=2, num_envs=1),
}


def run(*arguments, deadline_s=DEADLINE_S):
    return subprocess.run([*COMMAND, *map(str, arguments)], capture_output=True, text=True, timeout=deadline_s)


def write(client, num_rows):
    with client.writer("replay", num_envs=1) as writer:
        for number in range(num_rows):
            writer.add(np.full(4, number), 0, 1.0, number % 10 == 9, np.full(4, number + 1))


@pytest.fixture(scope="module")
def server():
    with rb.BufferServer(TABLES) as server:
        yield server


@pytest.fixture(scope="module")
def filled(server):
    with rb.connect(server.address, DEADLINE_S, name="actor-0") as client:
        write(client, 100)
        yield client


class Running:
    """A command at work, whose output is waited for."""

    def __init__(self, *arguments, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, **options):
        command = [*COMMAND, *map(str, arguments)]
        self.process = subprocess.Popen(command, stdin=stdin, stdout=stdout, stderr=subprocess.STDOUT, **options)
        self.fd = self.process.stdout.fileno() if stdout == subprocess.PIPE else -1
        self.output = ""

    def wait_for(self, pattern):
        """The match in what came since the last call."""
        deadline_s = time.monotonic() + DEADLINE_S
        while not (found := re.search(pattern, self.output, re.DOTALL)):
            ready = select.select([self.fd], [], [], max(0.0, deadline_s - time.monotonic()))[0]
            piece = os.read(self.fd, 1 << 16).decode(errors="replace") if ready else ""
            assert piece, f"{pattern!r} never came; output:\n{self.output}"
            self.output += piece
        self.output = self.output[found.end() :]
        return found

    def end(self, *signals):
        """Its exit status."""
        for number in signals:
            self.process.send_signal(number)
        return self.process.wait(DEADLINE_S)


@pytest.fixture
def running():
    """Start `Running` commands, ended after the test."""
    with contextlib.ExitStack() as stack:

        def start(*arguments, **options):
            one = Running(*arguments, **options)
            stack.callback(one.process.wait, DEADLINE_S)
            stack.callback(one.process.kill)
            if one.process.stdout is not None:
                stack.enter_context(one.process.stdout)
            return one

        yield start


@pytest.fixture
def tables_file(tmp_path):
    path = tmp_path / "tables.toml"
    path.write_text(EXAMPLE)
    return path


@pytest.fixture
def terminal(running):
    """Start a command in a terminal of 80x24: (command, a function that presses a key)."""
    ends = []

    def start(*arguments):
        ours, theirs = os.openpty()
        ends.append(ours)
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        environment = {key: value for key, value in os.environ.items() if key not in ("COLUMNS", "LINES", "NO_COLOR")}
        one = running(*arguments, stdin=theirs, stdout=theirs, env=environment | {"TERM": "xterm"}, process_group=0)
        os.close(theirs)
        one.fd = ours
        return one, lambda key: os.write(ours, key.encode())

    yield start
    for end in ends:
        os.close(end)


# ---- the command itself --------------------------------------------------------------------------------------


def test_the_package_installs_the_command():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["scripts"] == {"rl-buffer": "rl_buffer.cli:main"}
    (entry,) = importlib.metadata.entry_points(group="console_scripts", name="rl-buffer")
    assert callable(entry.load())


def test_help_lists_the_commands_and_loads_no_heavy_module():
    program = "import sys\nfrom rl_buffer.cli import main\ntry:\n    main(['--help'])\nexcept SystemExit as end:\n"
    program += "    print(end.code, [m for m in ('torch', 'numba', 'rich', 'prometheus_client') if m in sys.modules])"
    shown = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=DEADLINE_S)
    assert shown.stdout.endswith("0 []\n"), shown.stderr
    for command in ("serve", "top", "info", "stats", "checkpoint", "doctor"):
        assert f"\n    {command}" in shown.stdout


@pytest.mark.parametrize(
    "arguments",
    [(), ("tpo",), ("info", "--jsn"), ("top", "--interval", "0"), ("info", "--timeout", "x"), ("checkpoint",)],
)
def test_a_wrong_command_line_ends_with_2_and_says_how_it_is_used(capsys, arguments):
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith("usage: rl-buffer")


@pytest.mark.parametrize("command", [("info",), ("top",), ("checkpoint", "file")])
def test_without_a_server_each_command_ends_in_time_with_1_and_one_line(tmp_path, command):
    started_s = time.monotonic()
    result = run(*command, "--address", f"ipc://{tmp_path}/nowhere", "--timeout", "0.2")
    assert time.monotonic() - started_s < DEADLINE_S / 2
    assert (result.returncode, result.stdout) == (1, "")
    (line,) = result.stderr.splitlines()
    assert line.startswith("rl-buffer: DeadlineExceeded: no server came up at ipc://")


# ---- looking -------------------------------------------------------------------------------------------------


def test_info_is_a_page_to_read_or_json(server, filled):
    page = run("info", "--address", server.address)
    assert page.returncode == 0, page.stderr
    assert re.search(r"^table replay: 100 of 1,000 items, [\d,]+ inserts/s, ", page.stdout, re.MULTILINE)
    assert re.search(rf"^client actor-0 \(pid {os.getpid()}\): .* rows held, last message ", page.stdout, re.MULTILINE)
    result = run("info", "--json", "--address", server.address)
    answer = json.loads(result.stdout)
    assert answer["tables"]["replay"]["size"] == 100
    assert answer["tables"]["replay"]["priorities"]["items_looked_at"] == 100
    assert answer.keys() == filled.info().keys()


def test_stats_are_those_of_all_actors(server, filled):
    stats = json.loads(run("stats", "--json", "--address", server.address).stdout)
    assert stats == filled.stats()
    assert stats["train/num_episodes"] == 10
    assert re.search(r"^train/num_episodes +10$", run("stats", "--address", server.address).stdout, re.MULTILINE)


def test_a_checkpoint_is_written_and_says_what_is_in_it(server, filled, tmp_path):
    path = tmp_path / "replay.safetensors"
    result = run("checkpoint", path, "--address", server.address)
    assert result.returncode == 0, result.stderr
    assert re.match(rf"{re.escape(str(path))}: [\d,]+ bytes in [\d.]+ s; 100 in replay, 0 in rollout\n", result.stdout)
    assert path.stat().st_size > 100 * 64


def test_a_checkpoint_that_cannot_be_written_is_one_line(server, filled, tmp_path):
    result = run("checkpoint", tmp_path / "no" / "such" / "directory", "--address", server.address)
    assert result.returncode == 1
    assert re.fullmatch(
        r"rl-buffer: RequestRefused: there is no directory .* for a checkpoint; make it first\n", result.stderr
    )


def test_the_doctor_says_a_line_of_each_and_ends_with_0_unless_something_fails():
    result = run("doctor")
    assert (result.returncode == 0) == ("\nfail  " not in f"\n{result.stdout}"), result.stdout
    assert re.search(r"^ok    memfd +Linux ", result.stdout, re.MULTILINE)
    assert re.search(r"^\d+ failed, \d+ warned$", result.stdout, re.MULTILINE)


# ---- top -----------------------------------------------------------------------------------------------------


def test_top_once_prints_one_screen(server, filled):
    result = run("top", "--once", "--address", server.address)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[0].startswith("rl_buffer ")
    assert any(line.startswith("replay ") for line in lines)
    assert any(line.startswith("actor-0 ") for line in lines)
    assert max(map(len, lines)) <= 80


@pytest.mark.parametrize("key", ["q", "\x03"])
def test_top_ends_by_q_and_ctrl_c_and_gives_the_terminal_back(server, filled, terminal, key):
    top, press = terminal("top", "--address", server.address, "--interval", "0.1")
    top.wait_for("TABLE .*replay .*q ends")
    before = termios.tcgetattr(top.fd)
    assert not before[3] & termios.ECHO
    if key == "q":
        press(key)
        assert top.end() == 0
    else:
        assert top.end(signal.SIGINT) == 0
    assert termios.tcgetattr(top.fd)[3] & termios.ECHO
    top.wait_for(r"\x1b\[\?1049l")  # the screen from before is shown again


def test_top_says_that_its_server_is_lost_and_shows_the_next_one(terminal, tmp_path):
    address = f"ipc://{tmp_path}/s"
    with rb.BufferServer(TABLES, address) as server:
        top, press = terminal("top", "--address", address, "--interval", "0.1")
        top.wait_for("0 clients")
        os.kill(server.pid, signal.SIGKILL)
        top.wait_for(r"no server for .*ServerLost")
        server.start()
        top.wait_for("0 clients")
        with rb.connect(address, DEADLINE_S, name="actor-9") as client:
            write(client, 5)
            top.wait_for("1 clients")
            top.wait_for("actor-9 ")
        press("q")
        assert top.end() == 0


# ---- serve ---------------------------------------------------------------------------------------------------


def test_serve_serves_the_tables_of_a_file_and_prometheus_until_it_is_told_to_end(running, tables_file, tmp_path):
    from prometheus_client.parser import text_string_to_metric_families

    address = f"ipc://{tmp_path}/s"
    serve = running("serve", tables_file, "--address", address, "--metrics-port", "0")
    url = serve.wait_for(r"metrics at (http://127.0.0.1:\d+/metrics)\n")[1]
    pid = int(serve.wait_for(rf"serving replay at {re.escape(address)} \(pid (\d+)\); Ctrl-C ends it\n")[1])

    def scrape():
        with urllib.request.urlopen(url, timeout=DEADLINE_S) as answer:
            families = text_string_to_metric_families(answer.read().decode())
            return {
                (sample.name, *sorted(sample.labels.items())): sample.value
                for family in families
                for sample in family.samples
            }

    with rb.connect(address, DEADLINE_S, name="actor-0") as client:
        assert client.tables["replay"].capacity == 100_000
        write(client, 70)
        values = scrape()
        replay, actor = ("table", "replay"), (("client", "actor-0"), ("pid", str(os.getpid())))
        assert values["rl_buffer_up",] == 1
        assert values["rl_buffer_table_items", replay] == 70
        assert values["rl_buffer_table_inserts_total", replay] == 70
        assert values["rl_buffer_client_inserts_total", *actor] == 70
    os.kill(pid, signal.SIGKILL)
    line = serve.wait_for(r"rl-buffer: ServerLost: the server process ended[^\n]*\n")
    assert line
    assert serve.end() == 1


def test_serve_ends_in_order_and_goes_on_in_its_directory(running, tables_file, tmp_path):
    address = f"ipc://{tmp_path}/s"
    for expected, number in ((0, signal.SIGINT), (40, signal.SIGTERM)):
        serve = running("serve", tables_file, "--address", address, "--directory", tmp_path / "tables")
        serve.wait_for("serving replay at")
        with rb.connect(address, DEADLINE_S) as client:
            assert client.size("replay") == expected
            write(client, 40)
        assert serve.end(number) == 0
        serve.wait_for("stopped\n")
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nothing.toml",), "rl-buffer: FileNotFoundError: .*nothing.toml"),
        (
            ("tables.toml", "--metrics-port", "99999"),
            "rl-buffer: InvalidInput: metrics cannot be served at 127.0.0.1:99999",
        ),
        (("tables.toml", "--restore", "none"), "rl-buffer: .*none"),
    ],
)
def test_what_serve_cannot_do_is_one_line(tables_file, tmp_path, arguments, message):
    command = [*COMMAND, "serve", *arguments, "--address", f"ipc://{tmp_path}/s"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_S, cwd=tmp_path)
    assert result.returncode == 1
    (line,) = result.stderr.splitlines()
    assert re.match(message, line)
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize(
    ("module", "arguments", "message"),
    [
        ("rich", ["top"], "rl-buffer top needs rich, which is not installed: pip install 'rl_buffer[cli]'"),
        (
            "prometheus_client",
            ["serve", "tables.toml", "--metrics-port", "1"],
            "--metrics-port needs prometheus_client, which is not installed: pip install 'rl_buffer[prometheus]'",
        ),
    ],
)
def test_a_missing_extra_is_named(monkeypatch, capsys, module, arguments, message):
    find_spec = cli.importlib.util.find_spec
    monkeypatch.setattr(cli.importlib.util, "find_spec", lambda name: None if name == module else find_spec(name))
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    assert ended.value.code == 1
    assert capsys.readouterr().err == f"rl-buffer: InvalidInput: {message}\n"
