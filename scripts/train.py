"""Train, all in one: a server, actors and the learner on this machine.

uv run scripts/train.py                            Ape-X DQN: CartPole-v1 until it is solved
uv run scripts/train.py --env Acrobot-v1 --num-actors 4
uv run scripts/train.py --algo sac                 Soft Actor-Critic: Pendulum-v1, 10 k steps
uv run scripts/train.py --algo sac --help          the options of that algorithm
uv run scripts/train.py --resume runs/NAME         go on where a run stopped
"""

import sys
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # actors and learner are not installed

import tyro

import rl_buffer as rb
from actors.crew import Crew, CrewOptions
from actors.environments import transition_spec
from learner.agent import TABLE, RunOptions
from learner.algorithms import ALGORITHMS, AlgorithmName
from learner.display import Display
from learner.reporters import Reporters, require_packages
from learner.script import open_run, options_from_command_line, run_script
from learner.session import Session, describe
from rl_buffer.address import fresh_address


@dataclass
class Train:
    """Options of a whole run; those of table and learner are the algorithm's."""

    algo: AlgorithmName
    """Algorithm; the others have other options, which --algo NAME --help shows."""
    env: str
    """Gymnasium environment; its observations are vectors, its actions what the algorithm is for."""
    crew: tyro.conf.OmitArgPrefixes[CrewOptions]
    table: tyro.conf.OmitArgPrefixes[object]
    learner: tyro.conf.OmitArgPrefixes[RunOptions]
    seed: int = 0
    """Of everything: networks, environments, exploration, sampling."""
    name: str | None = None
    """Directory below runs/; by default made of algorithm, environment, seed and time."""
    resume: Path | None = None
    """Continue networks, optimizers, counters and random state of this run, e.g. runs/NAME."""
    tensorboard: bool = False
    """Write event files to runs/NAME/tensorboard; needs the package tensorboard."""
    wandb: str | None = None
    """Project of Weights & Biases that the run's figures go to; needs the package wandb."""


def main(options: Train) -> None:
    """Start the server, the crew and the learner, and end them in the opposite order."""
    algorithm = ALGORITHMS[options.algo]
    algorithm.check_env(options.env)  # refuse before anything is made or started
    require_packages(tensorboard=options.tensorboard, wandb=options.wandb)
    table = algorithm.make_table(options.table, options.crew, transition_spec(options.env), options.seed)
    run = open_run(options)
    make_policy = algorithm.make_policies(options.crew.num_actors, options.crew.envs_per_actor)
    address = fresh_address()
    with Crew(address, options.env, options.crew, make_policy, algorithm.run_actor, seed=options.seed) as crew:
        # What the actors have in common is imported from now on; to start them waits for that.
        agent = algorithm.agent(options.learner, options.env, options.seed)
        title = f"{agent.title}: {options.env}, seed {options.seed}, {run.path}"
        with (
            Reporters(run, tensorboard=options.tensorboard, wandb=options.wandb, config=asdict(options)) as reporters,
            rb.BufferServer({TABLE: table}, address),
            Display(title, agent.measures) as display,
        ):
            crew.start()
            session = Session(
                agent,
                address,
                run,
                display,
                reporters,
                resume=options.resume is not None,
                tend_crew=crew.tend,
                num_actors=options.crew.num_actors,
            )
            summary = session.run(algorithm.train)
    session.draw_curve()
    print(f"{describe(summary)}; see {run.path}/")


if __name__ == "__main__":
    run_script(lambda: main(options_from_command_line(Train, __doc__)))
