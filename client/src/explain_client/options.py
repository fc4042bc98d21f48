"""The options of the command ``explain``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from explain_client import __version__
from explain_client.connection import DEFAULT_URL
from explain_client.runs import STDIN

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
'explain doctor [--url HOST:PORT]' finds out what is wrong with a server."""


def explain_parser() -> argparse.ArgumentParser:
    """The parser of the command's options."""
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


def contract_parameters(options: argparse.Namespace) -> Any:
    """The request parameters that were given."""
    return {name: value for name in PARAMETERS if (value := getattr(options, name)) is not None}


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError
    return number
