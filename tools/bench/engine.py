"""``make bench-engine``: the engine against Captum, interleaved.

Three implementations compute the same attributions:

engine  as in `integrated_gradients`: TorchScript with folded batch norm, hoisted stem, channels_last, F(x) given; on a
        CPU with Winograd's convolutions.
(a)     Captum as in its public examples: the unchanged eager torchvision model, parameters requiring gradients,
        ``attribute(x, target=t, n_steps=n, return_convergence_delta=True)``. It runs in a process of its own, since
        the allocator settings of `engine_loading` would make it faster than its users have it.
(b)     Captum tuned by hand: parameters frozen, the TorchScript file, channels_last, ``internal_batch_size`` the
        best of a few tried here.

Prints tables of medians and ratios and writes them as JSON: times, peak memory, the share of time in convolutions,
chunk sizes and, on a GPU or with ``--gate-images``, the errors of quadrature and of each precision. ``--compiled`` also
compares a pass with the same pass as a compiled joint graph of forward and backward (torch.compile; on a CPU it needs a
C++ compiler).
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import multiprocessing
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, replace
from functools import cached_property, partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import captum.attr
import torch
from attribution_engine import AttributionEngine
from attribution_job import Job
from classifier_network import Rows
from engine_loading import PRECISIONS, allow_tf32
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from tools.classifiers.loading import load_source
from tools.evaluation.measuring import (
    default_device,
    describe_machine,
    explain,
    held_out_images,
    interleaved,
    load_engine,
    medians,
    model_file,
    relative_distance,
    timed,
    write_report,
)
from tools.paths import OUTPUTS

CHUNK_SIZES = (1, 2, 4, 5, 6, 8, 9, 10, 13, 17, 25)
GPU_CHUNK_SIZES = (8, 16, 32, 50, 64, 128)
# The precision gate on a GPU: images, steps, and points of the midpoint rule that is the reference integral.
PRECISION_IMAGES, PRECISION_STEPS, REFERENCE_STEPS = 8, 50, 2048
UNLIKE_STEPS = (10, 20, 30, 50, 50, 80, 100, 200)
# Steps of Gauss-Legendre, and rules and tolerances of about the same accuracy.
ACCURATE_STEPS = 50
ACCURATE: dict[str, dict[str, Any]] = {
    "calibrated, 20 steps": {"method": "calibrated", "n_steps": 20},
    "calibrated, 16 steps": {"method": "calibrated", "n_steps": 16},
    "tolerance 0.1": {"tolerance": 0.1, "n_steps": 200},
    "tolerance 0.05": {"tolerance": 0.05, "n_steps": 200},
}
ACCURATE_IMAGES = 4
# While other implementations run, the system may take back what Captum's process has freed: its users call it again and
# again. A process by itself took 4.2 s for 50 steps of EfficientNet-Lite0; taking turns, the first call took 7.
PEER = ("captum",)
# Implementation, images, steps, requests one after the other. Cases of the engine have equally many rows, because an
# allocator's heap changes with use.
MEMORY_CASES = {
    "engine, 20 requests of 50 steps": ("engine", 1, 50, 20),
    "engine, 1 request of 1000 steps": ("engine", 1, 1000, 1),
    "engine, batch of 32 at 31 steps": ("engine", 32, 31, 1),
    "Captum (a), 1 request of 50 steps": ("captum", 1, 50, 1),
}
MEMORY_REPEATS = 3


def run_captum(model: torch.nn.Module, images: Tensor, targets: Tensor, n_steps: int) -> None:
    """Captum as its public examples write it."""
    attributions, _ = captum.attr.IntegratedGradients(model).attribute(
        images, target=targets, n_steps=n_steps, return_convergence_delta=True
    )
    attributions.detach().cpu()


class CaptumProcess:
    """``run_captum`` in a process of its own, whose allocator is as it comes. It starts when it is needed."""

    def __init__(self, model: torch.nn.Module, images: Tensor, targets: Tensor) -> None:
        self._inputs = model, images, targets

    @cached_property
    def _connection(self) -> Connection:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        contents = io.BytesIO()  # as a file, so that the processes share no memory
        torch.save(self._inputs, contents)
        context.Process(target=_serve_captum, args=(theirs, contents.getvalue()), daemon=True).start()
        theirs.close()
        return ours

    def run(self, places: list[int], n_steps: int) -> None:
        """Explain the images of these places, and wait for it."""
        self._connection.send((places, n_steps))
        self._connection.recv()


def _serve_captum(connection: Connection, contents: bytes) -> None:
    model, images, targets = torch.load(io.BytesIO(contents), weights_only=False)
    with contextlib.suppress(EOFError):  # the other process has ended
        while True:
            places, n_steps = connection.recv()
            run_captum(model, images[places], targets[places], n_steps)
            connection.send(None)


class Contestants:
    """The three implementations over the same images: drawn shapes, or photographs for other networks."""

    def __init__(
        self, device: torch.device, precision: str, batch: int, max_rows: int = 0, network: str = "shapes"
    ) -> None:
        self.device, self.precision = device, precision
        self.engine = load_engine(device, precision, max_rows, network)
        source = load_source(network)
        self.images = torch.stack(list(held_out_images(network, batch).values())).to(device)
        self.eager = source.module.to(device)
        self.tuned_module = self.engine.network
        with torch.no_grad():
            self.logits = self.engine.network(self.images)
        self.targets = self.logits.argmax(dim=1)
        self.tuned_batch = 8
        self.captum = CaptumProcess(self.eager, self.images, self.targets)
        self.places = list(range(batch))  # of the images, in that process

    def of_image(self, index: int) -> Contestants:
        """The same implementations over one of the images."""
        single = copy.copy(self)
        single.places = self.places[index : index + 1]
        single.images, single.logits, single.targets = (
            values[index : index + 1] for values in (self.images, self.logits, self.targets)
        )
        return single

    def jobs(self, steps: Sequence[int]) -> list[Job]:
        """One job for each image, with ``steps`` in order."""
        baseline = torch.zeros_like(self.images[0])
        return [
            Job(image, baseline, target, n, image_logits=logits, baseline_key="zero")
            for image, target, n, logits in zip(self.images, self.targets.tolist(), steps, self.logits)
        ]

    def run_engine(self, batch: int, n_steps: int | tuple[int, ...]) -> None:
        steps = n_steps if isinstance(n_steps, tuple) else (n_steps,) * batch
        results = explain(self.engine, self.jobs(steps))
        torch.stack([result.attributions for result in results]).cpu()

    def run_options(self, **options: Any) -> None:
        """Explain the first image, with options of a job."""
        (explanation,) = explain(self.engine, [replace(self.jobs((1,))[0], **options)])
        explanation.attributions.cpu()

    def run_captum(self, batch: int, n_steps: int) -> None:
        """Implementation (a)."""
        self.captum.run(self.places[:batch], n_steps)

    def run_tuned(self, batch: int, n_steps: int) -> None:
        """Implementation (b)."""
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
        seconds: dict[int, list[float]] = {size: [] for size in sizes}
        for _ in range(3):
            for size in sizes:
                self.tuned_batch = size
                seconds[size].append(timed(lambda: self.run_tuned(1, 50)))
        self.tuned_batch = min(sizes, key=lambda size: statistics.median(seconds[size]))


def compare(contestants: Contestants, batch: int, n_steps: int, repeats: int) -> dict[str, Any]:
    """One row of the table: median seconds of the three implementations, and ratios."""
    seconds = interleaved(
        {
            "engine": lambda: contestants.run_engine(batch, n_steps),
            "captum": lambda: contestants.run_captum(batch, n_steps),
            "tuned": lambda: contestants.run_tuned(batch, n_steps),
        },
        repeats,
        PEER,
    )
    typical = medians(seconds)
    return {
        "batch": batch,
        "n_steps": n_steps,
        "repeats": repeats,
        "median_seconds": typical,
        "times_captum": typical["captum"] / typical["engine"],
        "times_tuned": typical["tuned"] / typical["engine"],
    }


def compare_accurate(contestants: Contestants, repeats: int) -> dict[str, Any]:
    """Rules about as accurate as Gauss-Legendre's 50 steps (see ``make quality``), against Captum's 50 steps.

    Each call explains one image, and several images take turns, because a tolerance's steps depend on the image.
    """
    seconds: dict[str, list[float]] = {}
    images = min(ACCURATE_IMAGES, len(contestants.images))
    for index in range(images):
        single = contestants.of_image(index)
        runs = {
            "captum": partial(single.run_captum, 1, ACCURATE_STEPS),
            "tuned": partial(single.run_tuned, 1, ACCURATE_STEPS),
            **{name: partial(single.run_options, **options) for name, options in ACCURATE.items()},
        }
        for name, durations in interleaved(runs, repeats, PEER, is_warm=index > 0).items():
            seconds.setdefault(name, []).extend(durations)
    return {"images": images, "median_seconds": medians(seconds)}


def compare_unlike(contestants: Contestants, repeats: int) -> dict[str, Any]:
    """A batch of different step counts against a batch of equal ones with as many rows in all."""
    rows = sum(UNLIKE_STEPS)
    equal = tuple(rows // 8 + (index < rows % 8) for index in range(8))
    seconds = interleaved(
        {
            "unlike": lambda: contestants.run_engine(8, UNLIKE_STEPS),
            "equal": lambda: contestants.run_engine(8, equal),
        },
        repeats,
    )
    typical = medians(seconds)
    return {
        "steps": UNLIKE_STEPS,
        "median_seconds": typical,
        "ratio": typical["unlike"] / typical["equal"],
    }


def profile_engine(contestants: Contestants) -> dict[str, float]:
    """Share of time in convolutions, and GFLOP/s, of 50 steps."""
    activities = [ProfilerActivity.CPU]
    on_gpu = contestants.device.type == "cuda"
    if on_gpu:
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities, acc_events=True) as profiler:
        contestants.run_engine(1, 50)
    times = {event.key: microseconds for event, microseconds in kernel_times(profiler, contestants.device)}
    names = ("conv", "gemm", "xmma", "cutlass", "fprop", "dgrad") if on_gpu else ("convolution",)
    convolutions = sum(value for key, value in times.items() if any(name in key for name in names))
    seconds = statistics.median(timed(lambda: contestants.run_engine(1, 50)) for _ in range(3))
    row = example_rows(contestants, 1)
    with FlopCounterMode(display=False) as counter:
        contestants.engine.network.row_gradients(row)
    return {
        "share_of_time_in_convolutions": convolutions / sum(times.values()),
        "gflop_per_row": counter.get_total_flops() / 1e9,
        "achieved_gflop_per_second": 50 * counter.get_total_flops() / seconds / 1e9,
    }


def kernel_times(profiler: profile, device: torch.device) -> list[tuple[Any, float]]:
    """Entries of a profile and their own microseconds, the longest first: kernels on a GPU, else operators."""
    if device.type == "cuda":  # an operator's entry has the time of the kernels that it launched once more
        found = [
            (event, event.self_device_time_total)
            for event in profiler.key_averages()
            if event.device_type.name == "CUDA" and not event.is_user_annotation
        ]
    else:
        found = [(event, event.self_cpu_time_total) for event in profiler.key_averages()]
    return sorted(found, key=lambda entry: -entry[1])


def example_rows(contestants: Contestants, count: int) -> Rows:
    features = contestants.engine.network.stem(contestants.images[:1])
    rows = Rows.like(features, torch.float32, count)
    rows.features.copy_(features.expand_as(rows.features))
    rows.signs[:, 0] = 1
    return rows


def compare_chunk_sizes(contestants: Contestants, repeats: int) -> dict[str, float]:
    """Median seconds of 100 steps at several ``max_rows``, interleaved."""
    sizes = CHUNK_SIZES if contestants.device.type == "cpu" else GPU_CHUNK_SIZES
    sized = {size: Contestants(contestants.device, contestants.precision, 1, size) for size in sizes}
    seconds = interleaved({str(size): partial(sized[size].run_engine, 1, 100) for size in sizes}, repeats)
    return medians(seconds)


def compare_compiled(contestants: Contestants, repeats: int) -> dict[str, float]:
    """Median seconds of one full chunk: without buffers, as the engine runs it, and as one compiled joint graph."""
    engine = contestants.engine
    count = engine.max_rows
    rows = example_rows(contestants, count)
    tensors = tuple(getattr(rows, each.name) for each in fields(rows))
    joint = torch.compile(make_fx(lambda *inputs: engine.network.row_gradients(Rows(*inputs)))(*tensors))
    buffers = engine.passes.buffers(rows.features[:1], torch.float32)
    buffers.features.copy_(rows.features)
    runs = {
        "eager": lambda: engine.network.row_gradients(rows)[0, 0].sum().item(),
        "engine": lambda: engine.passes.gradients(buffers, count)[0, 0].sum().item(),
        "compiled": lambda: joint(*tensors)[0, 0].sum().item(),
    }
    with torch.no_grad():
        seconds = interleaved(runs, 4 * repeats)
    return medians(seconds)


def compare_precisions(
    device: torch.device, n_images: int, n_steps: int = PRECISION_STEPS, reference: int = REFERENCE_STEPS
) -> dict[str, float]:
    """The precision gate: medians of relative L2 distances over a few images.

    ``quadrature`` is the distance of float64 at the engine's nodes to the midpoint rule that is the reference integral.
    The value of a precision is its distance to float64 at the same nodes.
    """
    precisions = PRECISIONS if device.type == "cuda" else ("tf32", "ieee")
    contestants = {precision: Contestants(device, precision, n_images) for precision in precisions}
    exact = torch.jit.load(str(model_file()), map_location=device).eval().double()
    exact = AttributionEngine(exact, max_rows=min(32, contestants["ieee"].engine.max_rows))
    distances: dict[str, list[float]] = {name: [] for name in ("quadrature", *precisions)}
    for index, target in enumerate(contestants["ieee"].targets.tolist()):
        image = contestants["ieee"].images[index]
        job = Job(image, torch.zeros_like(image), target, n_steps)
        wide = replace(job, image=job.image.double(), baseline=job.baseline.double())
        integral = replace(wide, n_steps=reference, method="riemann_middle")
        at_nodes, limit = (explain(exact, [job64])[0].attributions for job64 in (wide, integral))
        distances["quadrature"].append(relative_distance(at_nodes, limit))
        for precision in precisions:
            allow_tf32(precision)  # graphs may be captured now, and must be under this setting
            (explanation,) = explain(contestants[precision].engine, [job])
            distances[precision].append(relative_distance(explanation.attributions.double(), at_nodes))
    return medians(distances)


def measure_memory(device: torch.device, precision: str) -> dict[str, float]:
    """Median peak memory of each case in MB above the loaded engine's, each measured in its own process."""
    peaks: dict[str, list[float]] = {name: [] for name in MEMORY_CASES}
    for _ in range(MEMORY_REPEATS):
        for name, case in MEMORY_CASES.items():
            options = ["--device", str(device), "--precision", precision, "--memory-of", *map(str, case)]
            command = [sys.executable, "-m", "tools.bench.engine", *options]
            printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            peaks[name].append(float(printed.split()[-1]))
    return {name: statistics.median(megabytes) for name, megabytes in peaks.items()}


