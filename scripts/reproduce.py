"""Make the README's tables: every run, over the seeds declared here, each reported whatever it gave.

uv run scripts/reproduce.py                        everything, about half an hour on two cores
uv run scripts/reproduce.py --only cartpole-stop   one part
"""

import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # actors and learner are not installed

import tyro

from learner.run_directory import RUNS, RunDirectory

_TRAIN = Path(__file__).resolve().parent / "train.py"
_LAST_EVALUATIONS = 10


@dataclass(frozen=True)
class Part:
    """Runs of one table."""

    title: str
    seeds: Sequence[int]
    arguments: tuple[str, ...]
    bar: float | None  # of the figure; None only reports
    over_last_evaluations: bool = False

    @property
    def figure(self) -> str:
        """What the last column holds."""
        if self.over_last_evaluations:
            return f"median of the last {_LAST_EVALUATIONS} evaluations"
        return "mean return of 100 episodes, unused seeds"


PARTS = {
    "cartpole-stop": Part("CartPole-v1, ends when solved", range(10), ("--env", "CartPole-v1"), 475.0),
    "cartpole-no-stop": Part("CartPole-v1, 150 k steps", (0,), ("--env", "CartPole-v1", "--no-stop"), 450.0, True),
    "acrobot": Part("Acrobot-v1", range(3), ("--env", "Acrobot-v1"), -100.0),
    "lunarlander": Part("LunarLander-v3", range(2), ("--env", "LunarLander-v3"), None),
    "ppo-cartpole": Part("PPO, CartPole-v1", range(3), ("--algo", "ppo", "--env", "CartPole-v1"), 475.0),
    "ppo-cartpole-asynchronous": Part(
        "PPO, CartPole-v1, asynchronous", range(3), ("--algo", "ppo", "--env", "CartPole-v1", "--asynchronous"), 475.0
    ),
    "ppo-cartpole-1-actor": Part(
        "PPO, CartPole-v1, 1 actor",
        range(3),
        ("--algo", "ppo", "--env", "CartPole-v1", "--num-actors", "1"),
        475.0,
    ),
    "ppo-cartpole-4-actors": Part(
        "PPO, CartPole-v1, 4 actors",
        range(3),
        ("--algo", "ppo", "--env", "CartPole-v1", "--num-actors", "4"),
        475.0,
    ),
    "ppo-pendulum": Part("PPO, Pendulum-v1", range(3), ("--algo", "ppo", "--env", "Pendulum-v1"), -300.0),
    "sac-pendulum": Part("SAC, Pendulum-v1, 10 k steps", range(3), ("--algo", "sac", "--env", "Pendulum-v1"), -200.0),
}


@dataclass
class Reproduce:
    """Options."""

    only: tuple[str, ...] = tuple(PARTS)
    """Parts to run: cartpole-stop, cartpole-no-stop, acrobot, lunarlander, ppo-cartpole, ppo-cartpole-asynchronous,
    ppo-cartpole-1-actor, ppo-cartpole-4-actors, ppo-pendulum, sac-pendulum."""
    directory: str = "reproduce"
    """Below runs/; runs that are there already are only tabulated."""


def finished_run(run: RunDirectory, arguments: Sequence[str]) -> dict[str, Any]:
    """Train unless the run is there already; its summary, with the seconds of the whole command."""
    file = run.path / "summary.json"
    if not file.exists():
        name = str(run.path.relative_to(RUNS))
        started_s = time.monotonic()
        subprocess.run([sys.executable, str(_TRAIN), "--name", name, *arguments], check=True)
        run.save_summary(json.loads(file.read_text()) | {"command_s": round(time.monotonic() - started_s, 2)})
    return json.loads(file.read_text())


def main(options: Reproduce) -> None:
    """Run what is missing, one after the other, and print the tables."""
    report = []
    for key in options.only:
        part = PARTS[key]
        lines = [
            f"\n**{part.title}** (`uv run scripts/reproduce.py --only {key}`)\n",
            f"| seed | env steps | updates | learning s | whole command s | {part.figure} |",
            "|---|---|---|---|---|---|",
        ]
        reached = 0
        for seed in part.seeds:
            run = RunDirectory(RUNS / options.directory / f"{key}-{seed}")
            summary = finished_run(run, [*part.arguments, "--seed", str(seed)])
            if part.over_last_evaluations:
                evaluations = [row["eval_return"] for row in run.metrics() if not math.isnan(row["eval_return"])]
                figure = statistics.median(evaluations[-_LAST_EVALUATIONS:])
            else:
                figure = summary["eval_return"]
            reached += part.bar is not None and figure >= part.bar
            lines.append(
                f"| {seed} | {summary['env_steps']:,} | {summary['updates']:,} | {summary['wall_s']:.0f} "
                f"| {summary['command_s']:.0f} | {figure:.1f} |"
            )
        if part.bar is not None:
            lines.append(f"\n{reached} of {len(part.seeds)} reach {part.bar:g}.")
        report += lines
        print("\n".join(lines), flush=True)
    table = RUNS / options.directory / "TABLE.md"
    table.write_text("\n".join(report) + "\n")
    print(f"\nwritten to {table}")


if __name__ == "__main__":
    try:
        main(tyro.cli(Reproduce, description=__doc__))
    except (subprocess.CalledProcessError, KeyboardInterrupt) as error:
        sys.exit(f"{type(error).__name__}: {error}; what is finished stays, the same command goes on")
