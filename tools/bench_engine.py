"""``make bench-engine``: the engine against Captum, in one process, interleaved.

Three roads compute the same attributions:

engine  what `integrated_gradients` runs: TorchScript with folded batch norm, hoisted stem, channels_last, F(x) given.
(a)     Captum as its public examples write it: the eager torchvision model as it comes, parameters requiring gradients,
        ``attribute(x, target=t, n_steps=n, return_convergence_delta=True)``.
(b)     Captum tuned by hand: parameters frozen, the TorchScript file, channels_last, ``internal_batch_size`` the best
        of a few tried here.

Prints a table of medians and ratios and writes it as JSON, with peak memory, the share of time in convolutions and the
share of the machine's measured matrix-product peak.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "model_repository" / "integrated_gradients" / "1"))

import captum.attr
import torch
from attribution_engine import Job
from engine_loading import PRECISIONS, build_engine
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm

from tools.export import ensure_exported, load_source
from tools.paths import MODEL_REPOSITORY, OUTPUTS
from tools.shapes.dataset import draw_view
from tools.shapes.train import normalise

MODEL_FILE = MODEL_REPOSITORY / "classifier" / "1" / "model.pt"
SHAPE = (3, 224, 224)
# Forward 1.82 G multiply-adds for a ResNet-18 at 224 pixels; the backward pass to the input takes as many again.
GFLOP_PER_ROW = 2 * 2 * 1.82
UNLIKE_STEPS = (10, 20, 30, 50, 50, 80, 100, 200)
MEMORY_CASES = {"50 steps": (1, 50), "1000 steps": (1, 1000), "batch 32, 50 steps": (32, 50)}


class Contestants:
    """The three roads over the same images."""

    def __init__(self, device: torch.device, precision: str, batch: int) -> None:
        self.device = device
        views = [draw_view("test", index).image.copy() for index in range(batch)]
        pixels = torch.stack([torch.from_numpy(view).permute(2, 0, 1) for view in views])
        self.images = normalise(pixels).contiguous().to(device)
        self.engine = build_engine(MODEL_FILE, device, SHAPE, precision=precision)
        self.eager = load_source("shapes").module.to(device)
        self.tuned_module = self.engine.network
        with torch.no_grad():
            self.logits = self.engine.network(self.images)
        self.targets = self.logits.argmax(dim=1)
        self.tuned_batch = 8

    def run_engine(self, batch: int, n_steps: int | tuple[int, ...]) -> None:
        steps = n_steps if isinstance(n_steps, tuple) else (n_steps,) * batch
        baseline = torch.zeros(SHAPE, device=self.device)
        jobs = [
            Job(image, baseline, target, n, image_logits=logits, baseline_key="zero")
            for image, target, n, logits in zip(self.images[:batch], self.targets.tolist(), steps, self.logits)
        ]
        results = self.engine.explain(jobs)
        torch.stack([result.attributions for result in results]).cpu()

    def run_captum(self, batch: int, n_steps: int) -> None:
        """(a)"""
        attributions, _ = captum.attr.IntegratedGradients(self.eager).attribute(
            self.images[:batch], target=self.targets[:batch], n_steps=n_steps, return_convergence_delta=True
        )
        attributions.detach().cpu()

    def run_tuned(self, batch: int, n_steps: int) -> None:
        """(b)"""
        images = self.images[:batch].contiguous(memory_format=torch.channels_last)
        attributions, _ = captum.attr.IntegratedGradients(self.tuned_module).attribute(
            images,
            target=self.targets[:batch],
            n_steps=n_steps,
            return_convergence_delta=True,
            internal_batch_size=max(self.tuned_batch, batch),
        )
        attributions.detach().cpu()

    def tune(self) -> None:
        """Choose (b)'s internal batch size."""
        sizes = (5, 8, 10, 16, 25, 50)
        seconds = {size: [] for size in sizes}
        for _ in range(3):
            for size in sizes:
                self.tuned_batch = size
                seconds[size].append(timed(lambda: self.run_tuned(1, 50)))
        self.tuned_batch = min(sizes, key=lambda size: statistics.median(seconds[size]))


