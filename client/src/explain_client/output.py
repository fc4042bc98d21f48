"""What the command ``explain`` prints and writes: a table or JSON lines, heatmaps, and how it ended."""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

from tqdm import tqdm

from explain_client.report import Report
from explain_client.results import Classification, Explanation, Level, Prediction
from explain_client.runs import Outcome, Source

ALL_EXPLAINED, SOME_FAILED, WRONG_USAGE, NO_SERVER, INTERRUPTED = 0, 1, 2, 3, 130
HEADER = f"{'image':28} {'label':14} {'prob.':>6} {'explained':>14} {'steps':>5} {'error':>7} {'delta':>9} {'ms':>7}"


class Output:
    """Writes outcomes: a table or JSON lines, heatmaps, the report; collects failures, which are listed at the end."""

    def __init__(self, options: argparse.Namespace, report: Report | None) -> None:
        self._as_json, self._report = options.json, report
        self.failures: list[str] = []
        if not self._as_json:
            self.line(HEADER)

    def line(self, text: str) -> None:
        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()

    def take(self, outcome: Outcome) -> None:
        source, explanation = outcome.source, outcome.explanation
        try:
            if explanation is not None:
                write_whole(source.heatmap, explanation.heatmap_png or b"")
                if self._report is not None:
                    self._report.add(source.name, outcome.file, explanation)
                self.line(json.dumps(_as_json(source, explanation)) if self._as_json else _row(source, explanation))
                return
            error: Exception | None = outcome.error
        except (OSError, ValueError) as failure:  # for example a full disk, or a folder of the heatmap's name
            error = failure
        self.failures.append(f"{source.name}: {error}")
        if self._report is not None:
            self._report.add_failure(source.name, str(error))
        if self._as_json:
            self.line(json.dumps({"image": source.name, "error": str(error)}))


def finish(options: argparse.Namespace, output: Output) -> int:
    print(f"heatmaps in {options.out}/", file=sys.stderr)
    if options.report:
        print(f"report in {options.report}", file=sys.stderr)
    for failure in output.failures:
        print(failure, file=sys.stderr)
    return SOME_FAILED if output.failures else ALL_EXPLAINED


def write_whole(path: Path, content: bytes) -> None:
    """Write all of a file or none of it, so that a later run can skip the files that exist."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.part")
    unfinished.write_bytes(content)
    unfinished.replace(path)


def _row(source: Source, explanation: Explanation) -> str:
    best = explanation.predictions[0]
    name = source.name if source.path is None else source.path.name
    error = "-" if math.isnan(explanation.error_estimate) else f"{explanation.error_estimate:.1%}"
    return (
        f"{name:28.28} {best.label:14.14} {best.probability:6.1%} {explanation.explained_label:>14.14} "
        f"{explanation.n_steps:5} {error:>7} {explanation.convergence_delta:9.4f} {explanation.milliseconds:7.0f}"
    )


def stream_line(source: Source, response: Classification | Level, as_json: bool) -> str:
    if as_json:
        return json.dumps(_as_json(source, response))
    if isinstance(response, Classification):
        best = response.predictions[0]
        return f"{source.name}: {best.label} {best.probability:.1%} after {response.milliseconds:.0f} ms"
    error = "-" if math.isnan(response.error_estimate) else f"{response.error_estimate:.2%}"
    return f"    {response.n_steps:4} steps, estimated error {error:>7} after {response.milliseconds:.0f} ms"


def _as_json(source: Source, answer: Explanation | Classification | Level) -> dict[str, Any]:
    line: dict[str, Any] = {"image": source.name, "milliseconds": round(answer.milliseconds, 1)}
    if isinstance(answer, Explanation | Classification):
        line |= {
            "predictions": [_prediction_as_json(prediction) for prediction in answer.predictions],
            "explained_class": answer.explained_class,
            "explained_label": answer.explained_label,
        }
    if isinstance(answer, Explanation | Level):
        line |= {
            "n_steps": answer.n_steps,
            "error_estimate": None if math.isnan(answer.error_estimate) else answer.error_estimate,
            "convergence_delta": answer.convergence_delta,
            "heatmap": str(source.heatmap),
        }
    if isinstance(answer, Level):
        line["is_last"] = answer.is_last
    return line


def _prediction_as_json(prediction: Prediction) -> dict[str, Any]:
    return {"index": prediction.index, "label": prediction.label, "probability": prediction.probability}
