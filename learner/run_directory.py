"""What a run leaves behind in runs/NAME: configuration, metrics, policy, learner state, summary and curve.

    config.json  metrics.csv  policy.safetensors  learner.safetensors  summary.json  curve.png  tensorboard/  wandb/

The last two by option (`reporters`). No pickle in any of them.
"""

import csv
import os
from collections.abc import Mapping
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors.torch import load_file, save_file

from learner.curve import draw_curve

RUNS = Path("runs")

# Of every algorithm; behind them come those that its updates measure.
COLUMNS = (
    "wall_s",
    "env_steps",
    "updates",
    "inserts",
    "samples",
    "samples_per_insert",
    "buffer_fill",
    "env_steps_per_s",
    "updates_per_s",
    "inserts_per_s",
    "samples_per_s",
    "mean_return",
    "eval_return",
    "version_lag",
    "num_actors",
    "stale_updates",
    "overtaken_rows",
)


class RunDirectory:
    """Files of one run. JSON and tensors are replaced as a whole, so that a kill leaves the old or the new ones."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def new(cls, algo: str, env_id: str, seed: int, name: str | None) -> "RunDirectory":
        """runs/NAME; by default algorithm, environment, seed and time.

        Raises:
            FileExistsError: NAME holds a run already.
        """
        moment = datetime.now().strftime("%Y%m%d-%H%M%S")
        path = RUNS / (name or f"{algo}-{env_id}-{seed}-{moment}")
        if (path / "learner.safetensors").exists():
            raise FileExistsError(f"{path} holds a run already; choose another --name, or --resume {path}")
        path.mkdir(parents=True, exist_ok=True)
        return cls(path)

    def save_config(self, config: Any) -> None:
        """Write the script's options."""
        self._write("config.json", msgspec.json.format(msgspec.json.encode(asdict(config)), indent=2))

    def load_config(self) -> dict[str, Any]:
        """Read them, as plain values by name.

        Raises:
            FileNotFoundError: no run is there.
        """
        file = self.path / "config.json"
        if not file.exists():
            raise FileNotFoundError(f"{self.path} holds no run (config.json is missing)")
        return msgspec.json.decode(file.read_bytes())

    def append_metrics(self, row: Mapping[str, float]) -> None:
        """Add a line to metrics.csv, whose columns the first line decides; missing ones stay empty."""
        file = self.path / "metrics.csv"
        with file.open("a+", newline="") as stream:
            stream.seek(0)
            header = next(csv.reader(stream), None)
            columns = header or [*COLUMNS, *(key for key in row if key not in COLUMNS)]
            writer = csv.DictWriter(stream, columns, extrasaction="ignore")
            if header is None:
                writer.writeheader()
            # With all digits; empty where there is nothing.
            writer.writerow({key: repr(float(value)) for key, value in row.items() if value == value})

    def metrics(self) -> list[dict[str, float]]:
        """All lines of metrics.csv, NaN where a column is empty."""
        file = self.path / "metrics.csv"
        if not file.exists():
            return []
        with file.open(newline="") as stream:
            return [{key: float(value or "nan") for key, value in row.items()} for row in csv.DictReader(stream)]

    def save_policy(self, state_dict: Mapping[str, torch.Tensor]) -> None:
        """Write policy.safetensors."""
        self._save_tensors("policy.safetensors", state_dict)

    def load_policy(self) -> dict[str, torch.Tensor]:
        """Read policy.safetensors.

        Raises:
            FileNotFoundError: the run has not saved one.
        """
        file = self.path / "policy.safetensors"
        if not file.exists():
            raise FileNotFoundError(f"{self.path} holds no policy (policy.safetensors is missing)")
        return load_file(file)

    def save_learner(self, tensors: Mapping[str, torch.Tensor], counters: Mapping[str, float]) -> None:
        """Write what `--resume` needs, in one file."""
        numbers = {f"counters/{key}": torch.tensor(value, dtype=torch.float64) for key, value in counters.items()}
        self._save_tensors("learner.safetensors", {**tensors, **numbers})

    def load_learner(self) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
        """Read it.

        Raises:
            FileNotFoundError: the run has not saved any.
        """
        file = self.path / "learner.safetensors"
        if not file.exists():
            raise FileNotFoundError(f"{self.path} holds no learner state to resume ({file.name} is missing)")
        tensors = load_file(file)
        counters = {
            key.removeprefix("counters/"): float(tensors.pop(key)) for key in list(tensors) if "counters/" in key
        }
        return tensors, counters

    def save_summary(self, summary: Mapping[str, Any]) -> None:
        """Write summary.json."""
        self._write("summary.json", msgspec.json.format(msgspec.json.encode(summary), indent=2))

    def draw_curve(self, title: str, threshold: float | None) -> None:
        """Draw curve.png from metrics.csv; see `curve`."""
        draw_curve(self.path / "curve.png", self.metrics(), title, threshold)

    def _save_tensors(self, name: str, tensors: Mapping[str, torch.Tensor]) -> None:
        unfinished = self.path / f".{name}"
        save_file({key: tensor.detach().cpu().clone() for key, tensor in tensors.items()}, unfinished)
        os.replace(unfinished, self.path / name)

    def _write(self, name: str, content: bytes) -> None:
        unfinished = self.path / f".{name}"
        unfinished.write_bytes(content)
        os.replace(unfinished, self.path / name)
