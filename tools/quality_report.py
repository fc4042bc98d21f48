"""The tables and the plot of ``make quality``."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np

from tools.measuring import machine_line

mpl.use("Agg")
import matplotlib.pyplot as plt

COLOURS = {
    "calibrated": "#d1495b",
    "riemann_middle": "#30638e",
    "gausslegendre": "#003d5b",
    "riemann_trapezoid": "#8d99ae",
    "tolerance": "#edae49",
}


def values_of(report: dict[str, Any], output: str, rule: str, key: str) -> np.ndarray:
    """One number of a rule, for each image."""
    return np.array([entry["rules"][rule][key] for entry in report["results"] if entry["output"] == output])


def rules_of(report: dict[str, Any]) -> list[tuple[str, str, str]]:
    """(name, kind, setting) of each rule, in order."""
    return [(name, *name.split()) for name in report["results"][0]["rules"]]


def steps_for(report: dict[str, Any], output: str, method: str, error: float) -> float:
    """Steps that bring a fixed method's 95th percentile down to ``error``.

    By lines between measured numbers of steps, and on beyond them, on log scales.
    """
    measured = [(int(setting), name) for name, kind, setting in rules_of(report) if kind == method]
    counts = np.log([count for count, _ in measured])
    errors = np.log([np.percentile(values_of(report, output, name, "error"), 95) for _, name in measured])
    slopes = np.diff(errors) / np.diff(counts)
    if np.log(error) >= errors[0]:
        return float(np.exp(counts[0] + (np.log(error) - errors[0]) / slopes[0]))
    below = next((index for index, value in enumerate(errors) if value <= np.log(error)), len(errors) - 1)
    return float(np.exp(counts[below] + (np.log(error) - errors[below]) / slopes[below - 1]))


def table(report: dict[str, Any]) -> str:
    """Markdown."""
    machine = machine_line(report["machine"])
    lines = [f"`{report['command']}`: {machine}", ""]
    for output in dict.fromkeys(entry["output"] for entry in report["results"]):
        lines += _rules_table(report, output)
        lines += _tolerances_table(report, output)
    lines += ["| map | deletion | insertion | top 1 % inside | peak inside |", "|---|---|---|---|---|"]
    for name, found in report["faithfulness"].items():
        lines.append(
            f"| {name} | {found['deletion']:.3f} | {found['insertion']:.3f} | {found['top_share_inside']:.1%} "
            f"| {found['peak_inside']:.0%} |"
        )
    return "\n".join(lines) + "\n"


def _rules_table(report: dict[str, Any], output: str) -> Iterable[str]:
    yield f"`{output}`, {report['images']} images, reference: midpoint rule of {report['reference_steps']} points"
    yield ""
    timed = output == "logit"  # which is what was timed
    yield "| rule | steps, median | error, median | error, 95 % | rank correlation | gap, median |" + " time |" * timed
    yield "|---|---|---|---|---|---|" + "---|" * timed
    for name, _, _ in rules_of(report):
        steps, error, rank, gap = (
            values_of(report, output, name, key) for key in ("steps", "error", "rank_correlation", "gap")
        )
        yield (
            f"| {name} | {np.median(steps):.0f} | {np.median(error):.4f} | {np.percentile(error, 95):.4f} "
            f"| {np.median(rank):.4f} | {np.median(gap):.4f} |" + f" {1e3 * report['seconds'][name]:.0f} ms |" * timed
        )
    yield ""


def _tolerances_table(report: dict[str, Any], output: str) -> Iterable[str]:
    methods = list(dict.fromkeys(kind for _, kind, _ in rules_of(report) if kind != "tolerance"))
    captums = [method for method in methods if method != "calibrated"]
    yield (
        "| tolerance | within it | estimate / error, median | steps, median (95 %) "
        "| for the same 95 % error: best of Captum's methods | calibrated |"
    )
    yield "|---|---|---|---|---|---|"
    for name, kind, setting in rules_of(report):
        if kind != "tolerance":
            continue
        errors, steps, estimates = (values_of(report, output, name, key) for key in ("error", "steps", "estimate"))
        high = np.percentile(errors, 95)
        needed = {method: steps_for(report, output, method, high) for method in methods}
        best = min(captums, key=needed.get)
        yield (
            f"| {setting} | {np.mean(errors <= float(setting)):.0%} | {np.median(estimates / errors):.2f} "
            f"| {np.median(steps):.0f} ({np.percentile(steps, 95):.0f}) | {needed[best]:.1f} ({best}) "
            f"| {needed['calibrated']:.1f} |"
        )
    yield ""


def plot(report: dict[str, Any], file: Path) -> None:
    """Error against steps: medians as lines, up to the 95th percentile shaded; dots where each tolerance stops."""
    outputs = list(dict.fromkeys(entry["output"] for entry in report["results"]))
    figure, axes = plt.subplots(1, len(outputs), figsize=(5.6 * len(outputs), 4.4), sharey=True, squeeze=False)
    for axis, output in zip(axes[0], outputs):
        for method, colour in COLOURS.items():
            own = [(name, setting) for name, kind, setting in rules_of(report) if kind == method]
            steps = [np.median(values_of(report, output, name, "steps")) for name, _ in own]
            errors = [values_of(report, output, name, "error") for name, _ in own]
            medians, highs = (np.array([np.percentile(each, share) for each in errors]) for share in (50, 95))
            if method == "tolerance":
                axis.errorbar(
                    steps, medians, [0 * medians, highs - medians], fmt="o", color=colour, zorder=3, label="tolerance"
                )
                for (_, setting), x, y in zip(own, steps, medians):
                    axis.annotate(setting, (x, y), (-6, -11), textcoords="offset points", ha="right", fontsize=8)
            else:
                axis.plot(steps, medians, color=colour, label=method)
                if method in ("calibrated", "gausslegendre"):
                    axis.fill_between(steps, medians, highs, color=colour, alpha=0.15, linewidth=0)
        ticks = [4, 8, 16, 32, 50, 100]
        axis.set(xscale="log", yscale="log", xlabel="gradient evaluations", title=f"output: {output}", xticks=ticks)
        axis.set_xticklabels(map(str, ticks))
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0, 0].set_ylabel("relative error in pixel space")
    axes[0, 0].legend(frameon=False, fontsize=8)
    figure.suptitle("median, and to the 95th percentile, over held-out images", fontsize=9)
    figure.tight_layout()
    figure.savefig(file, dpi=150)
    plt.close(figure)
