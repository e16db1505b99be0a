"""curve.png: what became of a run, over its environment steps: returns, losses, rates and how old the policies were."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_COLORS = ("tab:blue", "tab:orange", "tab:green", "tab:red")
_STEPS = "environment steps, all actors"

Rows = Sequence[Mapping[str, float]]


def draw_curve(path: Path, rows: Rows, title: str, threshold: float | None) -> None:
    """Draw it.

    Args:
        path: of the PNG.
        rows: of metrics.csv, in their order; NaN where there is nothing.
        title: above all.
        threshold: return that counts as solved, if there is one.
    """
    import matplotlib.ticker
    from matplotlib.figure import Figure  # without pyplot, which takes another second to import

    figure = Figure(figsize=(12, 7.5), dpi=100)
    axes = figure.subplots(2, 2, sharex=True)
    (returns, losses), (rates, lags) = axes
    _draw_returns(returns, rows, threshold)
    names = [key for key in (rows[0] if rows else ()) if key == "loss" or key.endswith("_loss")]
    _draw_two_scales(losses, rows, {key: f"{key.replace('_', ' ')} (arbitrary units)" for key in names})
    losses.set_title("losses of the newest update", fontsize=10)
    units = {"env_steps_per_s": "environment steps per second (1/s)", "updates_per_s": "updates per second (1/s)"}
    _draw_two_scales(rates, rows, units, from_zero=True)
    rates.set_title("rates, mean of the last 5 s", fontsize=10)
    _draw(lags, rows, "version_lag", _COLORS[0], drawstyle="steps-post")
    lags.set_ylabel("parameter versions behind the newest")
    lags.set_ylim(bottom=0)
    lags.yaxis.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True))
    lags.set_title("version lag of the actor that is furthest behind", fontsize=10)
    for panel in axes.flat:
        panel.grid(alpha=0.3)
    for panel in axes[1]:
        panel.set_xlabel(_STEPS)
        panel.xaxis.set_major_formatter(matplotlib.ticker.EngFormatter(sep=""))
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(path)


def _draw_returns(axes: Any, rows: Rows, threshold: float | None) -> None:
    _draw(axes, rows, "mean_return", _COLORS[0], label="actors, exploring (mean of the last 100 episodes)")
    _draw(axes, rows, "eval_return", _COLORS[1], label="greedy evaluation (mean)", marker="o", markersize=3)
    if threshold is not None:
        axes.axhline(threshold, color="grey", linestyle="--", linewidth=1, label=f"solved: {threshold:g}")
    axes.set_ylabel("undiscounted return per episode")
    axes.set_title("returns", fontsize=10)
    axes.legend(loc="best", fontsize=8)


def _draw_two_scales(axes: Any, rows: Rows, labels: Mapping[str, str], *, from_zero: bool = False) -> None:
    """The first two columns, each with a scale of its own, left and right: they differ by orders of magnitude."""
    for number, (key, label) in enumerate(list(labels.items())[:2]):
        scale, color = axes.twinx() if number else axes, _COLORS[number]
        # Dashed: in step with each other, the second would hide the first.
        _draw(scale, rows, key, color, linestyle="--" if number else "-")
        scale.set_ylabel(label, color=color)
        scale.tick_params(axis="y", labelcolor=color)
        if from_zero:
            scale.set_ylim(bottom=0)


def _draw(axes: Any, rows: Rows, key: str, color: str, **style: Any) -> None:
    points = [(row["env_steps"], row[key]) for row in rows if not math.isnan(row.get(key, math.nan))]
    axes.plot([step for step, _ in points], [value for _, value in points], color=color, linewidth=1.2, **style)
