"""The tables and the plot of ``make quality``."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np

from tools.evaluation.measuring import distribution, machine_line

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


def summarise(results: list[dict[str, Any]]) -> dict[str, dict[str, dict[str, Any]]]:
    """Summaries over images, by output and rule.

    Args:
        results: an entry for each image and output, with the results of each rule.
    """
    summaries: dict[str, dict[str, dict[str, Any]]] = {}
    for output in dict.fromkeys(entry["output"] for entry in results):
        by_image = [entry["rules"] for entry in results if entry["output"] == output]
        summaries[output] = {rule: _summarise_rule(rule, [rules[rule] for rules in by_image]) for rule in by_image[0]}
    return summaries


def _summarise_rule(rule: str, values: list[dict[str, Any]]) -> dict[str, Any]:
    kind, setting = rule.split()
    columns = {key: np.array([value[key] for value in values]) for key in values[0] if key != "estimate"}
    summary: dict[str, Any] = {key: distribution(columns.pop(key)) for key in ("steps", "error")}
    summary |= {f"{key}_p50": float(np.median(column)) for key, column in columns.items()}
    if kind in TOLERANT:
        error = np.array([value["error"] for value in values])
        estimate = np.array([value["estimate"] for value in values])
        summary |= {
            "within_tolerance": float(np.mean(error <= float(setting))),
            "estimate_over_error_p50": float(np.median(estimate / error)),
            "estimate_near_error": float(np.mean((estimate >= NEAR[0] * error) & (estimate <= NEAR[1] * error))),
        }
    return summary


def steps_for(rules: dict[str, dict[str, Any]], method: str, error: float) -> float:
    """Steps that bring a fixed method's 95th percentile down to ``error``.

    Interpolates between measured numbers of steps, and extrapolates beyond them, on log scales.
    """
    measured = [(int(rule.split()[1]), summary) for rule, summary in rules.items() if rule.split()[0] == method]
    counts = np.log([count for count, _ in measured])
    errors = np.log([summary["error"]["p95"] for _, summary in measured])
    slopes = np.diff(errors) / np.diff(counts)
    if np.log(error) >= errors[0]:
        return float(np.exp(counts[0] + (np.log(error) - errors[0]) / slopes[0]))
    below = next((index for index, value in enumerate(errors) if value <= np.log(error)), len(errors) - 1)
    return float(np.exp(counts[below] + (np.log(error) - errors[below]) / slopes[below - 1]))


def table(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    machine = machine_line(report["machine"])
    lines = [f"`{report['command']}`: {machine}", ""]
    for output in report["rules"]:
        lines += _rules_table(report, output)
        lines += _tolerances_table(report, output)
    return "\n".join([*lines, *faithfulness_table(report)]) + "\n"


def faithfulness_table(report: dict[str, Any]) -> Iterable[str]:
    """Lines of a Markdown table of the maps' faithfulness."""
    names = {"deletion": "deletion", "insertion": "insertion"}
    if report["network"] == "shapes":
        names |= {"top_share_inside": "top 1 % inside", "peak_inside": "peak inside"}
    yield from ("| map | " + " | ".join(names.values()) + " |", "|---" * (1 + len(names)) + "|")
    for name, means in report["faithfulness"].items():
        yield f"| {name} | " + " | ".join(f"{means[key]:.3f}" for key in names) + " |"


def _rules_table(report: dict[str, Any], output: str) -> Iterable[str]:
    points = report["reference_steps"]
    yield f"{report['network']}, `{output}`, {report['images']} images, reference: midpoint rule of {points} points"
    yield ""
    timed = output == "logit"  # only the logit is timed
    yield (
        "| rule | steps, median | error, median | error, 95 % | top 1 % of pixels | top 5 % | rank correlation "
        "| gap, median |" + " time |" * timed
    )
    yield "|---" * (8 + timed) + "|"
    for rule, summary in report["rules"][output].items():
        error = summary["error"]
        time = f" {1e3 * report['seconds'][rule]:.0f} ms |" if timed else ""
        yield (
            f"| {rule} | {summary['steps']['p50']:.0f} | {error['p50']:.4f} | {error['p95']:.4f} "
            f"| {summary['top_1%_p50']:.1%} | {summary['top_5%_p50']:.1%} | {summary['rank_correlation_p50']:.4f} "
            f"| {summary['gap_p50']:.4f} |{time}"
        )
    yield ""


def _tolerances_table(report: dict[str, Any], output: str) -> Iterable[str]:
    rules = report["rules"][output]
    methods = [kind for kind in dict.fromkeys(rule.split()[0] for rule in rules) if kind not in TOLERANT]
    captums = [method for method in methods if method != "calibrated"]
    yield (
        "| tolerance | true error, median (95 %) | within it | estimate / error, median | estimate 0.4 to 2.5 times it "
        "| steps, median (95 %) | for the same 95 % error: best of Captum's methods | calibrated |"
    )
    yield "|---" * 8 + "|"
    for rule, summary in rules.items():
        kind, setting = rule.split()
        if kind not in TOLERANT:
            continue
        error, steps = summary["error"], summary["steps"]
        needed = {method: steps_for(rules, method, error["p95"]) for method in methods}
        best = min(captums, key=lambda method: needed[method])
        yield (
            f"| {setting}{', no calibration' * (kind == 'uncalibrated')} | {error['p50']:.4f} ({error['p95']:.4f}) "
            f"| {summary['within_tolerance']:.0%} | {summary['estimate_over_error_p50']:.2f} "
            f"| {summary['estimate_near_error']:.0%} | {steps['p50']:.0f} ({steps['p95']:.0f}) "
            f"| {needed[best]:.1f} ({best}) | {needed['calibrated']:.1f} |"
        )
    yield ""


def plot(report: dict[str, Any], file: Path) -> None:
    """Plot error against steps: medians as lines, shaded up to the 95th percentile; a dot for each tolerance."""
    outputs = list(report["rules"])
    figure, axes = plt.subplots(1, len(outputs), figsize=(5.6 * len(outputs), 4.4), sharey=True, squeeze=False)
    for axis, output in zip(axes[0], outputs):
        for method, colour in COLOURS.items():
            rules = {rule: values for rule, values in report["rules"][output].items() if rule.split()[0] == method}
            if not rules:
                continue
            steps = [summary["steps"]["p50"] for summary in rules.values()]
            medians, highs = (np.array([values["error"][part] for values in rules.values()]) for part in ("p50", "p95"))
            if method in TOLERANT:
                axis.errorbar(
                    steps, medians, [0 * medians, highs - medians], fmt="o", color=colour, zorder=3, label=method
                )
                for rule, x, y in zip(rules, steps, medians):
                    axis.annotate(
                        rule.split()[1], (x, y), (-6, -11), textcoords="offset points", ha="right", fontsize=8
                    )
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
