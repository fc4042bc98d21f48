"""One part of the proof, in this process: ``python -m tools.gpu_proof.part NAME --out FILE``."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from tools.evaluation.measuring import describe_machine, rounded
from tools.gpu_proof.__main__ import PARTS
from tools.triton.supervisor import stop_on_signals


class Record:
    """Results of a part, on disk as soon as there are any.

    Args:
        file: JSON.
        quick: measure as little as shows that it works.
    """

    def __init__(self, file: Path, quick: bool) -> None:
        self.file, self.quick = file, quick
        self.failures = 0
        self._started = time.monotonic()
        self._results: dict[str, Any] = {"machine": describe_machine(), "quick": quick}

    def __setitem__(self, name: str, value: Any) -> None:
        self._results.pop("seconds", None)
        self._results |= {name: value, "seconds": round(time.monotonic() - self._started, 1)}
        written = self.file.with_suffix(".part")
        written.write_text(json.dumps(rounded(self._results), indent=1) + "\n")
        os.replace(written, self.file)
        print(f"{self._results['seconds']:6.1f} s  {name}", flush=True)

    def attempt(self, name: str, measure: Callable[[], object]) -> None:
        """Measure something; if it fails, record why, and go on."""
        try:
            measure()
        except Exception:
            self[f"{name} failed"] = traceback.format_exc().splitlines()[-12:]
            self.failures += 1


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.gpu_proof.part", description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=list(PARTS))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    stop_on_signals()
    record = Record(arguments.out, arguments.quick)
    for name, measure in importlib.import_module(f"tools.gpu_proof.{arguments.part}").MEASURES.items():
        try:
            record.attempt(name, partial(measure, record))
        except KeyboardInterrupt:
            record["stopped in"] = name
            sys.exit(1)
    sys.exit(record.failures)


if __name__ == "__main__":
    main()