def print_peak(
    device: torch.device, precision: str, implementation: str, batch: int, n_steps: int, requests: int
) -> None:
    """The measuring process of ``measure_memory``: prints MB."""
    contestants = Contestants(device, precision, batch)

    def run(batch: int, n_steps: int) -> None:
        if implementation == "engine":
            contestants.run_engine(batch, n_steps)
        else:
            run_captum(contestants.eager, contestants.images[:batch], contestants.targets[:batch], n_steps)

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before: float = torch.cuda.memory_allocated()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak to the present resident memory
        before = _peak_resident_mb()
    for _ in range(requests):
        run(batch, n_steps)
    if device.type == "cuda":
        print((torch.cuda.max_memory_allocated() - before) / 1e6)
    else:
        print(_peak_resident_mb() - before)


def _peak_resident_mb() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1e3 for line in lines if line.startswith("VmHWM"))


def table(report: dict[str, Any]) -> str:
    """The report's parts as Markdown."""
    return "\n\n".join("\n".join(lines(report)) for name, lines in TABLES.items() if report.get(name))


def _rows_table(report: dict[str, Any]) -> Iterator[str]:
    yield "| batch | steps | engine | Captum (a) | Captum tuned (b) | times (a) | times (b) | runs |"
    yield "|---|---|---|---|---|---|---|---|"
    for row in report["rows"]:
        seconds = " | ".join(f"{1e3 * row['median_seconds'][name]:.0f} ms" for name in ("engine", "captum", "tuned"))
        ratios = f"{row['times_captum']:.2f} | {row['times_tuned']:.2f}"
        yield f"| {row['batch']} | {row['n_steps']} | {seconds} | {ratios} | {row['repeats']} |"
    yield ""
    yield f"Left out, over {report['most_rows']} rows: {', '.join(report['left_out']) or 'nothing'}."


