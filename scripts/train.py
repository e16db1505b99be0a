"""Train Ape-X DQN, all in one: a server, actors and the learner on this machine.

uv run scripts/train.py                            CartPole-v1 until it is solved
uv run scripts/train.py --env Acrobot-v1 --num-actors 4
uv run scripts/train.py --resume runs/NAME         go on where a run stopped
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # actors and learner are not installed

import tyro

import rl_buffer as rb
from actors.crew import CrewOptions, ReplayCrew
from actors.environments import transition_spec
from learner.apex_dqn import (
    TABLE,
    ApexDQN,
    LearnerOptions,
    TableOptions,
    apex_table,
    describe,
    train,
    vector_inputs_and_discrete_actions,
)
from learner.display import Display
from learner.q_network import EpsilonGreedyPolicy, apex_epsilons
from learner.run_directory import RunDirectory
from learner.script import run_script
from rl_buffer.address import fresh_address


@dataclass
class Train:
    """Options of a whole run."""

    env: str = "CartPole-v1"
    """Gymnasium environment with vector observations and discrete actions."""
    crew: tyro.conf.OmitArgPrefixes[CrewOptions] = field(default_factory=CrewOptions)
    table: tyro.conf.OmitArgPrefixes[TableOptions] = field(default_factory=TableOptions)
    learner: tyro.conf.OmitArgPrefixes[LearnerOptions] = field(default_factory=LearnerOptions)
    seed: int = 0
    """Of everything: networks, environments, exploration, sampling."""
    name: str | None = None
    """Directory below runs/; by default made of algorithm, environment, seed and time."""
    resume: Path | None = None
    """Continue network, optimizer, counters and random state of this run, e.g. runs/NAME."""


def main(options: Train) -> None:
    """Start the server, the crew and the learner, and end them in the opposite order."""
    vector_inputs_and_discrete_actions(options.env)  # refuse before anything is made or started
    table = apex_table(options.table, transition_spec(options.env), options.seed)
    if options.resume is None:
        run = RunDirectory.new("apex_dqn", options.env, options.seed, options.name)
        run.save_config(options)
    else:
        run = RunDirectory(options.resume)
        run.load_learner()
    epsilons = apex_epsilons(options.crew.num_actors * options.crew.envs_per_actor)
    address = fresh_address()
    crew = ReplayCrew(address, options.env, options.crew, epsilons, EpsilonGreedyPolicy, seed=options.seed)
    with crew:
        crew.start()  # first: actors take as long to start as the server, and wait for it
        agent = ApexDQN(options.learner, options.env, options.seed)
        with (
            rb.BufferServer({TABLE: table}, address),
            Display(f"Ape-X DQN: {options.env}, seed {options.seed}, {run.path}") as display,
        ):
            summary = train(
                agent,
                address,
                run,
                display,
                resume=options.resume is not None,
                tend_crew=crew.tend,
                num_actors=options.crew.num_actors,
            )
    print(f"{describe(summary)}; see {run.path}/")


if __name__ == "__main__":
    run_script(main, Train, __doc__)
