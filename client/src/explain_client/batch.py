"""``explain``: many images, several in flight, with a progress bar and a report."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import AsyncIterator

from tqdm import tqdm

from explain_client.aio import AsyncExplainClient
from explain_client.errors import ExplainError, UnavailableError
from explain_client.images import DEFAULT_VIEW, View
from explain_client.options import contract_parameters
from explain_client.output import NO_SERVER, WRONG_USAGE, Output, finish
from explain_client.report import Report
from explain_client.runs import Outcome, Source, explain_all, find_sources


async def explain_batch(options: argparse.Namespace) -> int:
    """Explain all images; returns the exit status."""
    sources = sources_of(options)
    async with AsyncExplainClient(options.url, options.timeout) as client:
        with contextlib.ExitStack() as stack:
            try:
                await client.check()
            except UnavailableError as error:
                print(f"{options.url} cannot be reached: {error}; try explain doctor", file=sys.stderr)
                return NO_SERVER
            report = stack.enter_context(Report(options.report, await _view(client))) if options.report else None
            output = Output(options, report)
            bar = stack.enter_context(
                tqdm(total=len(sources), unit="image", disable=not _shows_progress(options, len(sources)))
            )
            async for outcome in _outcomes(client, sources, options):
                output.take(outcome)
                bar.update()
    return finish(options, output)


def sources_of(options: argparse.Namespace) -> list[Source]:
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


def _outcomes(client: AsyncExplainClient, sources: list[Source], options: argparse.Namespace) -> AsyncIterator[Outcome]:
    return explain_all(
        client, sources, options.concurrency, options.target, options.top_k, ["heatmap"], contract_parameters(options)
    )


def _shows_progress(options: argparse.Namespace, images: int) -> bool:
    return images > 1 and (sys.stderr.isatty() if options.progress is None else options.progress)
