"""``explain``: many images, several in flight, with a progress bar and a report; or one by one, as streams."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import sys
from collections.abc import Sequence
from typing import Any, cast

from PIL import Image
from tqdm import tqdm

from explain_client.aio import AsyncExplainClient
from explain_client.contact_sheet import ContactSheet
from explain_client.errors import ExplainError
from explain_client.images import DEFAULT_VIEW, View
from explain_client.labels import class_of
from explain_client.options import UsageError, connection_options, contract_parameters, refusing_usage
from explain_client.output import Output, check_writable
from explain_client.protocol import Wanted
from explain_client.records import Record, read_record
from explain_client.report import Report
from explain_client.results import Classification
from explain_client.run_facts import Run, describe_run
from explain_client.runs import Source, explain_all, find_sources, top_of


async def explain_images(options: argparse.Namespace) -> int:
    """Explain all images; returns the exit status.

    Raises:
        UsageError: there are no images, or something cannot be done as asked.
        UnavailableError: the server cannot be reached.
    """
    sources = _find_sources(options)
    with refusing_usage():
        client = AsyncExplainClient(timeout=options.timeout, **connection_options(options))
    async with client:
        await client.check()
        asked = await _with_classes(client, options)
        left, kept = _sort_out(sources, asked, _wanted(options)) if options.skip_existing else (sources, [])
        with contextlib.ExitStack() as stack:
            run_facts, view = Run(), DEFAULT_VIEW
            if options.report or options.contact_sheet:
                run_facts, view = await describe_run(client, **asked), await _view(client)
            report = stack.enter_context(Report(options.report, view, run_facts)) if options.report else None
            sheet = ContactSheet(options.contact_sheet, view, run_facts) if options.contact_sheet else None
            output = Output(options, asked, report, stack.enter_context(sheet) if sheet else None)
            try:
                for source, record in kept:
                    output.keep(source, record)
                run = _stream if options.stream else _batch
                await run(client, left, asked, options, output)
            except (KeyboardInterrupt, asyncio.CancelledError):
                output.finish(len(sources))
                raise
    return output.finish(len(sources))


async def _batch(
    client: AsyncExplainClient,
    sources: Sequence[Source],
    asked: dict[str, Any],
    options: argparse.Namespace,
    output: Output,
) -> None:
    top_k = max(options.top_k, top_of(options.targets))  # the report shows a bar for each explained class
    outcomes = explain_all(client, sources, options.concurrency, top_k=top_k, want=_wanted(options), **asked)
    bar = tqdm(total=len(sources), unit="image", disable=not _shows_progress(options, len(sources)))
    with bar:
        async with contextlib.aclosing(outcomes):
            async for outcome in outcomes:
                output.take(outcome)
                bar.update()


async def _stream(
    client: AsyncExplainClient,
    sources: Sequence[Source],
    asked: dict[str, Any],
    options: argparse.Namespace,
    output: Output,
) -> None:
    """Image by image: the prediction at once, then a line for each level."""
    for source in sources:
        try:
            responses = client.explain_stream(source.read(), top_k=options.top_k, want=["heatmap"], **asked)
            first: Classification | None = None
            async for response in responses:
                first = first or cast(Classification, response)
                output.take_response(source, first, response)
        except BrokenPipeError:
            raise
        except (ExplainError, OSError) as error:
            output.fail(source, error)


def _find_sources(options: argparse.Namespace) -> list[Source]:
    sources = find_sources(options.images, options.out)
    if not sources:
        raise UsageError("no images found")
    check_writable(options.out, "--out")
    for option, file in (("--report", options.report), ("--contact-sheet", options.contact_sheet)):
        if file is None:
            continue
        if file.is_dir():
            raise UsageError(f"{option} {file} is a folder, not a file")
        check_writable(file.parent, f"{option}: the folder")
    if options.contact_sheet and options.contact_sheet.suffix.lower() not in Image.registered_extensions():
        raise UsageError(f"--contact-sheet {options.contact_sheet} must end with .png, .jpg or the like")
    return sources


def _wanted(options: argparse.Namespace) -> list[Wanted]:
    """The tensors that the run takes; report and contact sheet draw the saliency."""
    return ["heatmap", "saliency"] if options.report or options.contact_sheet else ["heatmap"]


async def _with_classes(client: AsyncExplainClient, options: argparse.Namespace) -> dict[str, Any]:
    """Classes and parameters of each request, with numbers for labels, and in the range of the server's classes."""
    target, targets, parameters = options.target, options.targets, contract_parameters(options)
    with refusing_usage():
        if target is not None:
            target = class_of(target, await client.labels(), "--target")
        if isinstance(targets, list):
            labels = await client.labels()
            targets = list(dict.fromkeys(class_of(each, labels, "--targets") for each in targets))
        if "contrast" in parameters:
            parameters["contrast"] = class_of(parameters["contrast"], await client.labels(), "--contrast")
            if isinstance(targets, list) and parameters["contrast"] in targets:
                raise UsageError(f"--contrast must not be one of --targets, {parameters['contrast']}")
    return {**({"target": target} if targets is None else {"targets": targets}), **parameters}


def _sort_out(
    sources: Sequence[Source], asked: dict[str, Any], wanted: Sequence[Wanted]
) -> tuple[list[Source], list[tuple[Source, Record]]]:
    """The images that are left to explain, and those whose heatmaps of an earlier run are kept, with their records."""
    left, kept, others = [], [], 0
    for source in sources:
        record = read_record(source.heatmap) if source.is_older else None
        if record is not None and record.options == asked and record.has(wanted):
            kept.append((source, record))
        else:
            left.append(source)
            others += record is not None
    note = f"; {others} were made with other options, or for no report, and are explained again" if others else ""
    print(f"{len(kept)} of {len(sources)} have their heatmaps{note}", file=sys.stderr)
    return left, kept


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


def _shows_progress(options: argparse.Namespace, images: int) -> bool:
    return images > 1 and (sys.stderr.isatty() if options.progress is None else bool(options.progress))
