"""The command ``explain``: explain images through a server, print a table, write heatmaps and a report."""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
from importlib.metadata import version

from explain_client import __version__
from explain_client.batch import explain_batch
from explain_client.connection import DEFAULT_URL
from explain_client.doctor import diagnose
from explain_client.options import explain_parser
from explain_client.output import ALL_EXPLAINED, INTERRUPTED, SOME_FAILED
from explain_client.streaming import explain_streamed


def main(arguments: list[str] | None = None) -> None:
    """Entry point."""
    words = sys.argv[1:] if arguments is None else arguments
    try:
        if words[:1] == ["doctor"] and not os.path.exists("doctor"):
            sys.exit(_doctor(words[1:]))
        parser = explain_parser()
        options = parser.parse_args(words)
        if options.stream and options.report:
            parser.error("--report takes no --stream")
        sys.exit(explain_streamed(options) if options.stream else asyncio.run(explain_batch(options)))
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


if __name__ == "__main__":
    main()
