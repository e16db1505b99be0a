"""Run actors against a server: they write transitions and follow the learner's parameters, until Ctrl-C or its end."""

import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # actors and learner are not installed

import tyro

import rl_buffer as rb
from actors.crew import Crew, CrewOptions
from actors.environments import transition_spec
from learner.agent import TABLE
from learner.algorithms import ALGORITHMS, AlgorithmName
from learner.script import options_from_command_line, run_script
from rl_buffer.address import default_address

_NEWS_EVERY_S = 0.5


@dataclass
class RunActors:
    """Options of the actors."""

    algo: AlgorithmName
    """Algorithm whose policy they follow; the same as the learner's."""
    env: str
    """Gymnasium environment; the same as the server's."""
    crew: tyro.conf.OmitArgPrefixes[CrewOptions]
    connect: str = field(default_factory=default_address)
    """Address of the server, as scripts/serve.py prints it."""
    first_actor: int = 0
    """Number of the first actor, where several terminals share one run."""
    total_actors: int | None = None
    """Actors of the whole run, which divide the exploration rates among them; by default first_actor + num_actors."""
    seed: int = 0
    """Of environments and exploration."""
    timeout_s: float = 60.0
    """How long an actor waits for the server and for the learner's first parameters, in seconds."""


def main(options: RunActors) -> None:
    """Start the crew and tend it."""
    total = options.total_actors or options.first_actor + options.crew.num_actors
    if total < options.first_actor + options.crew.num_actors:
        raise rb.InvalidInput(
            f"--total-actors {total} is less than --first-actor {options.first_actor} + --num-actors "
            f"{options.crew.num_actors}"
        )
    spec = transition_spec(options.env)
    print(f"waiting for a server at {options.connect}", flush=True)
    with rb.connect(options.connect, options.timeout_s) as client:  # once here, before every actor finds out alone
        if client.tables[TABLE].spec != spec:
            raise rb.InvalidInput(f"the server at {options.connect} stores another environment than {options.env}")
    crew = Crew(
        options.connect,
        options.env,
        options.crew,
        ALGORITHMS[options.algo].make_policies(total, options.crew.envs_per_actor),
        ALGORITHMS[options.algo].run_actor,
        seed=options.seed,
        first=options.first_actor,
        timeout_s=options.timeout_s,
    )
    with crew:
        crew.start()
        print(f"started {', '.join(f'{name} (pid {pid})' for name, pid in crew.pids.items())}", flush=True)
        while crew.is_at_work:
            time.sleep(_NEWS_EVERY_S)
            for line in crew.tend():
                print(line, flush=True)
        print("the run is over")


if __name__ == "__main__":
    run_script(lambda: main(options_from_command_line(RunActors, __doc__)))
