"""What came out: medians, quartiles and ratios of measurements, as tables, JSON and a chart.

A ratio is taken turn by turn; what is reported is the median of the ratios, not the ratio of the medians.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.table import Table

from benchmarks.measure import OURS, Case, Measurement

_SIZE_LABELS = {
    "in-process": "transitions in the buffer",
    "gae": "steps x envs",
    "startup": "actors started at once",
    "stall": "writers",
    "payload": "bytes of a transition",
}
_CURVES = {"stall"}  # sections whose sizes are drawn as a line
_LINEAR = 100  # an axis from 0, on which lengths can be compared, up to this ratio of largest to smallest


@dataclass(frozen=True)
class Bar:
    """A promise of this project: the limits of how many times as fast the faster one is, or of a value in its unit."""

    promise: str
    slower: Case
    faster: Case | None = None
    at_least: float = 0.0
    below: float = float("inf")


class Report:
    """Reads measurements; measures nothing."""

    def __init__(self, measurements: Sequence[Measurement], bars: Sequence[Bar]) -> None:
        self._measurements = measurements
        self._bars = bars
        self._values = {m.case: np.array(m.values) for m in measurements if m.values}
        self._units = {m.case: m.unit for m in measurements}
        self._candidates = _distinct(m.case.candidate for m in measurements)

    def ratio(self, slower: Case, faster: Case) -> dict[str, float] | None:
        """How many times as fast, turn by turn; None where one of them was not measured."""
        if slower not in self._values or faster not in self._values:
            return None
        # Of rates the other way round. In a turn of a hundredth of a second nothing may have been done.
        low, high = (faster, slower) if self._units[slower].is_rate else (slower, faster)
        below = np.where(self._values[high] == 0, np.nan, self._values[high])
        ratios = self._values[low] / below
        return _spread(ratios) if np.isfinite(ratios).all() else None

    def measurements(self) -> list[dict[str, Any]]:
        """For JSON: the spread under the name of its unit, or why there is none."""
        return [
            {"section": m.section, **asdict(m.case)}
            | ({"missing": m.missing} if m.missing else {m.unit.name: self._shown(m.case)})
            for m in self._measurements
        ]

    def ratios(self) -> list[dict[str, Any]]:
        """For JSON: every candidate against ours."""
        pairs = [(case, _ours(case)) for case in self._values if case.candidate != OURS]
        return [{"slower": asdict(a), "faster": asdict(b), "ratio": self.ratio(a, b)} for a, b in pairs]

    def bars(self) -> list[dict[str, Any]]:
        """For JSON: the promises; `met` is None where something was not measured."""
        rows = []
        for bar in self._bars:
            measured = self._shown(bar.slower) if bar.faster is None else self.ratio(bar.slower, bar.faster)
            required = f">= {bar.at_least:g}" if bar.at_least else f"< {bar.below:g}"
            met = None if measured is None else bar.at_least <= measured["median"] < bar.below
            rows.append({"promise": bar.promise, "required": required, "measured": measured, "met": met})
        return rows

    def tables(self) -> list[Table]:
        """One for each section, and one of the promises."""
        return [*map(self._section_table, _distinct(m.section for m in self._measurements)), self._bars_table()]

    def draw(self, path: Path) -> None:
        """One panel for each operation."""
        from matplotlib.figure import Figure
        from matplotlib.patches import Rectangle

        operations = _distinct(case.operation for case in self._values)
        num_columns, num_rows = 4, max(1, -(-len(operations) // 4))
        figure = Figure(figsize=(18, 0.6 + 3.4 * num_rows), dpi=100, layout="constrained")
        grid = figure.subplots(num_rows, num_columns, squeeze=False)
        for axes, operation in zip(grid.flat, operations, strict=False):
            self._draw_operation(axes, operation)
        for axes in grid.flat[len(operations) :]:
            axes.axis("off")
        handles = [Rectangle((0, 0), 1, 1, color=self._colour(name)) for name in self._candidates]
        figure.legend(handles, self._candidates, loc="outside lower center", ncols=min(len(handles), 8))
        figure.suptitle("Medians, with whiskers from quartile to quartile; of rates more is better, of times less")
        figure.savefig(path)

    def _section_table(self, section: str) -> Table:
        cases = {m.case: m for m in self._measurements if m.section == section}
        names = _distinct(case.candidate for case in cases)
        title = f"{section}: median (quartiles), and the ratio to {OURS}"
        table = Table("operation", "size", "unit", *names, title=title)
        for operation, size, unit in _distinct((case.operation, case.size, self._units[case].name) for case in cases):
            rows = (cases.get(Case(operation, size, name)) for name in names)
            table.add_row(operation, size, unit, *("" if m is None else self._cell(m) for m in rows))
        return table

    def _cell(self, measurement: Measurement) -> str:
        case, shown = measurement.case, self._shown(measurement.case)
        if shown is None:
            return measurement.missing
        spread = {name: _rounded(value) for name, value in shown.items()}
        words = f"{spread['median']} ({spread['q1']}-{spread['q3']})"
        ratio = None if case.candidate == OURS else self.ratio(case, _ours(case))
        return f"{words} [bold]{_rounded(ratio['median'])}x" if ratio else words

    def _bars_table(self) -> Table:
        table = Table("what the project promises", "required", "measured", "")
        for bar in self.bars():
            measured = _rounded(bar["measured"]["median"]) if bar["measured"] else ""
            met = {True: "met", False: "[red]not met", None: "not measured"}[bar["met"]]
            table.add_row(bar["promise"], bar["required"], measured, met)
        return table

    def _draw_operation(self, axes: Any, operation: str) -> None:
        cases = [case for case in self._values if case.operation == operation]
        sizes, names = _distinct(case.size for case in cases), _distinct(case.candidate for case in cases)
        width, is_curve = 0.85 / len(names), self._section(operation) in _CURVES
        for i, name in enumerate(names):
            mine = [case for case in cases if case.candidate == name]
            spreads = [_spread(self._values[case] * self._units[case].per_second_or_byte) for case in mine]
            medians = [spread["median"] for spread in spreads]
            whiskers = [[s["median"] - s["q1"] for s in spreads], [s["q3"] - s["median"] for s in spreads]]
            if is_curve:
                places = [sizes.index(case.size) for case in mine]
                axes.errorbar(places, medians, whiskers, marker="o", capsize=2, color=self._colour(name))
                for place, median in zip(places, medians, strict=True):
                    axes.annotate(_rounded(median), (place, median), (4, 4), textcoords="offset points", fontsize=7)
                continue
            places = [sizes.index(case.size) + (i - (len(names) - 1) / 2) * width for case in mine]
            bars = axes.bar(places, medians, width, yerr=whiskers, capsize=2, color=self._colour(name))
            axes.bar_label(bars, [_rounded(median) for median in medians], fontsize=7, padding=2)
        all_medians = [np.median(self._values[case]) for case in cases]
        if max(all_medians) > _LINEAR * min(all_medians) > 0:
            axes.set_yscale("log")
        elif is_curve:
            axes.set_ylim(bottom=0)
        if not is_curve:
            axes.margins(y=0.1)
        axes.set_xticks(range(len(sizes)), [size.replace(", ", "\n") for size in sizes])
        axes.set_xlabel(self._size_label(operation))
        axes.set_ylabel(self._units[cases[0]].name)
        axes.set_title(operation, fontsize=10)

    def _size_label(self, operation: str) -> str:
        return _SIZE_LABELS.get(self._section(operation), "")

    def _section(self, operation: str) -> str:
        return next(m.section for m in self._measurements if m.case.operation == operation)

    def _shown(self, case: Case) -> dict[str, float] | None:
        """The spread in the case's unit; None where it was not measured."""
        if case not in self._values:
            return None
        return _spread(self._values[case] * self._units[case].per_second_or_byte)

    def _colour(self, name: str) -> Any:
        """Ten strong colours, then ten pale ones: a run of everything has twelve candidates."""
        from matplotlib import colormaps

        place = self._candidates.index(name)
        return colormaps["tab20"](2 * place % 20 + place // 10 % 2)


def _ours(case: Case) -> Case:
    return Case(case.operation, case.size, OURS)


def _distinct(things: Any) -> list[Any]:
    return list(dict.fromkeys(things))


def _rounded(value: float) -> str:
    """Three digits before or behind the point: 1,234 and 12.3 and 0.12; of millions as 1.23 M."""
    if value >= 1e6:
        return f"{value / 1e6:.2f} M"
    if value >= 1e5:
        return f"{value / 1e3:.0f} k"
    return f"{value:,.{0 if value >= 100 else 1 if value >= 10 else 2}f}"


def _spread(values: NDArray[np.float64]) -> dict[str, float]:
    names = ("min", "q1", "median", "q3")
    return dict(zip(names, np.quantile(values, (0, 0.25, 0.5, 0.75)).tolist(), strict=True))
