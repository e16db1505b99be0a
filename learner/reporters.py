"""Where the figures of a run go: metrics.csv, and by option TensorBoard and Weights & Biases, all from one call.

    with Reporters(run, tensorboard=True) as reporters:
        reporters.report(row, stats)     now and then; the last time at the end of the run
        reporters.finish(summary)

The names are the same everywhere: `run/` before those of a row, and statistics of episodes as `client.stats` has them
(metrics.csv has the rows without prefix, summary.json both). Packages are imported where they are asked for.
"""

import importlib
import math
import os
import time
from collections.abc import Mapping
from typing import Any, Protocol

import rl_buffer as rb
from learner.run_directory import RunDirectory

Figures = Mapping[str, float]


class Reporter(Protocol):
    """One place where figures go."""

    def report(self, row: Figures, stats: Figures) -> None:
        """Take a row of metrics, with `env_steps` in it, and the statistics of episodes of the same moment."""

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Take what summary.json has."""

    def close(self) -> None:
        """Nothing comes any more."""


class Reporters:
    """All places of one run. A context manager."""

    def __init__(
        self, run: RunDirectory, *, tensorboard: bool = False, wandb: str | None = None, config: Any = None
    ) -> None:
        """Open them.

        Args:
            run: whose metrics.csv and summary.json are written.
            tensorboard: write event files to the run's directory `tensorboard`.
            wandb: project of Weights & Biases.
            config: the options of the run, in plain values, for Weights & Biases.

        Raises:
            InvalidInput: a package is missing, or Weights & Biases does not begin.
        """
        require_packages(tensorboard=tensorboard, wandb=wandb)
        self._all: list[Reporter] = [_Files(run)]
        if tensorboard:
            self._all.append(_TensorBoard(run))
        if wandb is not None:
            self._all.append(_WeightsAndBiases(run, wandb, config))

    def report(self, row: Figures, stats: Figures) -> None:
        """Send one moment of the run everywhere; NaN means that there is nothing to say."""
        for reporter in self._all:
            reporter.report(row, stats)

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Send the summary everywhere."""
        for reporter in self._all:
            reporter.finish(summary)

    def __enter__(self) -> "Reporters":
        return self

    def __exit__(self, *exception: object) -> None:
        for reporter in self._all:
            reporter.close()


def require_packages(*, tensorboard: bool, wandb: str | None) -> None:
    """Refuse options whose package is not there, before a run is begun.

    Raises:
        InvalidInput: with what to install.
    """
    if tensorboard:
        _import("tensorboard.summary.writer.event_file_writer", "--tensorboard", "tensorboard")
    if wandb is not None:
        _import("wandb", "--wandb", "wandb")


def named(row: Figures, stats: Figures) -> dict[str, float]:
    """Figures by the names that they have everywhere; without those that are NaN."""
    figures = {f"run/{key}": float(value) for key, value in row.items()} | dict(stats)
    return {key: value for key, value in figures.items() if not math.isnan(value)}


class _Files:
    """metrics.csv and summary.json."""

    def __init__(self, run: RunDirectory) -> None:
        self._run = run

    def report(self, row: Figures, stats: Figures) -> None:
        self._run.append_metrics(row)

    def finish(self, summary: Mapping[str, Any]) -> None:
        self._run.save_summary(summary)

    def close(self) -> None:
        pass


class _TensorBoard:
    """An event file, in which numbers are 32-bit floats.

    TensorBoard's own writer: with torch's on top it takes 0.1 s longer to import.
    """

    def __init__(self, run: RunDirectory) -> None:
        writing = importlib.import_module("tensorboard.summary.writer.event_file_writer")
        self._event = importlib.import_module("tensorboard.compat.proto.event_pb2").Event
        self._summary = importlib.import_module("tensorboard.compat.proto.summary_pb2").Summary
        self._writer = writing.EventFileWriter(os.fspath(run.path / "tensorboard"), flush_secs=5)

    def report(self, row: Figures, stats: Figures) -> None:
        values = [self._summary.Value(tag=tag, simple_value=value) for tag, value in named(row, stats).items()]
        summary = self._summary(value=values)
        self._writer.add_event(self._event(wall_time=time.time(), step=int(row["env_steps"]), summary=summary))

    def finish(self, summary: Mapping[str, Any]) -> None:
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class _WeightsAndBiases:
    """A run of Weights & Biases; WANDB_MODE=offline keeps it in the run's directory until `wandb sync`."""

    def __init__(self, run: RunDirectory, project: str, config: Any) -> None:
        wandb = importlib.import_module("wandb")
        try:
            self._run = wandb.init(project=project, name=run.path.name, dir=os.fspath(run.path), config=config)
        except wandb.errors.Error as error:
            raise rb.InvalidInput(
                f"--wandb {project}: {error}; log in (wandb login), or set WANDB_MODE=offline"
            ) from error
        self._run.define_metric("*", step_metric="run/env_steps")

    def report(self, row: Figures, stats: Figures) -> None:
        self._run.log(named(row, stats))

    def finish(self, summary: Mapping[str, Any]) -> None:
        self._run.summary.update({key: value for key, value in summary.items() if key != "stats"})

    def close(self) -> None:
        self._run.finish()


def _import(module: str, option: str, package: str) -> None:
    try:
        importlib.import_module(module)
    except ImportError as error:
        raise rb.InvalidInput(
            f"{option} needs the package {package}, which cannot be imported ({error}); install it: "
            f"uv run --group {package} ..., or pip install {package}"
        ) from error
