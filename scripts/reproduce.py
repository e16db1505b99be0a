"""Make the README's tables: every run, over the seeds declared here, each reported whatever it gave.

uv run scripts/reproduce.py                        everything, about half an hour on two cores
uv run scripts/reproduce.py --only cartpole-stop   one part
"""

import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

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
    bar: float | None  # of the final return; None only reports


PARTS = {
    "cartpole-stop": Part("CartPole-v1, ends when solved", range(10), ("--env", "CartPole-v1"), 475.0),
    "cartpole-no-stop": Part("CartPole-v1, 150 k steps", (0,), ("--env", "CartPole-v1", "--no-stop"), 450.0),
    "acrobot": Part("Acrobot-v1", range(3), ("--env", "Acrobot-v1"), -100.0),
    "lunarlander": Part("LunarLander-v3", range(2), ("--env", "LunarLander-v3"), None),
}


@dataclass
class Reproduce:
    """Options."""

    only: tuple[str, ...] = tuple(PARTS)
    """Parts to run: cartpole-stop, cartpole-no-stop, acrobot, lunarlander."""
    directory: str = "reproduce"
    """Below runs/; runs that are there already are only tabulated."""


def main(options: Reproduce) -> None:
    """Run what is missing, one after the other, and print the tables."""
    report = []
    for key in options.only:
        part = PARTS[key]
        lines = [
            f"\n**{part.title}** (`uv run scripts/reproduce.py --only {key}`)\n",
            "| seed | env steps | wall s | updates | median of last 10 evaluations | 100-episode return |",
            "|---|---|---|---|---|---|",
        ]
        reached = 0
        for seed in part.seeds:
            name = f"{options.directory}/{key}-{seed}"
            if not (RUNS / name / "summary.json").exists():
                command = [sys.executable, str(_TRAIN), "--name", name, "--seed", str(seed), *part.arguments]
                subprocess.run(command, check=True)
            summary = json.loads((RUNS / name / "summary.json").read_text())
            evaluations = [row["eval_return"] for row in RunDirectory(RUNS / name).metrics()]
            median = statistics.median(evaluations[-_LAST_EVALUATIONS:])
            reached += part.bar is not None and summary["eval_return"] >= part.bar
            lines.append(
                f"| {seed} | {summary['env_steps']:,} | {summary['wall_s']:.0f} | {summary['updates']:,} "
                f"| {median:.1f} | {summary['eval_return']:.1f} |"
            )
        if part.bar is not None:
            lines.append(f"\n{reached} of {len(part.seeds)} seeds reach {part.bar:g}.")
        report += lines
        print("\n".join(lines), flush=True)
    table = RUNS / options.directory / "TABLE.md"
    table.write_text("\n".join(report) + "\n")
    print(f"\nwritten to {table}")


if __name__ == "__main__":
    main(tyro.cli(Reproduce, description=__doc__))
