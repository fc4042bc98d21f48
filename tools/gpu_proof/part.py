"""One part of the proof, in this process: ``python -m tools.gpu_proof.part NAME --out FILE``."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from tools.evaluation.measuring import describe_machine, rounded
from tools.triton.supervisor import stop_on_signals

# Parts in the order of a run, and their limits in seconds.
PARTS = {"parity": 75, "engine": 100, "served": 130, "faults": 75, "compiled": 60, "trace": 40}


class Record:
    """Results of a part, on disk as soon as there are any.

    Args:
        file: JSON.
        quick: measure as little as shows that it works.
    """

    def __init__(self, file: Path, quick: bool) -> None:
        self.file, self.quick = file, quick
        self._started = time.monotonic()
        self._results: dict[str, Any] = {"machine": describe_machine(), "quick": quick}

    def __setitem__(self, name: str, value: Any) -> None:
        self._results[name] = value
        self._results["seconds"] = round(time.monotonic() - self._started, 1)
        self.file.write_text(json.dumps(rounded(self._results), indent=1) + "\n")
        print(f"{self._results['seconds']:6.1f} s  {name}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.gpu_proof.part", description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=list(PARTS))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    stop_on_signals()
    record = Record(arguments.out, arguments.quick)
    failures = 0
    for name, measure in importlib.import_module(f"tools.gpu_proof.{arguments.part}").MEASURES.items():
        try:
            measure(record)
        except KeyboardInterrupt:
            record["stopped in"] = name
            sys.exit(1)
        except Exception:
            record[f"{name} failed"] = traceback.format_exc().splitlines()[-12:]
            failures += 1
    sys.exit(failures)


if __name__ == "__main__":
    main()
