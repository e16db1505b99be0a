"""Run the Ape-X DQN learner against a server; actors connect from elsewhere (scripts/run_actors.py)."""

import sys
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # actors and learner are not installed

import tyro

from learner.apex_dqn import ApexDQN, LearnerOptions, describe, train
from learner.display import Display
from learner.run_directory import RunDirectory
from learner.script import run_script
from rl_buffer.address import default_address


@dataclass
class RunLearner:
    """Options of the learner."""

    connect: str = field(default_factory=default_address)
    """Address of the server, as scripts/serve.py prints it."""
    env: str = "CartPole-v1"
    """Gymnasium environment; the same as the server's."""
    learner: tyro.conf.OmitArgPrefixes[LearnerOptions] = field(default_factory=LearnerOptions)
    seed: int = 0
    """Of the network."""
    name: str | None = None
    """Directory below runs/; by default made of algorithm, environment, seed and time."""
    resume: Path | None = None
    """Continue network, optimizer, counters and random state of this run, e.g. runs/NAME."""


def main(options: RunLearner) -> None:
    """Learn until the run is over."""
    agent = ApexDQN(options.learner, options.env, options.seed)
    if options.resume is None:
        run = RunDirectory.new("apex_dqn", options.env, options.seed, options.name)
        run.save_config(options)
    else:
        run = RunDirectory(options.resume)
        run.load_learner()
    with Display(f"Ape-X DQN learner: {options.env}") as display:
        summary = train(agent, options.connect, run, display, resume=options.resume is not None)
    print(f"{describe(summary)}; see {run.path}/")


if __name__ == "__main__":
    run_script(main, RunLearner, __doc__)
