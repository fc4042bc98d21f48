"""Kernels of an explanation of 50 steps: the longest, and the whole trace for a viewer."""

from __future__ import annotations

from engine_loading import PRECISIONS
from torch.profiler import ProfilerActivity, profile

from tools.bench import engine as bench
from tools.evaluation.measuring import default_device
from tools.gpu_proof.part import Record

KERNELS = 25


def measure(record: Record) -> None:
    device, precision = default_device(), PRECISIONS[0]
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    contestants = bench.Contestants(device, precision, 1)
    for _ in range(3):
        contestants.run_engine(1, 50)
    with profile(activities=activities, acc_events=True) as profiler:
        contestants.run_engine(1, 50)
    record[f"kernels, {precision}"] = {
        event.key[:120]: {"us": microseconds, "calls": event.count}
        for event, microseconds in bench.kernel_times(profiler, device)[:KERNELS]
    }
    profiler.export_chrome_trace(str(record.file.with_name("trace.json.gz")))


MEASURES = {"trace": measure}