def timed(run: Callable[[], Any]) -> float:
    """Seconds; what runs ends by copying its result to the host, which waits for a GPU."""
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def interleaved(runs: dict[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each run in turn, after one warm-up of each."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(-1, repeats):
        for name, run in runs.items():
            taken = timed(run)
            if repeat >= 0:
                seconds[name].append(taken)
    return seconds


def compare(contestants: Contestants, batch: int, n_steps: int, repeats: int) -> dict[str, Any]:
    """One row of the table."""
    seconds = interleaved(
        {
            "engine": lambda: contestants.run_engine(batch, n_steps),
            "captum": lambda: contestants.run_captum(batch, n_steps),
            "tuned": lambda: contestants.run_tuned(batch, n_steps),
        },
        repeats,
    )
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "batch": batch,
        "n_steps": n_steps,
        "repeats": repeats,
        "seconds": seconds,
        "median_seconds": medians,
        "times_captum": medians["captum"] / medians["engine"],
        "times_tuned": medians["tuned"] / medians["engine"],
    }


def compare_unlike(contestants: Contestants, repeats: int) -> dict[str, Any]:
    """A batch of unlike step counts against equal requests of as many rows in all."""
    rows = sum(UNLIKE_STEPS)
    equal = tuple(rows // 8 + (index < rows % 8) for index in range(8))
    seconds = interleaved(
        {
            "unlike": lambda: contestants.run_engine(8, UNLIKE_STEPS),
            "equal": lambda: contestants.run_engine(8, equal),
        },
        repeats,
    )
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "steps": UNLIKE_STEPS,
        "seconds": seconds,
        "median_seconds": medians,
        "ratio": medians["unlike"] / medians["equal"],
    }


def matrix_product_peak(device: torch.device) -> float:
    """GFLOP/s of a float32 product (TF32 where the engine allows it)."""
    side = 2048 if device.type == "cpu" else 8192
    one, other = torch.randn(2, side, side, device=device)
    seconds = [timed(lambda: (one @ other)[0, 0].item()) for _ in range(8)]
    return 2 * side**3 / min(seconds[1:]) / 1e9


def profile_engine(contestants: Contestants) -> dict[str, float]:
    """Where 50 steps go."""
    activities = [ProfilerActivity.CPU]
    on_gpu = contestants.device.type == "cuda"
    if on_gpu:
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as profiler:
        contestants.run_engine(1, 50)
    attribute = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    times = {event.key: getattr(event, attribute) for event in profiler.key_averages()}
    names = ("conv", "gemm", "xmma") if on_gpu else ("convolution",)
    convolutions = sum(value for key, value in times.items() if any(name in key for name in names))
    seconds = statistics.median(timed(lambda: contestants.run_engine(1, 50)) for _ in range(3))
    peak = matrix_product_peak(contestants.device)
    achieved = 50 * GFLOP_PER_ROW / seconds
    return {
        "share_of_time_in_convolutions": convolutions / sum(times.values()),
        "achieved_gflop_per_second": achieved,
        "matrix_product_peak_gflop_per_second": peak,
        "share_of_peak": achieved / peak,
    }


def measure_memory(device: torch.device, precision: str) -> dict[str, float]:
    """Peak memory of each case in MB over what was there before, each in a process of its own."""
    peaks = {}
    for road, names in (("engine", list(MEMORY_CASES)), ("captum", ["50 steps"])):
        for name in names:
            batch, n_steps = MEMORY_CASES[name]
            options = ["--device", str(device), "--precision", precision, "--memory-of", road, str(batch), str(n_steps)]
            command = [sys.executable, "-m", "tools.bench_engine", *options]
            found = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            peaks[f"{road}, {name}"] = float(found.split()[-1])
    return peaks


def print_peak(device: torch.device, precision: str, road: str, batch: int, n_steps: int) -> None:
    """The measuring process of ``measure_memory``: prints MB."""
    contestants = Contestants(device, precision, batch)
    contestants.run_engine(1, 8)
    run = contestants.run_engine if road == "engine" else contestants.run_captum
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run(batch, n_steps)
        print((torch.cuda.max_memory_allocated() - before) / 1e6)
        return
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from what is resident now
    before = _peak_resident_mb()
    run(batch, n_steps)
    print(_peak_resident_mb() - before)


def _peak_resident_mb() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1e3 for line in lines if line.startswith("VmHWM"))


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Hardware and versions."""
    if device.type == "cuda":
        hardware = torch.cuda.get_device_name(device)
    else:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
        hardware = f"{os.cpu_count()} cores of {name}, {torch.get_num_threads()} threads"
    return {
        "date": datetime.now(timezone.utc).date().isoformat(),
        "hardware": hardware,
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "torchvision", "captum")},
    }


def table(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    lines = [
        "| batch | steps | engine | Captum (a) | Captum tuned (b) | times (a) | times (b) | runs |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in report["rows"]:
        seconds = " | ".join(f"{1e3 * row['median_seconds'][name]:.0f} ms" for name in ("engine", "captum", "tuned"))
        ratios = f"{row['times_captum']:.2f} | {row['times_tuned']:.2f}"
        lines.append(f"| {row['batch']} | {row['n_steps']} | {seconds} | {ratios} | {row['repeats']} |")
    lines += ["", f"Left out, over {report['most_rows']} rows: {', '.join(report['left_out']) or 'nothing'}."]
    lines += ["", f"Unlike against equal requests of as many rows: {report['unlike']['ratio']:.3f} times the time."]
    lines += ["", "| peak memory | MB |", "|---|---|"]
    lines += [f"| {name} | {megabytes:.0f} |" for name, megabytes in report["memory_mb"].items()]
    found = report["profile"]
    lines += [
        "",
        f"{found['share_of_time_in_convolutions']:.0%} of the engine's time is in convolutions; it achieves "
        f"{found['achieved_gflop_per_second']:.0f} GFLOP/s, {found['share_of_peak']:.0%} of the "
        f"{found['matrix_product_peak_gflop_per_second']:.0f} GFLOP/s of a large matrix product here.",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.bench_engine", description=__doc__.splitlines()[0])
    default_device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", type=torch.device, default=torch.device(default_device))
    parser.add_argument("--precision", choices=PRECISIONS, default="tf32", help="on a GPU")
    parser.add_argument("--steps", type=int, nargs="+", default=[20, 50, 100, 300])
    parser.add_argument("--batches", type=int, nargs="+", help="default: 1 4 8; on a GPU 1 to 64")
    parser.add_argument("--repeats", type=int, default=5, help="counted runs of each cell (default: 5)")
    parser.add_argument("--most-rows", type=int, help="leave out larger cells, which (a) holds in memory at once")
    parser.add_argument("--out", type=Path, default=OUTPUTS / "bench" / "engine.json")
    parser.add_argument("--memory-of", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    device = arguments.device
    ensure_exported()
    if arguments.memory_of:
        road, batch, n_steps = arguments.memory_of
        print_peak(device, arguments.precision, road, int(batch), int(n_steps))
        return
    on_gpu = device.type == "cuda"
    batches = arguments.batches or ([1, 2, 4, 8, 16, 32, 64] if on_gpu else [1, 4, 8])
    most_rows = arguments.most_rows or (3200 if on_gpu else 400)
    cells = [(batch, n) for batch in batches for n in arguments.steps]
    contestants = Contestants(device, arguments.precision, max(8, *batches))
    contestants.tune()
    report = {
        "command": " ".join(["python -m tools.bench_engine", *sys.argv[1:]]),
        "machine": describe_machine(device),
        "precision": arguments.precision if on_gpu else "ieee",
        "max_rows": contestants.engine.max_rows,
        "tuned_internal_batch_size": contestants.tuned_batch,
        "most_rows": most_rows,
        "left_out": [f"batch {batch} x {n}" for batch, n in cells if batch * n > most_rows],
        "rows": [
            compare(contestants, batch, n, arguments.repeats)
            for batch, n in tqdm([(batch, n) for batch, n in cells if batch * n <= most_rows], desc="cells")
        ],
        "unlike": compare_unlike(contestants, arguments.repeats),
        "profile": profile_engine(contestants),
        "memory_mb": measure_memory(device, arguments.precision),
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(report, indent=1) + "\n")
    print(", ".join(f"{name} {value}" for name, value in report["machine"].items()))
    print(table(report))
    print(f"wrote {arguments.out}")


if __name__ == "__main__":
    main()
