"""The options of the command ``explain``."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from explain_client import __version__
from explain_client.connection import DEFAULT_URL, HEADERS_VARIABLE, TLS, URL_VARIABLE, ConnectionOptions, parse_header
from explain_client.parameters import (
    BASELINES,
    NAMES,
    RANGES,
    Parameters,
    choices,
    contradiction,
    did_you_mean,
    is_integer,
)
from explain_client.runs import STDIN, top_of

# The server's largest batch: a request has an image for each class.
MOST_CLASSES = 32
VERSION = f"explain-client {__version__}"
EPILOG = f"""exit status: 0 all images explained; 1 some failed (they are listed at the end); 2 wrong usage;
3 the server cannot be reached; 130 interrupted.
'explain labels' lists the server's classes. 'explain doctor' finds out what is wrong with a server.
'explain web' explains pictures on a page in the browser.
{HEADERS_VARIABLE} has headers to send, as --header, one a line. NO_COLOR switches colours off."""
HELPS = {
    "n_steps": "gradient evaluations; with --tolerance or --deadline-ms their limit (default: 50)",
    "tolerance": "largest relative error, 0.001 to 0.5: takes as few steps as reach it",
    "deadline_ms": "the best explanation within this time; may overrun by one pass",
    "method": "quadrature rule, by Captum's name, or calibrated (default: gausslegendre)",
    "baseline": f"where the path starts: {', '.join(BASELINES)}; or several, separated by commas, for the mean over "
    "them (default: zero)",
    "output": "what is explained (default: logit)",
    "contrast": "a class to subtract, by number or label",
    "nt_samples": "SmoothGrad: noisy copies of the image (default: 1)",
    "stdevs": "SmoothGrad: standard deviation of the noise (default: 0.1)",
    "seed": "seed of all noise (default: 0)",
    "overlay": "how the heatmap is drawn; regions: the parts of the image with most evidence (default: blend)",
    "polarity": "evidence that is drawn (default: positive)",
    "clip_percentile": "percentile at which the colours saturate (default: 99)",
    "colormap": "a matplotlib colour map (default: auto: inferno, or coolwarm for all)",
}


class UsageError(Exception):
    """The command cannot do what was asked for; nothing was sent."""


@contextmanager
def refusing_usage() -> Iterator[None]:
    """Turn what a client says of its arguments into a ``UsageError``."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise UsageError(str(error)) from None


def parse(parser: argparse.ArgumentParser, words: Sequence[str]) -> argparse.Namespace:
    """Parse a command's words; of an unknown option it says which one may be meant."""
    options, unknown = parser.parse_known_args(words)
    if unknown:
        known = [name for action in parser._actions for name in action.option_strings]
        parser.error(f"unrecognized arguments: {' '.join(unknown)}{did_you_mean(unknown[0].partition('=')[0], known)}")
    return options


def parse_explain(words: Sequence[str]) -> argparse.Namespace:
    """Parse the options of ``explain`` itself."""
    parser = _explain_parser()
    options = parse(parser, words)
    if options.stream and (options.report or options.contact_sheet):
        parser.error("--stream takes neither --report nor --contact-sheet")
    if options.targets and (options.stream or options.skip_existing):
        parser.error(f"--targets does not go with {'--stream' if options.stream else '--skip-existing'}")
    if fault := contradiction(contract_parameters(options)):
        parser.error(fault)
    return options


