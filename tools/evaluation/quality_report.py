"""The tables and the plot of ``make quality``."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np

from tools.evaluation.measuring import machine_line

mpl.use("Agg")
import matplotlib.pyplot as plt

COLOURS = {
    "calibrated": "#d1495b",
    "riemann_middle": "#30638e",
    "gausslegendre": "#003d5b",
    "riemann_trapezoid": "#8d99ae",
    "tolerance": "#edae49",
    "uncalibrated": "#66a182",
}
# Kinds of rules whose setting is a tolerance.
TOLERANT = ("tolerance", "uncalibrated")
# An estimate is near the true error between these multiples of it.
NEAR = (0.4, 2.5)


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
    names = {"deletion": "deletion", "insertion": "insertion"}
    if report["network"] == "shapes":
        names |= {"top_share_inside": "top 1 % inside", "peak_inside": "peak inside"}
    lines += ["| map | " + " | ".join(names.values()) + " |", "|---" * (1 + len(names)) + "|"]
    for name, found in report["faithfulness"].items():
        lines.append(f"| {name} | " + " | ".join(f"{found[key]:.3f}" for key in names) + " |")
    return "\n".join(lines) + "\n"


def _rules_table(report: dict[str, Any], output: str) -> Iterable[str]:
    points = report["reference_steps"]
    yield f"{report['network']}, `{output}`, {report['images']} images, reference: midpoint rule of {points} points"
    yield ""
    timed = output == "logit"  # which is what was timed
    yield (
        "| rule | steps, median | error, median | error, 95 % | top 1 % of pixels | top 5 % | rank correlation "
        "| gap, median |" + " time |" * timed
    )
    yield "|---" * (8 + timed) + "|"
    for name, _, _ in rules_of(report):
        keys = ("steps", "error", "top_1%", "top_5%", "rank_correlation", "gap")
        steps, error, top_1, top_5, rank, gap = (values_of(report, output, name, key) for key in keys)
        time = f" {1e3 * report['seconds'][name]:.0f} ms |" if timed else ""
        yield (
            f"| {name} | {np.median(steps):.0f} | {np.median(error):.4f} | {np.percentile(error, 95):.4f} "
            f"| {np.median(top_1):.1%} | {np.median(top_5):.1%} | {np.median(rank):.4f} | {np.median(gap):.4f} |{time}"
        )
    yield ""


def _tolerances_table(report: dict[str, Any], output: str) -> Iterable[str]:
    methods = list(dict.fromkeys(kind for _, kind, _ in rules_of(report) if kind not in TOLERANT))
    captums = [method for method in methods if method != "calibrated"]
    yield (
        "| tolerance | true error, median (95 %) | within it | estimate / error, median | estimate 0.4 to 2.5 times it "
        "| steps, median (95 %) | for the same 95 % error: best of Captum's methods | calibrated |"
    )
    yield "|---" * 8 + "|"
    for name, kind, setting in rules_of(report):
        if kind not in TOLERANT:
            continue
        errors, steps, estimates = (values_of(report, output, name, key) for key in ("error", "steps", "estimate"))
        high = np.percentile(errors, 95)
        needed = {method: steps_for(report, output, method, high) for method in methods}
        best = min(captums, key=needed.get)
        near = np.mean((estimates >= NEAR[0] * errors) & (estimates <= NEAR[1] * errors))
        yield (
            f"| {setting}{', no calibration' * (kind == 'uncalibrated')} | {np.median(errors):.4f} ({high:.4f}) "
            f"| {np.mean(errors <= float(setting)):.0%} | {np.median(estimates / errors):.2f} | {near:.0%} "
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
            if not own:
                continue
            steps = [np.median(values_of(report, output, name, "steps")) for name, _ in own]
            errors = [values_of(report, output, name, "error") for name, _ in own]
            medians, highs = (np.array([np.percentile(each, share) for each in errors]) for share in (50, 95))
            if method in TOLERANT:
                axis.errorbar(
                    steps, medians, [0 * medians, highs - medians], fmt="o", color=colour, zorder=3, label=method
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
