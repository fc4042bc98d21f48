"""Kernels of an explanation of 50 steps: the longest, and the whole trace for a viewer."""

from __future__ import annotations

import torch
from engine_loading import PRECISIONS
from torch.profiler import ProfilerActivity, profile

from tools.bench import engine as bench
from tools.evaluation.measuring import default_device
from tools.gpu_proof.part import Record

KERNELS = 25


def measure(record: Record) -> None:
    device = default_device()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    for precision in PRECISIONS[:1] if record.quick else PRECISIONS[:2]:
        contestants = bench.Contestants(device, precision, 1)
        for _ in range(3):
            contestants.run_engine(1, 50)
        torch.set_grad_enabled(True)
        with profile(activities=activities) as profiler:
            contestants.run_engine(1, 50)
        attribute = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
        events = sorted(profiler.key_averages(), key=lambda event: -getattr(event, attribute))
        record[f"kernels, {precision}"] = {
            event.key[:120]: {"us": getattr(event, attribute), "calls": event.count} for event in events[:KERNELS]
        }
        profiler.export_chrome_trace(str(record.file.with_name(f"trace_{precision}.json.gz")))


MEASURES = {"trace": measure}
