"""Run a learner against a server; actors connect from elsewhere (scripts/run_actors.py)."""

import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # actors and learner are not installed

import tyro

from learner.agent import RunOptions
from learner.algorithms import ALGORITHMS, AlgorithmName
from learner.display import Display
from learner.reporters import Reporters, require_packages
from learner.script import open_run, options_from_command_line, run_script
from learner.session import Session, describe
from rl_buffer.address import default_address


@dataclass
class RunLearner:
    """Options of the learner, most of them the algorithm's."""

    algo: AlgorithmName
    """Algorithm, the same as the server's; --algo NAME --help shows its options."""
    env: str
    """Gymnasium environment; the same as the server's."""
    learner: tyro.conf.OmitArgPrefixes[RunOptions]
    connect: str = field(default_factory=default_address)
    """Address of the server, as scripts/serve.py prints it."""
    seed: int = 0
    """Of the networks."""
    name: str | None = None
    """Directory below runs/; by default made of algorithm, environment, seed and time."""
    resume: Path | None = None
    """Continue networks, optimizers, counters and random state of this run, e.g. runs/NAME."""
    tensorboard: bool = False
    """Write event files to runs/NAME/tensorboard; needs the package tensorboard."""
    wandb: str | None = None
    """Project of Weights & Biases that the run's figures go to; needs the package wandb."""


def main(options: RunLearner) -> None:
    """Learn until the run is over."""
    algorithm = ALGORITHMS[options.algo]
    require_packages(tensorboard=options.tensorboard, wandb=options.wandb)
    agent = algorithm.agent(options.learner, options.env, options.seed)
    run = open_run(options)
    with (
        Reporters(run, tensorboard=options.tensorboard, wandb=options.wandb, config=asdict(options)) as reporters,
        Display(f"{agent.title} learner: {options.env}", agent.measures) as display,
    ):
        session = Session(agent, options.connect, run, display, reporters, resume=options.resume is not None)
        summary = session.run(algorithm.train)
    session.draw_curve()
    print(f"{describe(summary)}; see {run.path}/")


if __name__ == "__main__":
    run_script(lambda: main(options_from_command_line(RunLearner, __doc__)))
