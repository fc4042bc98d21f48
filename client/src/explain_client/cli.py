"""The command ``explain``: explain images through a server, print a table, write heatmaps and a report."""

from __future__ import annotations

import argparse
import asyncio
import io
import json
import os
import sys
from collections.abc import Sequence
from importlib.metadata import version

from explain_client import web
from explain_client.batch import explain_images
from explain_client.client import ExplainClient
from explain_client.doctor import diagnose
from explain_client.errors import ExplainError, UnavailableError
from explain_client.options import (
    VERSION,
    UsageError,
    add_server_options,
    connection_options,
    parse,
    parse_explain,
    refusing_usage,
)
from explain_client.output import ALL_EXPLAINED, INTERRUPTED, NO_SERVER, RED, SOME_FAILED, WRONG_USAGE, paint


def main(arguments: list[str] | None = None) -> None:
    """Entry point."""
    words = sys.argv[1:] if arguments is None else arguments
    for stream in (sys.stdout, sys.stderr):  # a label that the terminal cannot show is no reason to fail
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        try:
            status = _run(words)
        finally:
            sys.stdout.flush()
    except KeyboardInterrupt:
        status = INTERRUPTED
    except BrokenPipeError:  # the reader of the output has closed it
        for stream in (sys.stdout, sys.stderr):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        status = SOME_FAILED
    sys.exit(status)


def _run(words: Sequence[str]) -> int:
    commands = {"doctor": _doctor, "labels": _labels, "web": web.main}
    name = words[0] if words and words[0] in commands and not os.path.exists(words[0]) else ""
    try:
        if name:
            return commands[name](words[1:])
        options = parse_explain(words)
        return asyncio.run(explain_images(options))
    except UsageError as error:
        print(f"explain: {error}", file=sys.stderr)
        return WRONG_USAGE
    except UnavailableError as error:
        print(f"the server cannot be reached: {error}; try explain doctor", file=sys.stderr)
        return NO_SERVER
    except ExplainError as error:
        print(f"explain: {error}", file=sys.stderr)
        return SOME_FAILED


def _doctor(words: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="explain doctor", description="Find out what is wrong with a server.")
    add_server_options(parser)
    options = parse(parser, words)
    print(f"{VERSION}, tritonclient {version('tritonclient')}")
    is_good = True
    for finding in diagnose(**connection_options(options)):
        verdict = "ok   " if finding.is_good else paint("FAULT", RED, sys.stdout)
        print(f"{verdict} {finding.name}: {finding.message}", flush=True)
        is_good = is_good and finding.is_good
    return ALL_EXPLAINED if is_good else SOME_FAILED


def _labels(words: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="explain labels", description="List the server's classes, for --target.")
    parser.add_argument("--json", action="store_true", help="one JSON array")
    add_server_options(parser)
    options = parse(parser, words)
    with refusing_usage():
        client = ExplainClient(**connection_options(options))
    with client:
        labels = client.labels()
    print(json.dumps(labels) if options.json else "\n".join(f"{index:5} {label}" for index, label in enumerate(labels)))
    return ALL_EXPLAINED
