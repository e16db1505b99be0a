"""The scripts as a user runs them: processes, terminals, signals. Options are cut down to seconds."""

import json
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DEADLINE_S = 90.0
SHORT = ("--max-env-steps", "3000", "--eval-period", "1500", "--eval-episodes", "2", "--hidden-sizes", "32", "32")
ENDLESS = ("--max-env-steps", "100000000", "--no-stop", "--eval-period", "100000000", "--hidden-sizes", "32", "32")


class Script:
    """A running script whose output is read line by line."""

    def __init__(self, cwd: Path, name: str, *arguments: str) -> None:
        command = [sys.executable, str(ROOT / "scripts" / name), *arguments]
        environment = os.environ | {"PYTHONUNBUFFERED": "1", "NO_COLOR": "1"}
        self.process = subprocess.Popen(
            command,
            cwd=cwd,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self.lines: list[str] = []

    def wait_for(self, words: str) -> str:
        """The next line that holds `words`; the suite's timeout is the deadline."""
        for line in self.process.stdout:
            self.lines.append(line)
            if words in line:
                return line
        raise AssertionError(f"{words!r} never came; output:\n{''.join(self.lines)}")

    def finish(self) -> str:
        """All of its output, after it ended by itself."""
        output, _ = self.process.communicate(timeout=DEADLINE_S)
        output = "".join(self.lines) + output
        assert self.process.returncode == 0, output
        return output

    def interrupt(self) -> float:
        """Press Ctrl-C: SIGINT to the terminal's whole process group. Returns the seconds until it ended."""
        started_s = time.monotonic()
        os.killpg(self.process.pid, signal.SIGINT)
        self.process.communicate(timeout=DEADLINE_S)
        return time.monotonic() - started_s

    def kill(self) -> None:
        """Nothing is left of it."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.stdout.close()
        self.process.wait()


@pytest.fixture
def script(tmp_path):
    running = []

    def start(name: str, *arguments: str) -> Script:
        running.append(Script(tmp_path, name, *arguments))
        return running[-1]

    yield start
    for one in running:
        one.kill()


def descendants(pid: int) -> set[int]:
    """Process ids of all children, grandchildren, ..."""
    found, queue = set(), [pid]
    while queue:
        parent = queue.pop()
        for task in Path(f"/proc/{parent}/task").glob("*/children"):
            children = {int(child) for child in task.read_text().split()}
            queue += children - found
            found |= children
    return found


def wait_until_none_is_alive(pids: set[int], seconds: float) -> None:
    deadline_s = time.monotonic() + seconds
    for pid in pids:
        try:
            pidfd = os.pidfd_open(pid)
        except ProcessLookupError:
            continue
        ended, _, _ = select.select([pidfd], [], [], max(0.0, deadline_s - time.monotonic()))
        os.close(pidfd)
        assert ended, f"{pid} is still there after {seconds} s: {Path(f'/proc/{pid}/cmdline').read_bytes()}"


@pytest.mark.timeout(180)
def test_train_leaves_summary_metrics_policy_and_curve_and_the_policy_can_be_evaluated_and_resumed(script, tmp_path):
    output = script("train.py", "--name", "one", *SHORT).finish()
    assert "max_env_steps reached" in output
    run = tmp_path / "runs" / "one"
    summary = json.loads((run / "summary.json").read_text())
    expected = {
        "algo", "env", "seed", "num_actors", "env_steps", "updates", "inserts", "samples", "wall_s",
        "mean_return", "eval_return", "stale_updates", "overtaken_rows",
    }  # fmt: skip
    assert expected <= summary.keys()
    assert summary["env_steps"] >= 3000
    assert summary["samples"] == summary["updates"] * 64
    assert 5 < summary["eval_return"] <= 500
    assert (run / "curve.png").read_bytes().startswith(b"\x89PNG")
    lines = (run / "metrics.csv").read_text().splitlines()
    assert lines[0].startswith("wall_s,env_steps,updates")
    assert len(lines) >= 2

    output = script("evaluate.py", "--policy", "runs/one", "--seeds", "1", "2", "3").finish()
    assert "over 3 episodes" in output

    output = script("train.py", "--resume", "runs/one", "--max-env-steps", "5000").finish()
    resumed = json.loads((run / "summary.json").read_text())
    assert resumed["env_steps"] >= 5000, output
    assert resumed["updates"] > summary["updates"]
    assert resumed["wall_s"] > summary["wall_s"]

    refused = script("train.py", "--name", "one")
    output, _ = refused.process.communicate(timeout=DEADLINE_S)
    assert refused.process.returncode == 1
    assert "holds a run already" in output


@pytest.mark.timeout(180)
def test_ppo_learns_from_the_rollouts_of_all_actors_and_goes_on_when_resumed(script, tmp_path):
    short = ("--eval-episodes", "1", "--eval-period", "1000", "--no-stop")
    script("train.py", "--algo", "ppo", "--name", "ppo", *short, "--max-env-steps", "2048").finish()
    run = tmp_path / "runs" / "ppo"
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["algo"], summary["env"], summary["num_actors"]) == ("ppo", "CartPole-v1", 2)
    # Fragments of 32 steps of 4 environments; the two after the last update are not waited for.
    assert 2048 <= summary["env_steps"] <= 2048 + 2 * 128
    assert summary["updates"] == 8
    assert summary["samples"] <= 2048
    assert summary["eval_return"] > 0
    assert "over 2 episodes" in script("evaluate.py", "--policy", "runs/ppo", "--seeds", "1", "2").finish()

    script("train.py", "--resume", "runs/ppo", "--max-env-steps", "4096").finish()
    resumed = json.loads((run / "summary.json").read_text())
    assert resumed["env_steps"] >= 4096
    assert resumed["updates"] > 8


@pytest.mark.timeout(180)
def test_sac_ends_at_exactly_the_wanted_steps_with_one_update_each_and_goes_on_when_resumed(script, tmp_path):
    short = ("--min-size", "200", "--batch-size", "16", "--hidden-sizes", "16", "--eval-episodes", "1")
    output = script("train.py", "--algo", "sac", "--name", "sac", *short, "--max-env-steps", "600").finish()
    assert "max_env_steps reached after 600 env steps, 400 updates" in output
    run = tmp_path / "runs" / "sac"
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["algo"], summary["env"], summary["num_actors"]) == ("sac", "Pendulum-v1", 1)
    assert (summary["env_steps"], summary["inserts"], summary["updates"]) == (600, 600, 400)
    assert summary["samples"] == 400 * 16
    assert -2000 < summary["eval_return"] < 0

    assert "over 2 episodes" in script("evaluate.py", "--policy", "runs/sac", "--seeds", "1", "2").finish()

    # The table is filled again, from the policy this time; the rest is one update per step.
    script("train.py", "--resume", "runs/sac", "--max-env-steps", "1000", "--num-actors", "2").finish()
    resumed = json.loads((run / "summary.json").read_text())
    assert (resumed["env_steps"], resumed["updates"]) == (1000, 400 + 1000 - 600 - 200)

    refused = script("train.py", "--resume", "runs/sac", "--algo", "apex")
    output, _ = refused.process.communicate(timeout=DEADLINE_S)
    assert refused.process.returncode == 1
    assert "runs/sac is a run of sac, not of apex" in output


@pytest.mark.timeout(120)
def test_four_terminals_connect_in_any_order(script, tmp_path):
    address = str(tmp_path / "address")
    learner = script("run_learner.py", "--connect", address, "--name", "four", *SHORT)
    actors = [
        script("run_actors.py", "--connect", address, "--num-actors", "1", "--total-actors", "2"),
        script("run_actors.py", "--connect", address, "--num-actors", "1", "--first-actor", "1"),
    ]
    for crew in actors:
        crew.wait_for("waiting for a server")
    server = script("serve.py", "--address", address)
    server.wait_for("serving CartPole-v1")
    assert "max_env_steps reached" in learner.finish()
    assert server.interrupt() < 5
    for crew in actors:
        assert "the run is over" in crew.finish()
    assert not Path(address).exists()


@pytest.mark.timeout(120)
def test_a_killed_actor_is_replaced_and_ctrl_c_then_ends_everything_within_5_s(script, tmp_path):
    shared_memory_before = set(os.listdir("/dev/shm"))
    train = script("train.py", "--name", "killed", *ENDLESS)
    train.wait_for("updates")
    victims = [pid for pid in descendants(train.process.pid) if is_actor(pid)]
    assert len(victims) == 2
    os.kill(victims[0], signal.SIGKILL)
    assert str(victims[0]) in train.wait_for("was killed by SIGKILL")
    train.wait_for("started again as pid")
    train.wait_for("updates")
    everybody = descendants(train.process.pid) | {train.process.pid}
    assert train.interrupt() < 5
    wait_until_none_is_alive(everybody, seconds=1)
    assert set(os.listdir("/dev/shm")) <= shared_memory_before
    summary = json.loads((tmp_path / "runs" / "killed" / "summary.json").read_text())
    assert summary["stopped_by"] == "interrupted"


@pytest.mark.timeout(120)
def test_no_process_outlives_a_killed_trainer(script):
    train = script("train.py", "--name", "gone", *ENDLESS)
    train.wait_for("updates")
    everybody = descendants(train.process.pid)
    assert len(everybody) >= 4  # server, forkserver, two actors
    os.kill(train.process.pid, signal.SIGKILL)
    wait_until_none_is_alive(everybody, seconds=10)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("name", ["serve.py", "run_actors.py", "run_learner.py"])
def test_ctrl_c_ends_each_part_within_5_s_even_while_it_waits_for_the_others(script, tmp_path, name):
    flag = "--address" if name == "serve.py" else "--connect"
    part = script(name, flag, str(tmp_path / "nobody"))
    part.wait_for("serving" if name == "serve.py" else "waiting for a server")
    everybody = descendants(part.process.pid) | {part.process.pid}
    assert part.interrupt() < 5
    wait_until_none_is_alive(everybody, seconds=1)


def is_actor(pid: int) -> bool:
    """A child of the forkserver; the forkserver, the server and helpers of multiprocess are not."""
    parent = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return b"forkserver" in Path(f"/proc/{parent}/cmdline").read_bytes()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train.py", "--env", "Foo-v0"], "Foo"),
        (["train.py", "--env", "Pendulum-v1"], "Ape-X DQN needs Box observations and Discrete actions"),
        (["train.py", "--algo", "foo"], "invalid choice 'foo'"),
        (["train.py", "--algo", "ppo", "--env", "FrozenLake-v1"], "PPO needs Box observations and Discrete or Box"),
        (["train.py", "--algo", "sac", "--env", "CartPole-v1"], "SAC needs Box observations and Box actions"),
        (["train.py", "--algo", "sac", "--lead", "1"], "--lead must be at least 2"),
        (["train.py", "--algo", "sac", "--alpha", "0.6"], "--alpha"),  # an option of apex
        (["train.py", "--num-actors", "0"], "--num-actors must be at least 1, got 0"),
        (["train.py", "--resume", "runs/none"], "runs/none holds no run"),
        (["run_learner.py", "--resume", "runs/none"], "runs/none holds no run"),
        (["evaluate.py", "--policy", "runs/none"], "runs/none holds no run"),
        (["run_actors.py", "--connect", "nobody", "--timeout-s", "0.1"], "no server came up at"),
        (["run_actors.py", "--total-actors", "1"], "--total-actors 1 is less than"),
    ],
)
def test_a_mistake_ends_a_script_with_one_clear_line_and_leaves_no_run_behind(script, tmp_path, arguments, message):
    wrong = script(*arguments)
    output, _ = wrong.process.communicate(timeout=DEADLINE_S)
    assert wrong.process.returncode != 0
    assert message in output
    assert "Traceback" not in output
    assert not (tmp_path / "runs").exists()