def _accurate_table(report: dict[str, Any]) -> Iterator[str]:
    yield f"| one image | time | times (a), {ACCURATE_STEPS} steps | times (b), {ACCURATE_STEPS} steps |"
    yield "|---|---|---|---|"
    typical = report["accurate"]["median_seconds"]
    for name, seconds in typical.items():
        ratios = f"{typical['captum'] / seconds:.2f} | {typical['tuned'] / seconds:.2f}"
        yield f"| {name} | {1e3 * seconds:.0f} ms | {ratios} |"


def _unlike_line(report: dict[str, Any]) -> Iterator[str]:
    yield f"Different against equal step counts with as many rows: {report['unlike']['ratio']:.3f} times the time."


def _chunk_sizes_table(report: dict[str, Any]) -> Iterator[str]:
    yield "| rows a chunk | 100 steps |"
    yield "|---|---|"
    for size, seconds in report["max_rows_seconds"].items():
        yield f"| {size} | {1e3 * seconds:.0f} ms |"


def _pass_table(report: dict[str, Any]) -> Iterator[str]:
    yield f"| one pass of {report['max_rows']} rows | time |"
    yield "|---|---|"
    for name, seconds in report["pass_seconds"].items():
        yield f"| {name} | {1e3 * seconds:.1f} ms |"


