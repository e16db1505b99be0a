"""Evaluate the saved policy of a run greedily, one episode per seed."""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # actors and learner are not installed

import msgspec
import torch

from learner.evaluation import FINAL_SEED, evaluate
from learner.q_network import QNetwork
from learner.run_directory import RunDirectory
from learner.script import run_script


@dataclass
class Evaluate:
    """Options of an evaluation."""

    policy: Path
    """Run directory, e.g. runs/NAME."""
    seeds: tuple[int, ...] | None = None
    """Environment seeds, one episode each; by default the hundred that end a training run."""
    render: bool = False
    """Show the episodes in a window."""


def main(options: Evaluate) -> None:
    """Load, play, report."""
    run = RunDirectory(options.policy)
    env_id = run.load_config(RunEnvironment).env
    network = QNetwork.from_parameters(run.load_policy())
    torch.set_num_threads(1)
    seeds = options.seeds or range(FINAL_SEED, FINAL_SEED + 100)
    returns = evaluate(lambda observations: network(observations).argmax(1), env_id, seeds, options.render)
    print(
        f"{env_id}: mean return {returns.mean():.2f}, std {returns.std():.2f}, min {returns.min():.2f}, "
        f"max {returns.max():.2f} over {len(returns)} episodes"
    )


class RunEnvironment(msgspec.Struct):
    """The one option of a run's config.json that matters here."""

    env: str


if __name__ == "__main__":
    run_script(main, Evaluate, __doc__)
