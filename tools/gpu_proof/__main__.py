"""``python -m tools.gpu_proof``: every claim about GPUs, measured in one run of eight minutes, the most telling first.

Each part is a process of its own with a time limit. It writes what it has measured at once, so a part that fails or is
stopped loses nothing of that, and the next one follows. ``--quick`` measures as little as shows that each part runs; it
is for a rehearsal, also on a CPU.

The networks are random where no weights are at hand, so no part needs a connection.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from tools.gpu_proof.part import PARTS
from tools.paths import OUTPUTS, ROOT

# Time for a part to stop its servers.
STOP_SECONDS = 15


def run(part: str, seconds: float, folder: Path, quick: bool) -> str:
    """Run a part; how it ended, in words."""
    command = [sys.executable, "-m", "tools.gpu_proof.part", part, "--out", str(folder / f"{part}.json")]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen([*command, *(["--quick"] * quick)], cwd=ROOT, env=environment, start_new_session=True)
    started = time.monotonic()
    how = ""
    try:
        how = f"code {process.wait(seconds)}"
    except subprocess.TimeoutExpired:
        how = f"stopped after {seconds:g} s"
        process.terminate()  # it stops its servers
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            how += ", killed"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return f"{how}, {time.monotonic() - started:.0f} s"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.gpu_proof", description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--out", type=Path, default=OUTPUTS / "gpu_proof", help="folder for the results")
    parser.add_argument("--quick", action="store_true", help="as little as shows that each part runs")
    parser.add_argument("--stretch", type=float, default=1.0, help="times the limits of time (for a CPU)")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    for part in arguments.only:
        how = run(part, arguments.stretch * PARTS[part], arguments.out, arguments.quick)
        print(f"== {part}: {how}", flush=True)
    for part in arguments.only:
        file = arguments.out / f"{part}.json"
        print(f"\n== {part}")
        print(json.dumps(json.loads(file.read_text()), indent=1)[:4000] if file.is_file() else "nothing")


if __name__ == "__main__":
    main()
