"""What the command ``explain`` prints and writes: a table or JSON lines, heatmaps, and how it ended."""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, TextIO

from tqdm import tqdm

from explain_client.contact_sheet import ContactSheet
from explain_client.options import UsageError
from explain_client.records import Record, with_record
from explain_client.report import Report
from explain_client.results import Classification, Explanation, Level, Prediction
from explain_client.runs import Outcome, Source
from explain_client.table import EXPLANATIONS, LEVELS, Table, decimal, percent

ALL_EXPLAINED, SOME_FAILED, WRONG_USAGE, NO_SERVER, INTERRUPTED = 0, 1, 2, 3, 130
RED = "31"


class Output:
    """Writes outcomes: a table or JSON lines, heatmaps, the report; collects failures, which are listed at the end.

    Args:
        options: of the command.
        made_with: the options that are recorded in heatmaps.
        report: the page under way, if there is one.
        sheet: the contact sheet under way, if there is one.
    """

    def __init__(
        self,
        options: argparse.Namespace,
        made_with: Mapping[str, Any],
        report: Report | None = None,
        sheet: ContactSheet | None = None,
    ) -> None:
        self._options, self._made_with, self._report, self._sheet = options, made_with, report, sheet
        self._failures: list[str] = []
        self._heatmaps: dict[Path, Source] = {}
        self._kept = 0
        self._table = Table(LEVELS if options.stream else EXPLANATIONS)
        if not options.json:
            self.line(self._table.header())

    def line(self, text: str) -> None:
        """Print a line above the progress bar."""
        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()

    def keep(self, source: Source, record: Record) -> None:
        """Take the explanation of an earlier run."""
        self._kept += 1
        if self._report is None and self._sheet is None:
            return
        file = b""
        try:
            file = source.read()
            self._show(source, file, [record.explanation])
        except (OSError, ValueError) as error:
            self.fail(source, error, file)

    def take(self, outcome: Outcome) -> None:
        """Write the outcome of one image."""
        source = outcome.source
        if not outcome.explanations:
            self.fail(source, outcome.error, outcome.file)
        elif self._writes(outcome):
            for explanation in outcome.explanations:
                as_json = _as_json(source, explanation, self._heatmap_of(source, explanation))
                self.line(json.dumps(as_json) if self._options.json else self._row(source, explanation))

    def take_response(self, source: Source, first: Classification, response: Classification | Level) -> None:
        """Write a response of the stream that began with ``first``."""
        if isinstance(response, Level):
            whole = Explanation(
                **{name: getattr(response, name) for name in Level.__dataclass_fields__ if name != "is_last"},
                predictions=first.predictions,
                explained_class=first.explained_class,
                explained_label=first.explained_label,
            )
            self._write_heatmap(source, whole)
        self.line(
            json.dumps(_as_json(source, response, source.heatmap))
            if self._options.json
            else self._level(source, response)
        )

    def fail(self, source: Source, error: Exception | None, file: bytes = b"") -> None:
        """Note that an image was not explained; the report shows its file as a thumbnail."""
        self._failures.append(f"{source.name}: {error}")
        if self._report is not None:
            self._report.add_failure(source.name, str(error), file)
        if self._options.json:
            self.line(json.dumps({"image": source.name, "error": str(error)}))

    def finish(self, images: int) -> int:
        """Print the failures and the last line, for a run over so many images; returns the exit status."""
        for failure in self._failures:
            print(paint(failure, RED, sys.stderr), file=sys.stderr)
        if self._options.report:
            print(f"report in {self._options.report}", file=sys.stderr)
        if self._sheet is not None and not self._sheet.is_empty:
            print(f"all in one picture: {self._options.contact_sheet}", file=sys.stderr)
        written = list(self._heatmaps)
        where = f"heatmap in {written[0]}" if len(written) == 1 else f"heatmaps in {self._options.out}/"
        counts = [f"{len(set(self._heatmaps.values()))} of {images} explained"]
        counts += [f"{self._kept} kept from before"] if self._kept else []
        counts += [f"{len(self._failures)} failed"] if self._failures else []
        print(", ".join(counts) + (f"; {where}" if written else ""), file=sys.stderr)
        return SOME_FAILED if self._failures else ALL_EXPLAINED

    def _writes(self, outcome: Outcome) -> bool:
        """Write heatmaps, report and contact sheet; whether that went well."""
        try:
            for explanation in outcome.explanations:
                self._write_heatmap(outcome.source, explanation)
            self._show(outcome.source, outcome.file, outcome.explanations, outcome.own_milliseconds)
        except (OSError, ValueError) as error:  # for example a full disk, or a folder of the heatmap's name
            self.fail(outcome.source, error, outcome.file)
            return False
        return True

    def _show(
        self, source: Source, file: bytes, explanations: Sequence[Explanation], own_milliseconds: float | None = None
    ) -> None:
        """Add an image to report and contact sheet."""
        if self._report is not None:
            self._report.add(source.name, file, explanations, own_milliseconds)
        if self._sheet is not None:
            for explanation in explanations:
                self._sheet.add(source.name, file, explanation)

    def _write_heatmap(self, source: Source, explanation: Explanation) -> None:
        heatmap = self._heatmap_of(source, explanation)
        write_whole(heatmap, with_record(explanation, self._made_with))
        self._heatmaps[heatmap] = source

    def _heatmap_of(self, source: Source, explanation: Explanation) -> Path:
        return source.heatmap_of(explanation.explained_class) if self._options.targets else source.heatmap

    def _row(self, source: Source, explanation: Explanation) -> str:
        best = explanation.predictions[0]
        return self._table.row(
            [
                _short_name(source),
                best.label,
                percent(best.probability),
                explanation.explained_label,
                str(explanation.n_steps),
                percent(explanation.error_estimate),
                decimal(explanation.convergence_delta),
                decimal(explanation.milliseconds, 0),
            ]
        )

    def _level(self, source: Source, response: Classification | Level) -> str:
        milliseconds = decimal(response.milliseconds, 0)
        if isinstance(response, Classification):
            best = response.predictions[0]
            return self._table.row([_short_name(source), best.label, percent(best.probability), "", "", milliseconds])
        return self._table.row(["", "", "", str(response.n_steps), percent(response.error_estimate, 2), milliseconds])


def check_writable(folder: Path, option: str) -> None:
    """Check that files can be written to a folder, which is made and removed again if it does not exist.

    Raises:
        UsageError: they cannot.
    """
    missing = [each for each in (folder, *folder.parents) if not each.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UsageError(f"{option} {folder} cannot be written to: {error.strerror}") from None
    finally:
        for each in missing:
            if each.is_dir():
                each.rmdir()


def write_whole(path: Path, content: bytes) -> None:
    """Write all of a file or none of it, so that a later run can skip the files that exist."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.part")
    unfinished.write_bytes(content)
    unfinished.replace(path)


def paint(text: str, colour: str, file: TextIO) -> str:
    """A text in a colour where a terminal shows colours (no-color.org)."""
    has_colours = file.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    return f"\x1b[{colour}m{text}\x1b[0m" if has_colours else text


def _as_json(source: Source, answer: Explanation | Classification | Level, heatmap: Path) -> dict[str, Any]:
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
            "heatmap": str(heatmap),
        }
    if isinstance(answer, Level):
        line["is_last"] = answer.is_last
    return line


def _prediction_as_json(prediction: Prediction) -> dict[str, Any]:
    return {"index": prediction.index, "label": prediction.label, "probability": prediction.probability}


def _short_name(source: Source) -> str:
    return source.name if source.path is None else source.path.name
