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
    """Of each output and rule, what a report says of all images.

    Args:
        results: an entry for each image and output, with what each rule gave.
    """
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for output in dict.fromkeys(entry["output"] for entry in results):
        own = [entry["rules"] for entry in results if entry["output"] == output]
        found[output] = {rule: _summarise_rule(rule, [rules[rule] for rules in own]) for rule in own[0]}
    return found


def _summarise_rule(rule: str, values: list[dict[str, Any]]) -> dict[str, Any]:
    kind, setting = rule.split()
    of = {key: np.array([each[key] for each in values]) for key in values[0] if key != "estimate"}
    found: dict[str, Any] = {key: distribution(of.pop(key)) for key in ("steps", "error")}
    found |= {f"{key}_p50": float(np.median(each)) for key, each in of.items()}
    if kind in TOLERANT:
        error = np.array([each["error"] for each in values])
        estimate = np.array([each["estimate"] for each in values])
        found |= {
            "within_tolerance": float(np.mean(error <= float(setting))),
            "estimate_over_error_p50": float(np.median(estimate / error)),
            "estimate_near_error": float(np.mean((estimate >= NEAR[0] * error) & (estimate <= NEAR[1] * error))),
        }
    return found


def steps_for(rules: dict[str, dict[str, Any]], method: str, error: float) -> float:
    """Steps that bring a fixed method's 95th percentile down to ``error``.

    By lines between measured numbers of steps, and on beyond them, on log scales.
    """
    measured = [(int(rule.split()[1]), found) for rule, found in rules.items() if rule.split()[0] == method]
    counts = np.log([count for count, _ in measured])
    errors = np.log([found["error"]["p95"] for _, found in measured])
    slopes = np.diff(errors) / np.diff(counts)
    if np.log(error) >= errors[0]:
        return float(np.exp(counts[0] + (np.log(error) - errors[0]) / slopes[0]))
    below = next((index for index, value in enumerate(errors) if value <= np.log(error)), len(errors) - 1)
    return float(np.exp(counts[below] + (np.log(error) - errors[below]) / slopes[below - 1]))


def table(report: dict[str, Any]) -> str:
    """Markdown."""
    machine = machine_line(report["machine"])
    lines = [f"`{report['command']}`: {machine}", ""]
    for output in report["rules"]:
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
    for rule, found in report["rules"][output].items():
        error = found["error"]
        time = f" {1e3 * report['seconds'][rule]:.0f} ms |" if timed else ""
        yield (
            f"| {rule} | {found['steps']['p50']:.0f} | {error['p50']:.4f} | {error['p95']:.4f} "
            f"| {found['top_1%_p50']:.1%} | {found['top_5%_p50']:.1%} | {found['rank_correlation_p50']:.4f} "
            f"| {found['gap_p50']:.4f} |{time}"
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
    for rule, found in rules.items():
        kind, setting = rule.split()
        if kind not in TOLERANT:
            continue
        error, steps = found["error"], found["steps"]
        needed = {method: steps_for(rules, method, error["p95"]) for method in methods}
        best = min(captums, key=lambda method: needed[method])
        yield (
            f"| {setting}{', no calibration' * (kind == 'uncalibrated')} | {error['p50']:.4f} ({error['p95']:.4f}) "
            f"| {found['within_tolerance']:.0%} | {found['estimate_over_error_p50']:.2f} "
            f"| {found['estimate_near_error']:.0%} | {steps['p50']:.0f} ({steps['p95']:.0f}) "
            f"| {needed[best]:.1f} ({best}) | {needed['calibrated']:.1f} |"
        )
    yield ""


def plot(report: dict[str, Any], file: Path) -> None:
    """Error against steps: medians as lines, up to the 95th percentile shaded; dots where each tolerance stops."""
    outputs = list(report["rules"])
    figure, axes = plt.subplots(1, len(outputs), figsize=(5.6 * len(outputs), 4.4), sharey=True, squeeze=False)
    for axis, output in zip(axes[0], outputs):
        for method, colour in COLOURS.items():
            own = {rule: found for rule, found in report["rules"][output].items() if rule.split()[0] == method}
            if not own:
                continue
            steps = [found["steps"]["p50"] for found in own.values()]
            medians, highs = (np.array([found["error"][part] for found in own.values()]) for part in ("p50", "p95"))
            if method in TOLERANT:
                axis.errorbar(
                    steps, medians, [0 * medians, highs - medians], fmt="o", color=colour, zorder=3, label=method
                )
                for rule, x, y in zip(own, steps, medians):
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
