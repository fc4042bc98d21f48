"""The command ``explain``: explain images through a server, print a table, write heatmaps and a report."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import math
import os
import sys
from collections.abc import AsyncIterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tqdm import tqdm

from explain_client import __version__, web
from explain_client.aio import AsyncExplainClient
from explain_client.client import DEFAULT_URL, ExplainClient
from explain_client.contact_sheet import ContactSheet
from explain_client.doctor import diagnose
from explain_client.errors import ExplainError, UnavailableError
from explain_client.images import DEFAULT_VIEW, View
from explain_client.protocol import Wanted
from explain_client.report import Report
from explain_client.results import Classification, Explanation, Level, Prediction
from explain_client.run_facts import Run, describe_run
from explain_client.runs import STDIN, Outcome, Source, explain_all, find_sources

ALL_EXPLAINED, SOME_FAILED, WRONG_USAGE, NO_SERVER, INTERRUPTED = 0, 1, 2, 3, 130
HEADER = f"{'image':28} {'label':14} {'prob.':>6} {'explained':>14} {'steps':>5} {'error':>7} {'delta':>9} {'ms':>7}"
# Contract parameters, by the type that their option takes.
PARAMETERS: dict[str, type] = {
    "n_steps": int,
    "tolerance": float,
    "deadline_ms": float,
    "method": str,
    "baseline": str,
    "output": str,
    "contrast": int,
    "nt_samples": int,
    "stdevs": float,
    "seed": int,
    "overlay": str,
    "polarity": str,
    "clip_percentile": float,
    "colormap": str,
}
EPILOG = """exit status: 0 all images explained; 1 some failed (they are listed at the end); 2 wrong usage;
3 the server cannot be reached; 130 interrupted.
'explain doctor [--url HOST:PORT]' finds out what is wrong with a server.
'explain web [--url HOST:PORT]' explains pictures on a page in the browser."""


def main(arguments: list[str] | None = None) -> None:
    """Entry point."""
    words = sys.argv[1:] if arguments is None else arguments
    try:
        if words[:1] == ["doctor"] and not os.path.exists("doctor"):
            sys.exit(_doctor(words[1:]))
        if words[:1] == ["web"] and not os.path.exists("web"):
            sys.exit(web.main(words[1:]))
        parser = _parser()
        options = parser.parse_args(words)
        if options.stream and (options.report or options.contact_sheet):
            parser.error("--stream takes neither --report nor --contact-sheet")
        sys.exit(_stream(options) if options.stream else asyncio.run(_explain(options)))
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    except BrokenPipeError:  # the reader of the output has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(SOME_FAILED)


def _doctor(words: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="explain doctor", description="Find out what is wrong with a server.")
    parser.add_argument("--url", default=DEFAULT_URL, help="host and gRPC port (default: %(default)s)")
    options = parser.parse_args(words)
    print(f"explain-client {__version__}, tritonclient {version('tritonclient')}")
    is_good = True
    for finding in diagnose(options.url):
        print(f"{'ok   ' if finding.is_good else 'FAULT'} {finding.name}: {finding.message}", flush=True)
        is_good = is_good and finding.is_good
    return ALL_EXPLAINED if is_good else SOME_FAILED


class _Output:
    """Writes outcomes: a table or JSON lines, heatmaps, the report; collects failures, which are listed at the end."""

    def __init__(
        self, options: argparse.Namespace, report: Report | None = None, sheet: ContactSheet | None = None
    ) -> None:
        self._as_json, self._report, self._sheet = options.json, report, sheet
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
                _write(source.heatmap, explanation.heatmap_png or b"")
                if self._report is not None:
                    self._report.add(source.name, outcome.file, explanation, outcome.own_milliseconds)
                if self._sheet is not None:
                    self._sheet.add(source.name, outcome.file, explanation)
                self.line(json.dumps(_as_json(source, explanation)) if self._as_json else _row(source, explanation))
                return
            error: Exception | None = outcome.error
        except (OSError, ValueError) as failure:  # for example a full disk, or a folder of the heatmap's name
            error = failure
        self.failures.append(f"{source.name}: {error}")
        if self._report is not None:
            self._report.add_failure(source.name, str(error), outcome.file)
        if self._as_json:
            self.line(json.dumps({"image": source.name, "error": str(error)}))


async def _explain(options: argparse.Namespace) -> int:
    sources = _sources(options)
    async with AsyncExplainClient(options.url, options.timeout) as client:
        with contextlib.ExitStack() as stack:
            try:
                await client.check()
            except UnavailableError as error:
                print(f"{options.url} cannot be reached: {error}; try explain doctor", file=sys.stderr)
                return NO_SERVER
            run, view = Run(), DEFAULT_VIEW
            if options.report or options.contact_sheet:
                run, view = await describe_run(client, options.target, _parameters(options)), await _view(client)
            report = stack.enter_context(Report(options.report, view, run)) if options.report else None
            sheet = (
                stack.enter_context(ContactSheet(options.contact_sheet, view, run)) if options.contact_sheet else None
            )
            if sheet is not None:
                stack.enter_context(sheet)
            output = _Output(options, report, sheet)
            bar = stack.enter_context(
                tqdm(total=len(sources), unit="image", disable=not _shows_progress(options, len(sources)))
            )
            async for outcome in _outcomes(client, sources, options):
                output.take(outcome)
                bar.update()
    return _finish(options, output)


async def _view(client: AsyncExplainClient) -> View:
    """The server's view of images; if it keeps its models' configs to itself, the usual one."""
    try:
        return await client.view()
    except ExplainError as error:
        print(
            f"the server does not say how it crops images, so the report may show a different crop: {error}",
            file=sys.stderr,
        )
        return DEFAULT_VIEW


def _sources(options: argparse.Namespace) -> list[Source]:
    """The images to explain; ends the command if no image was named or matched."""
    sources = find_sources(options.images, options.out)
    if not sources:
        print("no images found", file=sys.stderr)
        sys.exit(WRONG_USAGE)
    if not options.skip_existing:
        return sources
    left = [source for source in sources if not source.heatmap.exists()]
    print(f"{len(sources) - len(left)} of {len(sources)} have their heatmaps", file=sys.stderr)
    return left


def _outcomes(client: AsyncExplainClient, sources: list[Source], options: argparse.Namespace) -> AsyncIterator[Outcome]:
    want: list[Wanted] = ["heatmap", "saliency"] if options.report or options.contact_sheet else ["heatmap"]
    return explain_all(client, sources, options.concurrency, options.target, options.top_k, want, _parameters(options))


def _stream(options: argparse.Namespace) -> int:
    """Explain image by image: print the prediction at once, then a line for each level."""
    sources, output = _sources(options), _Output(options)
    with ExplainClient(options.url, options.timeout) as client:
        for source in sources:
            try:
                responses = client.explain_stream(
                    source.read(), target=options.target, top_k=options.top_k, want=["heatmap"], **_parameters(options)
                )
                for response in responses:
                    output.line(_stream_line(source, response, options.json))
                    if isinstance(response, Level):
                        _write(source.heatmap, response.heatmap_png or b"")
            except UnavailableError as error:
                print(f"{options.url} cannot be reached: {error}; try explain doctor", file=sys.stderr)
                return NO_SERVER
            except (ExplainError, OSError) as error:
                output.failures.append(f"{source.name}: {error}")
    return _finish(options, output)


def _finish(options: argparse.Namespace, output: _Output) -> int:
    print(f"heatmaps in {options.out}/", file=sys.stderr)
    if options.report:
        print(f"report in {options.report}", file=sys.stderr)
    if options.contact_sheet:
        print(f"all in one picture: {options.contact_sheet}", file=sys.stderr)
    for failure in output.failures:
        print(failure, file=sys.stderr)
    return SOME_FAILED if output.failures else ALL_EXPLAINED


def _parameters(options: argparse.Namespace) -> dict[str, Any]:
    return {name: value for name in PARAMETERS if (value := getattr(options, name)) is not None}


def _shows_progress(options: argparse.Namespace, images: int) -> bool:
    return images > 1 and (sys.stderr.isatty() if options.progress is None else options.progress)


def _write(path: Path, content: bytes) -> None:
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


def _stream_line(source: Source, response: Classification | Level, as_json: bool) -> str:
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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="explain",
        description="Explain what an image classifier saw in images.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "images",
        nargs="+",
        metavar="IMAGE",
        help=f"JPEG, PNG or WebP files, folders of them, quoted patterns, or {STDIN} for standard input",
    )
    parser.add_argument("--version", action="version", version=f"explain-client {__version__}")
    server = parser.add_argument_group("server")
    server.add_argument("--url", default=DEFAULT_URL, help="host and gRPC port (default: %(default)s)")
    server.add_argument("--timeout", type=float, default=300.0, help="seconds for an image (default: 300)")
    server.add_argument("--concurrency", type=_positive, default=8, help="images in flight (default: %(default)s)")
    output = parser.add_argument_group("output")
    output.add_argument("--out", type=Path, default=Path("explanations"), metavar="DIR", help="default: %(default)s")
    output.add_argument("--report", type=Path, metavar="FILE.html", help="one self-contained page with all results")
    output.add_argument(
        "--contact-sheet", type=Path, metavar="FILE.png", help="one picture of all images beside their explanations"
    )
    output.add_argument("--json", action="store_true", help="one JSON object a line instead of the table")
    output.add_argument("--top-k", type=_positive, default=5, help="predictions of each image (default: %(default)s)")
    output.add_argument("--skip-existing", action="store_true", help="leave out images whose heatmaps exist")
    output.add_argument(
        "--progress", action=argparse.BooleanOptionalAction, help="a progress bar (default: on a terminal)"
    )
    output.add_argument(
        "--stream",
        action="store_true",
        help="one image after the other: its prediction at once, then a line for each level",
    )
    contract = parser.add_argument_group("what is explained, and how")
    contract.add_argument("--target", type=int, help="class to explain (default: the predicted one)")
    helps = {
        "n_steps": "gradient evaluations; with --tolerance or --deadline-ms their limit (default: 50)",
        "tolerance": "largest relative error, 0.001 to 0.5: takes as few steps as reach it",
        "deadline_ms": "the best explanation within this time; may overrun by one pass",
        "method": "quadrature rule, by Captum's name, or calibrated (default: gausslegendre)",
        "baseline": "zero, black, white, gray, blur or noise (default: zero)",
        "output": "what is explained: logit or probability (default: logit)",
        "contrast": "a class to subtract",
        "nt_samples": "SmoothGrad: noisy copies of the image (default: 1)",
        "stdevs": "SmoothGrad: standard deviation of the noise (default: 0.1)",
        "seed": "seed of all noise (default: 0)",
        "overlay": "blend, heatmap or masked (default: blend)",
        "polarity": "positive, negative, absolute or all (default: positive)",
        "clip_percentile": "percentile at which the colours saturate (default: 99)",
        "colormap": "a matplotlib colour map (default: inferno, or coolwarm for all)",
    }
    for name, kind in PARAMETERS.items():
        contract.add_argument(f"--{name.replace('_', '-')}", type=kind, help=helps[name])
    return parser


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError
    return number


if __name__ == "__main__":
    main()
