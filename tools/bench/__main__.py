"""``make bench``: one report of all benchmarks, in under 40 minutes on 2 CPU cores.

``--quick`` takes under 5 minutes, with fewer and shorter runs of most parts; its figures are rough. `make
bench-engine`, `bench-server`, `bench-stream` and `bench-deadlines` measure one part in more detail.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import Any

import torch

from tools.bench import analyzer, engine, report, sampling, scaling, server, stream
from tools.bench.load import jpeg_images
from tools.evaluation.measuring import default_device, describe_machine, rounded
from tools.export import repository_with
from tools.paths import OUTPUTS
from tools.server import EmbeddedServer, Ports


def measure_engine(quick: bool, device: torch.device) -> dict[str, Any]:
    """The engine against Captum."""
    contestants = engine.Contestants(device, "tf32", 4)
    repeats = 1 if quick else 3
    if not quick:
        contestants.tune()
    steps = (20, 50) if not quick else (20,)
    measured = {
        "rows": [engine.compare(contestants, 1, count, repeats) for count in steps],
        "most_rows": max(steps),
        "left_out": [],
        "profile": engine.profile_engine(contestants),
    }
    if not quick:
        measured["accurate"] = engine.compare_accurate(contestants, repeats)
    return measured


def measure_photographs(quick: bool, device: torch.device) -> dict[str, Any]:
    """The same for a real network and photographs, at equal steps and at about equal accuracy."""
    contestants = engine.Contestants(device, "tf32", 1 if quick else 4, network="lite0")
    repeats = 1 if quick else 2
    if not quick:
        contestants.tune()
    return {
        "rows": [engine.compare(contestants, 1, 50, repeats)],
        "most_rows": 50,
        "left_out": [],
        "accurate": engine.compare_accurate(contestants, repeats),
    }


def parts(quick: bool, folder: Path, stack: ExitStack) -> dict[str, Callable[[], Any]]:
    """Parts of the report by name, in order. Servers are started when a part first needs them."""
    device, images = default_device(), jpeg_images()
    repository = repository_with("shapes")

    @cache
    def triton() -> EmbeddedServer:
        return stack.enter_context(EmbeddedServer(repository, Ports.free(), log_file=folder / "triton.log"))

    @cache
    def service() -> server.PeerService:
        return stack.enter_context(server.PeerService())

    def both() -> tuple[server.PeerService, EmbeddedServer, list[bytes]]:
        return service(), triton(), images

    many = [32] if device.type == "cuda" else []
    if quick:
        return {
            "photographs": lambda: measure_photographs(quick, device),
            "engine": lambda: measure_engine(quick, device),
            "sampling": lambda: sampling.measure(device, 1, (200,)),
            "shares": lambda: scaling.measure_shares(triton(), images, 10),
            "scaling": lambda: scaling.measure_scaling(triton(), images, 1, quick),
            "analyzer": lambda: analyzer.measure(triton(), folder / "perf", quick),
            "throughput": lambda: server.measure_throughput(*both(), [4], 4),
            "isolation": lambda: server.measure_isolation(*both(), 30, 5, saturating_steps=25, long_steps=50),
        }
    return {
        "photographs": lambda: measure_photographs(quick, device),
        "engine": lambda: measure_engine(quick, device),
        "sampling": lambda: sampling.measure(device, 4),
        "shares": lambda: scaling.measure_shares(triton(), images, 40),
        "scaling": lambda: scaling.measure_scaling(triton(), images, 3, quick),
        "analyzer": lambda: analyzer.measure(triton(), folder / "perf", quick),
        "stream": lambda: {
            "clients": 8,
            "n_steps": 200,
            "seconds": stream.measure(triton(), clients=8, n_steps=200, blocks=1, calls=20),
        },
        "throughput": lambda: server.measure_throughput(*both(), [1, 2, 4, 8, 16, *many], 12),
        "accuracy": lambda: server.measure_accuracy(*both()),
        "isolation": lambda: server.measure_isolation(*both(), 100, 20),
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.bench", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="under 5 minutes, rough figures")
    parser.add_argument("--only", nargs="+", metavar="PART", help="parts of the report, by name")
    parser.add_argument(
        "--out", type=Path, default=OUTPUTS / "bench", help="folder for report.md, report.json and plots"
    )
    parser.add_argument("--from", dest="known", type=Path, help="a report.json to copy the other parts from")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    report_parts = json.loads(arguments.known.read_text()) if arguments.known else {}
    command = " ".join(["python -m tools.bench", *sys.argv[1:]])
    report_parts |= {"command": command, "machine": describe_machine()}
    report_parts.setdefault("measured", {})  # each part has its own command: some may come from an earlier report
    with ExitStack() as stack:
        measures = parts(arguments.quick, OUTPUTS / "bench", stack)
        if unknown := set(arguments.only or ()) - set(measures):
            parser.error(f"no such part: {', '.join(sorted(unknown))}; there are {', '.join(measures)}")
        chosen = [name for name in measures if name in (arguments.only or measures)]
        for number, name in enumerate(chosen, 1):
            print(f"[{number}/{len(chosen)}, {(time.monotonic() - started) / 60:.0f} min] {name}", flush=True)
            part_started = time.monotonic()
            report_parts[name] = measures[name]()
            minutes = (time.monotonic() - part_started) / 60
            origin = {"command": command, "minutes": minutes, "machine": report_parts["machine"]}
            report_parts["measured"][name] = origin
            report_parts["minutes"] = (time.monotonic() - started) / 60
            report_parts = rounded(report_parts)
            # Written after each part, so that --from can continue after a failure.
            (arguments.out / "report.json").write_text(json.dumps(report_parts) + "\n")
    text = report.markdown(report_parts, report.draw(report_parts, arguments.out))
    (arguments.out / "report.md").write_text(text)
    print(text)
    print(f"wrote report.md, report.json and plots in {arguments.out}")


if __name__ == "__main__":
    main()