def _precision_table(report: dict[str, Any]) -> Iterator[str]:
    yield f"| relative error at {PRECISION_STEPS} steps | median |"
    yield "|---|---|"
    for name, error in report["precision_errors"].items():
        yield f"| {name} | {error:.1e} |"


def _profile_lines(report: dict[str, Any]) -> Iterator[str]:
    measured = report["profile"]
    yield (
        f"{measured['share_of_time_in_convolutions']:.0%} of the engine's time is in convolutions; it computes "
        f"{measured['achieved_gflop_per_second']:.0f} GFLOP/s."
    )


def _memory_table(report: dict[str, Any]) -> Iterator[str]:
    yield "| peak memory | MB |"
    yield "|---|---|"
    for name, megabytes in report["memory_mb"].items():
        yield f"| {name} | {megabytes:.0f} |"


# Part of a report -> lines of its Markdown.
TABLES = {
    "rows": _rows_table,
    "accurate": _accurate_table,
    "unlike": _unlike_line,
    "memory_mb": _memory_table,
    "max_rows_seconds": _chunk_sizes_table,
    "pass_seconds": _pass_table,
    "precision_errors": _precision_table,
    "profile": _profile_lines,
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.bench.engine", description=__doc__.splitlines()[0])
    parser.add_argument("--device", type=torch.device, default=default_device())
    parser.add_argument("--precision", choices=PRECISIONS, default="tf32", help="on a CPU: ieee convolves directly")
    parser.add_argument("--steps", type=int, nargs="+", default=[20, 50, 100, 300])
    parser.add_argument("--batches", type=int, nargs="+", help="default: 1 4 8; on a GPU 1 to 64")
    parser.add_argument("--repeats", type=int, default=5, help="counted runs of each cell (default: 5)")
    parser.add_argument("--most-rows", type=int, help="leave out larger cells, which (a) holds in memory at once")
    parser.add_argument("--gate-images", type=int, help="images for the precision gate (default: 8 on a GPU, else 0)")
    parser.add_argument("--compiled", action="store_true", help="compare with a compiled joint graph")
    parser.add_argument("--only", nargs="+", choices=list(TABLES), help="parts of the report (default: all)")
    parser.add_argument("--out", type=Path, default=OUTPUTS / "bench" / "engine.json")
    parser.add_argument("--memory-of", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    device = arguments.device
    if arguments.memory_of:
        implementation, *numbers = arguments.memory_of
        print_peak(device, arguments.precision, implementation, *map(int, numbers))
        return
    on_gpu = device.type == "cuda"
    batches = arguments.batches or ([1, 2, 4, 8, 16, 32, 64] if on_gpu else [1, 4, 8])
    gate_images = arguments.gate_images if arguments.gate_images is not None else PRECISION_IMAGES if on_gpu else 0
    most_rows = arguments.most_rows or (3200 if on_gpu else 400)
    cells = [(batch, n) for batch in batches for n in arguments.steps]
    contestants = Contestants(device, arguments.precision, max(8, *batches))
    contestants.tune()
    measured: dict[str, Callable[[], Any]] = {
        "rows": lambda: [
            compare(contestants, batch, n, arguments.repeats)
            for batch, n in tqdm([(batch, n) for batch, n in cells if batch * n <= most_rows], desc="cells")
        ],
        "accurate": lambda: compare_accurate(contestants, arguments.repeats),
        "unlike": lambda: compare_unlike(contestants, arguments.repeats),
        "max_rows_seconds": lambda: compare_chunk_sizes(contestants, arguments.repeats),
        "pass_seconds": lambda: compare_compiled(contestants, arguments.repeats) if arguments.compiled else None,
        "precision_errors": lambda: compare_precisions(device, gate_images) if gate_images else None,
        "profile": lambda: profile_engine(contestants),
        "memory_mb": lambda: measure_memory(device, arguments.precision),
    }
    report = {
        "command": " ".join(["python -m tools.bench.engine", *sys.argv[1:]]),
        "machine": describe_machine(device),
        "precision": arguments.precision,
        "max_rows": contestants.engine.max_rows,
        "tuned_internal_batch_size": contestants.tuned_batch,
        "most_rows": most_rows,
        "left_out": [f"batch {batch} x {n}" for batch, n in cells if batch * n > most_rows],
        **{name: measure() for name, measure in measured.items() if name in (arguments.only or measured)},
    }
    write_report(report, table(report), arguments.out)


if __name__ == "__main__":
    main()
