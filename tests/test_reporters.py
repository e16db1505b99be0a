"""The figures of a run are the same wherever they go."""

import csv
import json
import math
import sys

import numpy as np
import pytest
import torch

import rl_buffer as rb
from learner import session as session_module
from learner.agent import TABLE, Agent, RunOptions
from learner.display import Display
from learner.networks import hidden_layers
from learner.reporters import Reporters, named, require_packages
from learner.run_directory import RunDirectory
from learner.session import Session

pytestmark = pytest.mark.timeout(120)


class _Policy(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.trunk = hidden_layers(4, (2,))

    def greedy(self, observations):
        return torch.zeros(len(observations), dtype=torch.int64)


class _Still(Agent):
    """Learns nothing, and is at once where it wants to be."""

    name, title, measures = "still", "Still", ("loss",)

    def __init__(self, options):
        super().__init__(options, "CartPole-v1", 0)
        self.policy = _Policy()
        self.parts = {"policy": self.policy}


def scalars(directory):
    """tag -> [(step, value)] of all event files of TensorBoard in a directory."""
    loader = pytest.importorskip("tensorboard.backend.event_processing.event_file_loader")
    found = {}
    for path in sorted(directory.iterdir()):
        for event in loader.RawEventFileLoader(str(path)).Load():
            event = loader.event_pb2.Event.FromString(event)
            for value in event.summary.value:
                found.setdefault(value.tag, []).append((event.step, value.simple_value))
    return found


def test_client_stats_tensorboard_metrics_and_summary_have_the_same_numbers(serve, connect, tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    monkeypatch.setattr(session_module, "FINAL_EPISODES", 2)
    spec = rb.TransitionSpec(obs=rb.Field((4,)), action=rb.Field((), "int64"))
    server = serve(
        {TABLE: rb.ReplayTable(spec, capacity=1000)}, extra_metrics_keys=["speed"], done_reason_keys=["fell"]
    )
    rng = np.random.default_rng(0)
    for name in ("actor-0", "actor-1"):
        with connect(server, name=name).writer(TABLE, num_envs=1) as writer:
            for step in range(100):
                writer.add(
                    rng.random(4), 0, rng.random(), step % 7 == 6, rng.random(4),
                    metrics={"speed": [rng.random()]}, done_reasons={"fell": [step % 2 == 0]},
                )  # fmt: skip
    run = RunDirectory(tmp_path)

    def train(agent, session):
        session.updated(loss=torch.tensor(0.1))
        session.wait_for_last_step()

    with Reporters(run, tensorboard=True) as reporters:
        agent = _Still(RunOptions(max_env_steps=200, eval_period=10**9))
        summary = Session(agent, server.address, run, Display("test"), reporters).run(train)

    stats = connect(server).stats(per_client=True)
    assert summary["stats"] == stats == json.loads((tmp_path / "summary.json").read_text())["stats"]
    assert {"train/speed_mean", "train/Done/fell_rate", "train/clients/actor-1/lifetime_rewards_min"} <= stats.keys()
    counts = [stats[f"train/clients/actor-{number}/num_episodes"] for number in range(2)]
    assert sum(counts) == stats["train/num_episodes"] == 28
    with (tmp_path / "metrics.csv").open() as file:
        row = {key: float(value) for key, value in list(csv.DictReader(file))[-1].items() if value}
    assert row["mean_return"] == summary["mean_return"] == stats["train/rewards_mean"]
    for key in ("env_steps", "updates", "inserts", "wall_s", "eval_return", "stale_updates"):
        assert row[key] == summary[key]
    assert row["loss"] == pytest.approx(0.1)
    seen = {tag: points[-1] for tag, points in scalars(tmp_path / "tensorboard").items()}
    expected = named(row, stats)
    assert {tag: step for tag, (step, _) in seen.items()} == dict.fromkeys(expected, 200)
    assert {tag: value for tag, (_, value) in seen.items()} == {
        tag: float(np.float32(value)) for tag, value in expected.items()
    }


def test_figures_that_are_not_there_yet_are_left_out():
    assert named({"loss": math.nan, "updates": 3}, {"train/x": 1.0}) == {"run/updates": 3.0, "train/x": 1.0}


@pytest.mark.parametrize(
    ("package", "options"),
    [("tensorboard", {"tensorboard": True, "wandb": None}), ("wandb", {"tensorboard": False, "wandb": "project"})],
)
def test_a_missing_package_is_named_with_what_to_do(monkeypatch, package, options):
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(rb.InvalidInput, match=f"--{package} needs the package {package}.*pip install {package}"):
        require_packages(**options)


def test_weights_and_biases_works_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    with Reporters(RunDirectory(tmp_path), wandb="project", config={"seed": 0}) as reporters:
        reporters.report({"env_steps": 10.0, "loss": 0.5}, {"train/rewards_mean": 3.0})
        reporters.finish({"env_steps": 10, "stats": {"train/rewards_mean": 3.0}})
    (kept,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    content = kept.read_bytes()
    assert b"train/rewards_mean" in content
    assert b"run/loss" in content
