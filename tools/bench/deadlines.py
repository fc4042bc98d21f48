"""``make bench-deadlines``: whether answers keep their deadlines, and how errors fall with longer ones.

Jobs go to the engine one after the other, over held-out images, with several deadlines in turn. For each deadline, it
measures how late answers are, the true error (against the integral of ``make quality``, whose files it shares) and how
the estimate compares with it. Prints a table and writes JSON.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from tools.evaluation.measuring import (
    default_device,
    describe_machine,
    distribution,
    explain,
    relative_distance,
    write_report,
)
from tools.paths import OUTPUTS
from tools.quality import HeldOut, Rules

DEADLINES_MS = (200, 400, 800, 1600)
MOST_STEPS = 1000


def measure(held_out: HeldOut, deadlines_ms: list[int], requests: int, images: int) -> dict[str, dict[str, Any]]:
    """A summary of the answers for each deadline in ms."""
    named = held_out.images(images)
    names, jobs = list(named), [held_out.job(image, "logit") for image in named.values()]
    integrals = [held_out.integral(name, job)["logit"] for name, job in zip(tqdm(names, desc="integrals"), jobs)]
    passes = _time_passes(held_out)
    answers_by_deadline: dict[str, list[dict[str, Any]]] = {str(deadline_ms): [] for deadline_ms in deadlines_ms}
    for number in tqdm(range(requests), desc="requests"):
        job, integral = jobs[number % images], integrals[number % images]
        for deadline_ms in deadlines_ms:
            passes.clear()
            started = time.monotonic()
            sent = replace(job, n_steps=MOST_STEPS, deadline=started + deadline_ms / 1000)
            (explanation,) = explain(held_out.engine, [sent])
            explanation.attributions.cpu()
            seconds = time.monotonic() - started
            answers_by_deadline[str(deadline_ms)].append(
                {
                    "image": names[number % images],
                    "milliseconds": 1000 * seconds,
                    "longest_pass_ms": 1000 * max(passes),
                    "steps": explanation.n_steps,
                    "error": relative_distance(explanation.attributions, integral),
                    "estimate": explanation.error_estimate,
                }
            )
    return {deadline_ms: summarise(float(deadline_ms), answers) for deadline_ms, answers in answers_by_deadline.items()}


def summarise(deadline_ms: float, answers: list[dict[str, Any]]) -> dict[str, Any]:
    """Summary of the answers with one deadline."""
    milliseconds, passes, steps, errors, estimates = (
        np.array([answer[key] for answer in answers])
        for key in ("milliseconds", "longest_pass_ms", "steps", "error", "estimate")
    )
    return {
        "milliseconds": distribution(milliseconds),
        "within_deadline": float(np.mean(milliseconds <= deadline_ms)),
        "within_deadline_and_a_pass": float(np.mean(milliseconds <= deadline_ms + passes)),
        "steps": distribution(steps),
        "error": distribution(errors),
        "estimate_at_least_the_error": float(np.mean(estimates >= errors)),
        "estimate_over_error_p50": float(np.median(estimates / errors)),
    }


def _time_passes(held_out: HeldOut) -> list[float]:
    """A list to which the seconds of every further pass are appended."""
    passes: list[float] = []
    engine: Any = held_out.engine  # one of its methods is replaced
    gradients = engine.passes.gradients

    def timed(*arguments: Any) -> torch.Tensor:
        started = time.monotonic()
        result: torch.Tensor = gradients(*arguments)
        if held_out.device.type == "cuda":
            torch.cuda.synchronize(held_out.device)
        passes.append(time.monotonic() - started)
        return result

    engine.passes.gradients = timed
    return passes


def table(report: dict[str, Any]) -> str:
    """A Markdown table of the summaries."""
    lines = [
        "| deadline | time, median (95 %) | within deadline | within deadline + one pass | steps, median "
        "| error, median (95 %) | estimate at least the error | estimate / error, median |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for deadline_ms, summary in report["deadlines"].items():
        milliseconds, steps, errors = (summary[key] for key in ("milliseconds", "steps", "error"))
        lines.append(
            f"| {deadline_ms} ms | {milliseconds['p50']:.0f} ({milliseconds['p95']:.0f}) ms "
            f"| {summary['within_deadline']:.0%} | {summary['within_deadline_and_a_pass']:.0%} "
            f"| {steps['p50']:.0f} | {errors['p50']:.4f} ({errors['p95']:.4f}) "
            f"| {summary['estimate_at_least_the_error']:.0%} | {summary['estimate_over_error_p50']:.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.bench.deadlines", description=__doc__.splitlines()[0])
    parser.add_argument("--device", type=torch.device, default=default_device())
    parser.add_argument("--deadlines-ms", type=int, nargs="+", default=list(DEADLINES_MS))
    parser.add_argument("--requests", type=int, default=50, help="with each deadline (default: 50)")
    parser.add_argument("--images", type=int, default=10, help="taken in turn (default: 10)")
    parser.add_argument("--reference-steps", type=int, default=2048)
    parser.add_argument("--folder", type=Path, default=OUTPUTS / "quality", help="where references are kept")
    parser.add_argument("--out", type=Path, default=OUTPUTS / "bench" / "deadlines.json")
    arguments = parser.parse_args()
    held_out = HeldOut("shapes", arguments.device, arguments.reference_steps, arguments.folder, Rules())
    deadlines = measure(held_out, arguments.deadlines_ms, arguments.requests, arguments.images)
    report = {
        "command": " ".join(["python -m tools.bench.deadlines", *sys.argv[1:]]),
        "machine": describe_machine(arguments.device),
        "reference_steps": arguments.reference_steps,
        "deadlines": deadlines,
    }
    write_report(report, table(report), arguments.out)


if __name__ == "__main__":
    main()
