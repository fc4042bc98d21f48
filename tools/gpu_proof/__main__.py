"""``python -m tools.gpu_proof``: what one GPU can show, measured in one run of nine minutes, the most telling first.

Each part is a process of its own with a time limit. It writes what it has measured at once, so a part that fails or is
stopped loses nothing of that, and the next one follows. ``--quick`` measures as little as shows that each part runs; it
is for a rehearsal, also on a CPU.

The networks are random where no weights are at hand, so no part needs a connection.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

from tools.paths import OUTPUTS, ROOT

# Parts in the order of a run, and their limits in seconds.
PARTS = {"parity": 70, "engine": 130, "served": 150, "faults": 110, "trace": 25, "compiled": 60}
# Time for a part to stop its servers; then they are killed.
STOP_SECONDS = 10
# Of each part's results, what is printed.
PRINTED = 1500
# Names the processes of a part, wherever they have gone.
MARK = "GPU_PROOF_PART"


def run(part: str, seconds: float, folder: Path, quick: bool) -> str:
    """Run a part; how it ended, in words. None of its processes is left."""
    file, mark = folder / f"{part}.json", uuid.uuid4().hex
    file.unlink(missing_ok=True)
    command = [sys.executable, "-m", "tools.gpu_proof.part", part, "--out", str(file), *(["--quick"] * quick)]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", MARK: mark}
    started = time.monotonic()
    process = subprocess.Popen(command, cwd=ROOT, env=environment)
    try:
        how = f"code {process.wait(seconds)}"
    except subprocess.TimeoutExpired:
        how = f"stopped after {seconds:g} s"
        process.terminate()  # it stops its servers
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOP_SECONDS)
    if left := kill_marked(mark):
        how += f", {left} processes killed"
    process.wait()
    return f"{how}, {time.monotonic() - started:.0f} s"


def kill_marked(mark: str) -> int:
    """Kill all processes with this mark in their environment; how many."""
    killed = 0
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended, or is another user's
            if f"{MARK}={mark}".encode() in (folder / "environ").read_bytes().split(b"\0"):
                os.kill(int(folder.name), signal.SIGKILL)
                killed += 1
    return killed


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
        print(f"\n== {part}\n{file.read_text()[-PRINTED:] if file.is_file() else 'nothing'}")


if __name__ == "__main__":
    main()