def add_server_options(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Add the options that say where the server is."""
    server = parser.add_argument_group("server")
    server.add_argument(
        "--url",
        help=f"HOST:PORT of its gRPC service, or grpcs://HOST:PORT for TLS (default: {URL_VARIABLE}, or {DEFAULT_URL})",
    )
    server.add_argument("--cacert", type=Path, metavar="FILE", help="certificates to trust (default: the system's)")
    server.add_argument("--cert", type=Path, metavar="FILE", help="client certificate")
    server.add_argument("--key", type=Path, metavar="FILE", help="key of the client certificate")
    server.add_argument(
        "-H",
        "--header",
        type=_checked(parse_header),
        action="append",
        default=[],
        metavar="NAME: VALUE",
        help="header to send with every request; may be given several times",
    )
    server.add_argument(
        "--token", help=f"bearer token; other users of this machine cannot see it in {HEADERS_VARIABLE} instead"
    )
    return server


def connection_options(options: argparse.Namespace) -> ConnectionOptions:
    """How to reach the server, as the clients' keyword arguments."""
    files = (options.cacert, options.cert, options.key)
    return {
        "url": options.url,
        "headers": dict(options.header),
        "token": options.token,
        "tls": TLS(*files) if any(files) else None,
    }


def contract_parameters(options: argparse.Namespace) -> Parameters:
    """The request parameters that were given."""
    return cast(Parameters, {name: value for name in NAMES if (value := getattr(options, name)) is not None})


def _explain_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="explain",
        usage="explain [OPTION ...] IMAGE [IMAGE ...]\n       explain {labels,doctor,web} [OPTION ...]",
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
    parser.add_argument("--version", action="version", version=VERSION)
    server = add_server_options(parser)
    count = _integer(1, None)
    server.add_argument(
        "--timeout",
        type=_number(0.001, None),
        default=300.0,
        metavar="SECONDS",
        help="seconds for an image (default: 300)",
    )
    server.add_argument("--concurrency", type=count, default=8, help="images in flight (default: %(default)s)")
    output = parser.add_argument_group("output")
    output.add_argument("--out", type=Path, default=Path("explanations"), metavar="DIR", help="default: %(default)s")
    output.add_argument("--report", type=Path, metavar="FILE.html", help="one self-contained page with all results")
    output.add_argument(
        "--contact-sheet", type=Path, metavar="FILE.png", help="one picture of all images beside their explanations"
    )
    output.add_argument("--json", action="store_true", help="one JSON object a line instead of the table")
    output.add_argument("--top-k", type=count, default=5, help="predictions of each image (default: %(default)s)")
    output.add_argument(
        "--skip-existing",
        action="store_true",
        help="keep heatmaps that are newer than their images and were made with the same options",
    )
    output.add_argument(
        "--progress", action=argparse.BooleanOptionalAction, help="a progress bar (default: on a terminal)"
    )
    output.add_argument(
        "--stream",
        action="store_true",
        help="one image after the other: its prediction at once, then a line for each level",
    )
    contract = parser.add_argument_group("what is explained, and how")
    classes = contract.add_mutually_exclusive_group()
    classes.add_argument(
        "--target", type=_class(-1), help="class to explain, by number or label (default: the predicted one)"
    )
    classes.add_argument(
        "--targets",
        type=_classes,
        metavar="CLASSES",
        help="several classes to explain, side by side: top3 for the three likeliest, or numbers or labels, separated "
        "by commas",
    )
    for name in NAMES:
        words = choices(name)
        low, high = RANGES.get(name, (-math.inf, None))
        kind = (
            _class(0)
            if name == "contrast"
            else _baselines
            if name == "baseline"
            else str
            if words
            else (_integer if is_integer(name) else _number)(low, high)
        )
        contract.add_argument(f"--{name.replace('_', '-')}", type=kind, choices=words or None, help=HELPS[name])
    return parser


def _integer(low: float, high: float | None) -> Callable[[str], int]:
    return cast("Callable[[str], int]", _in_range(int, "an integer", low, high))


def _number(low: float, high: float | None) -> Callable[[str], float]:
    return _in_range(float, "a number", low, high)


def _in_range(read: Callable[[str], float], what: str, low: float, high: float | None) -> Callable[[str], float]:
    allowed = f"{what} from {low:g}" + ("" if high is None else f" to {high:g}")

    def parsed(text: str) -> float:
        try:
            value = read(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be {allowed}, not {text!r}") from None
        if not low <= value <= (math.inf if high is None else high) or math.isinf(value):
            raise argparse.ArgumentTypeError(f"must be {allowed}, not {text}")
        return value

    return parsed


def _baselines(text: str) -> str:
    """One baseline or several, separated by commas, as they are sent."""
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in BASELINES:
            raise argparse.ArgumentTypeError(
                f"must be of {', '.join(BASELINES)}, not {name!r}{did_you_mean(name, BASELINES)}"
            )
    if len(set(names)) < len(names):
        raise argparse.ArgumentTypeError(f"must name each baseline once, not {text!r}")
    return ",".join(names)


def _classes(text: str) -> str | list[int | str]:
    """``topN`` as it is, or a list of classes."""
    is_top = re.fullmatch(r"top[1-9]\d*", text)
    classes = [_class(0)(name.strip()) for name in text.split(",")]
    if not all(str(name) for name in classes):
        raise argparse.ArgumentTypeError(f"must be top3 or the like, or classes separated by commas, not {text!r}")
    if (top_of(text) if is_top else len(classes)) > MOST_CLASSES:
        raise argparse.ArgumentTypeError(f"must be at most {MOST_CLASSES} classes, not {text!r:.100}")
    return text if is_top else classes


def _class(low: int) -> Callable[[str], int | str]:
    """A class by number, at least ``low``, or by label."""

    def parsed(text: str) -> int | str:
        try:
            number = int(text)
        except ValueError:
            return text
        if number < low:
            raise argparse.ArgumentTypeError(f"must be a class, not {number}")
        return number

    return parsed


def _checked(read: Callable[[str], Any]) -> Callable[[str], Any]:
    """Keeps the message of a ValueError, which argparse drops."""

    def parsed(text: str) -> Any:
        try:
            return read(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return parsed
