"""perf_analyzer against a served model: ``python -m tools.bench.perf explain --concurrency-range 1:4``.

The tritonclient wheel contains the binary, or TRITON_FOLDER. Two libraries that it needs have other names beside the
server. This links them, writes JPEG images as input data, and passes all other options on. It measures a running server
(``-u HOST:PORT``), or starts one. `explain_stream` is measured with streaming; its report is read from the profile
export, because perf_analyzer prints only the last response of a stream.
"""

from __future__ import annotations

import base64
import json
import os
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from tools.bench.load import jpeg_images
from tools.export import repository_with
from tools.paths import OUTPUTS
from tools.server import EmbeddedServer, Ports
from tools.triton.installation import find_perf_analyzer

MODELS = ("classify", "explain", "explain_stream")
# Names that perf_analyzer needs -> beginnings of the names in the wheel.
LIBRARIES = {"libb64.so.0d": "libb64-", "libcudart.so.12": "libcudart-"}
USAGE = f"usage: python -m tools.bench.perf {{{','.join(MODELS)}}} [options of perf_analyzer ...]"


def run(
    model: str, url: str, options: Sequence[str], folder: Path, quiet: bool = False
) -> subprocess.CompletedProcess[str]:
    """Run perf_analyzer over gRPC; its files go to ``folder``.

    Args:
        model: one of ``MODELS``.
        url: host and gRPC port.
        options: options of perf_analyzer.
        quiet: capture its output instead of showing it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    data = folder / "input.json"
    data.write_text(
        json.dumps({"data": [{"IMAGE": {"b64": _as_input(image), "shape": [1]}} for image in jpeg_images()]})
    )
    command = [str(find_perf_analyzer(os.environ)[0]), "-m", model, "-u", url, "-i", "grpc"]
    command += ["--input-data", str(data), "-f", str(folder / f"{model}.csv")]
    profile = folder / f"{model}.json"
    profile.unlink(missing_ok=True)  # perf_analyzer does not overwrite it
    command += ["--profile-export-file", str(profile)]
    if model == "explain_stream":
        command += ["--streaming", "--async"]
    with libraries() as environment:
        return subprocess.run([*command, *options], env=environment, text=True, capture_output=quiet, check=False)


@contextmanager
def libraries() -> Iterator[dict[str, str]]:
    """The environment in which perf_analyzer finds its libraries."""
    _, folder = find_perf_analyzer(os.environ)
    with tempfile.TemporaryDirectory(prefix="perf-libraries-") as links:
        for name, beginning in LIBRARIES.items():
            (Path(links) / name).symlink_to(next(folder.glob(f"{beginning}*")))
        path = os.pathsep.join([links, os.environ.get("LD_LIBRARY_PATH", "")]).rstrip(os.pathsep)
        yield {**os.environ, "LD_LIBRARY_PATH": path}


def _as_input(image: bytes) -> str:
    """A BYTES element as perf_analyzer takes it: base64 of its length and its content."""
    return base64.b64encode(struct.pack("<I", len(image)) + image).decode()


class ProfileError(Exception):
    """A profile export cannot be read; the message says why."""


def read_profile(file: Path) -> list[dict[str, Any]]:
    """For each load of a profile export: requests, and milliseconds to the first and the last response.

    ``first_ms`` and ``last_ms`` are p50, p95 and p99. They differ only for streams.

    Raises:
        ProfileError: the export is cut off.
    """
    loads = []
    try:
        # The file repeats the images, as bytes that are not text.
        content = json.loads(file.read_text(errors="replace"), strict=False)
    except json.JSONDecodeError:
        raise ProfileError(
            f"{file} is cut off: perf_analyzer's export ends at the first NaN. ERROR_ESTIMATE is NaN in the last level "
            "of fewer than 8 steps and of method=calibrated; request at least 8 steps, or a tolerance"
        ) from None
    for experiment in content["experiments"]:
        requests = experiment["requests"]
        waits = np.array(
            [
                [request["response_timestamps"][at] - request["timestamp"] for at in (0, -1)]
                for request in requests
                if request["response_timestamps"]
            ]
        )
        percentiles = np.percentile(waits / 1e6, (50, 95, 99), axis=0).round(1)
        loads.append(
            {
                "load": experiment["experiment"],
                "requests": len(requests),
                "first_ms": percentiles[:, 0].tolist(),
                "last_ms": percentiles[:, 1].tolist(),
            }
        )
    return loads


def main() -> None:
    words = sys.argv[1:]
    if not words or words[0] not in MODELS:
        sys.exit(USAGE)
    model, options = words[0], words[1:]
    folder = OUTPUTS / "perf"
    if "-u" in options:
        at = options.index("-u")
        url, options = options[at + 1], options[:at] + options[at + 2 :]
        code = run(model, url, options, folder).returncode
    else:
        with EmbeddedServer(repository_with("shapes"), Ports.free(), log_file=folder / "triton.log") as server:
            code = run(model, server.grpc_url, options, folder).returncode
    # For other models it prints all results, and their export contains all outputs and is cut off at the first NaN.
    if code == 0 and model == "explain_stream":
        try:
            for entry in read_profile(folder / f"{model}.json"):
                print(json.dumps(entry))
        except ProfileError as error:
            print(f"{error}; the times to the first response are above", file=sys.stderr)
            code = 1
    print(f"files in {folder}", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
