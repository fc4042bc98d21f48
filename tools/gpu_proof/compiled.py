"""One pass as the engine runs it against the same pass as a compiled joint graph of forward and backward."""

from __future__ import annotations

from engine_loading import PRECISIONS

from tools.bench import engine as bench
from tools.evaluation.measuring import default_device
from tools.gpu_proof.part import Record


def measure(record: Record) -> None:
    precision = PRECISIONS[0]
    contestants = bench.Contestants(default_device(), precision, 1)
    rows, repeats = contestants.engine.max_rows, 1 if record.quick else 5
    record[f"pass of {rows} rows, {precision}"] = bench.compare_compiled(contestants, repeats)


MEASURES = {"compiled": measure}
