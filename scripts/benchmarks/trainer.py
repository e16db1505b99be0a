"""A process that starts actors as scripts/train.py does: `trainer.py ADDRESS NUM_ACTORS [forkserver|spawn ...]`.

Starts them in one way after the other, and prints a JSON object for each: seconds until the last actor was launched and
until all were connected, and an actor's memory in bytes (the mean).
"""

import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # benchmarks
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # actors and learner

import multiprocess

import rl_buffer as rb
from actors.crew import Crew, CrewOptions
from benchmarks.memory import memory_nbytes
from learner.algorithms import ALGORITHMS
from rl_buffer.launch import ProcessGroup

_DEADLINE_S = 240.0
_LOOK_EVERY_S = 0.005


class SpawnedProcesses(ProcessGroup):
    """Children that each begin with an interpreter of their own."""

    def __init__(self) -> None:
        super().__init__()
        self._context = multiprocess.get_context("spawn")

    def launch(self) -> None:
        """There is no forkserver."""


def start_and_stop(address: str, num_actors: int, how: str) -> dict[str, float]:
    """Start a crew, wait until each actor has an open writer, look at their memory, and end them."""
    algorithm, options = ALGORITHMS["apex"], CrewOptions(num_actors=num_actors)
    make_policy = algorithm.make_policies(num_actors, options.envs_per_actor)
    with rb.connect(address) as client:
        started_s = time.monotonic()
        crew = Crew(address, algorithm.env, options, make_policy, algorithm.run_actor)
        if how == "spawn":
            crew.group = SpawnedProcesses()
        with crew:
            crew.start()
            launched_s = time.monotonic() - started_s
            pids = set(crew.pids.values())
            while not pids <= {client["pid"] for client in client.info()["clients"] if client["writers"]}:
                if ended := crew.group.reap():
                    raise RuntimeError(str(ended[0]))
                if time.monotonic() > started_s + _DEADLINE_S:
                    raise rb.DeadlineExceeded(f"{num_actors} actors were not connected within {_DEADLINE_S} s")
                time.sleep(_LOOK_EVERY_S)
            connected_s = time.monotonic() - started_s
            memory = [memory_nbytes(pid) for pid in pids]
    return {
        "launched_s": launched_s,
        "connected_s": connected_s,
        "pss_nbytes": sum(kinds["Pss"] for kinds in memory) / num_actors,
        "rss_nbytes": sum(kinds["Rss"] for kinds in memory) / num_actors,
    }


if __name__ == "__main__":
    address, num_actors, *ways = sys.argv[1:]
    for way in ways:
        print(json.dumps(start_and_stop(address, int(num_actors), way)))
