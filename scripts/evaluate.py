"""Evaluate the saved policy of a run greedily, one episode per seed."""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # actors and learner are not installed

import torch
import tyro

from learner.algorithms import ALGORITHMS
from learner.evaluation import FINAL_SEED, evaluate
from learner.run_directory import RunDirectory
from learner.script import run_script
from learner.session import FINAL_EPISODES


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
    config = run.load_config()
    env_id, algorithm = config["env"], ALGORITHMS[config.get("algo", "apex")]
    network = algorithm.network.from_parameters(run.load_policy())
    torch.set_num_threads(1)
    seeds = options.seeds or range(FINAL_SEED, FINAL_SEED + FINAL_EPISODES)
    returns = evaluate(network.greedy, env_id, seeds, options.render)
    print(
        f"{env_id}: mean return {returns.mean():.2f}, std {returns.std():.2f}, min {returns.min():.2f}, "
        f"max {returns.max():.2f} over {len(returns)} episodes"
    )


if __name__ == "__main__":
    run_script(lambda: main(tyro.cli(Evaluate, description=__doc__)))
