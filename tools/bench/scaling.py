"""Time of a served explanation by steps, batch and image size, and its parts."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import tritonclient.grpc
from PIL import Image
from tqdm import tqdm

from tools.bench.load import image_tensor, run_block, triton_asker
from tools.evaluation.image_files import encode
from tools.evaluation.measuring import timed
from tools.probe import Series, read_metrics, total
from tools.server import EmbeddedServer
from tools.shapes.dataset import draw_scene

STEPS = (10, 20, 50, 100, 200)
BATCHES = (1, 2, 4, 8)
SIDES = (224, 512, 1024, 2048, 4096)
BATCH_STEPS = SIDE_STEPS = 20
HEATMAP = ("PROBABILITIES", "HEATMAP")
# Steps of the ensemble besides the gradients, whose time Triton's statistics do not show.
OTHERS = ("preprocess", "classifier", "heatmap")
PARTS = ("queue", "compute_input", "compute_infer", "compute_output")
# Time for the gradients to hand their metrics to the server.
METRICS_SECONDS = 1.0


def measure_scaling(server: EmbeddedServer, images: list[bytes], calls: int, quick: bool) -> dict[str, Any]:
    """Seconds of each call of `explain` by number of steps, of images in a request, and by side of the image."""
    url = server.grpc_url
    steps, batches, sides = (values[1:3] if quick else values for values in (STEPS, BATCHES, SIDES))
    seconds: dict[str, dict[int, list[float]]] = {"steps": {}, "batch": {}, "side": {}}
    with tqdm(total=calls * (len(steps) + len(batches) + len(sides)), desc="scaling") as progress:

        def take(kind: str, value: int, ask: Any) -> None:
            ask()
            for _ in range(calls):
                seconds[kind].setdefault(value, []).append(timed(ask))
                progress.update()

        for count in steps:
            ask = triton_asker(url, "explain", images, HEATMAP, {"n_steps": count})
            take("steps", count, lambda ask=ask: ask(0))
        for size in batches:
            take("batch", size, _batch_asker(url, images[:1] * size))
        for side in sides:
            ask = triton_asker(url, "explain", [_large_jpeg(side)], HEATMAP, {"n_steps": SIDE_STEPS})
            take("side", side, lambda ask=ask: ask(0))
    return seconds


def _batch_asker(url: str, images: list[bytes]) -> Any:
    """A function that sends one request of several images."""
    client = tritonclient.grpc.InferenceServerClient(url)
    tensor = image_tensor(*images)
    wanted = [tritonclient.grpc.InferRequestedOutput(name) for name in HEATMAP]
    return lambda: client.infer("explain", [tensor], outputs=wanted, parameters={"n_steps": BATCH_STEPS})


def _large_jpeg(side: int) -> bytes:
    scene = Image.fromarray(draw_scene("test", 0, size=min(side, 1024)).image)
    return encode(scene.resize((side, side)), "JPEG")


def measure_shares(server: EmbeddedServer, images: list[bytes], calls: int, n_steps: int = 20) -> dict[str, Any]:
    """Parts of an explanation's time with one client: means in ms, from the models' statistics."""
    client = tritonclient.grpc.InferenceServerClient(server.grpc_url)
    ask = triton_asker(server.grpc_url, "explain", images, HEATMAP, {"n_steps": n_steps})
    for number in range(3):
        ask(number)
    before = _counters(server, client)
    seconds = run_block(lambda: ask, 1, calls).seconds
    after = _counters(server, client)
    means = {name: (after[name] - before[name]) / calls for name in after}
    shares = {
        "decode and resize": means["preprocess compute_infer"],
        "classifier": means["classifier compute_infer"],
        "gradients": means["gradients"],
        "heatmap and PNG": means["heatmap compute_infer"],
        "queues": sum(means[f"{model} queue"] for model in OTHERS) + means["gradients wait"],
        "transfers": sum(means[f"{model} {part}"] for model in OTHERS for part in ("compute_input", "compute_output")),
    }
    total = 1e3 * float(np.mean(seconds))
    # Request and response on the wire, the ensemble's scheduling, and time that the models do not count.
    shares["wire and rest"] = max(0.0, total - sum(shares.values()))
    median = 1e3 * float(np.median(seconds))
    return {
        "calls": calls,
        "n_steps": n_steps,
        "shares_ms": shares,
        "mean_ms": total,
        "p50_ms": median,
        "outside_gradients_ms": total - shares["gradients"],
        "outside_networks_ms": total - shares["gradients"] - shares["classifier"],
    }


def settled_metrics(server: EmbeddedServer) -> Series:
    """A server's metrics, after a wait so that they include everything until now."""
    time.sleep(METRICS_SECONDS)
    return read_metrics(server.host, server.ports.metrics)


def _counters(server: EmbeddedServer, client: tritonclient.grpc.InferenceServerClient) -> dict[str, float]:
    """Milliseconds of each part of all requests so far."""
    milliseconds: dict[str, float] = {}
    for model in OTHERS:
        statistics = client.get_inference_statistics(model).model_stats[0].inference_stats
        milliseconds |= {f"{model} {part}": getattr(statistics, part).ns / 1e6 for part in PARTS}
    series = settled_metrics(server)
    for name, metric in (("gradients", "compute_seconds"), ("gradients wait", "wait_seconds")):
        milliseconds[name] = 1e3 * total(series, f"integrated_gradients_{metric}_sum")
    return milliseconds


def scaling_table(by_kind: dict[str, Any]) -> str:
    """A Markdown table of the calls' medians."""
    lines = ["| | | one call, median | an explanation | explanations a second |", "|---|---|---|---|---|"]
    named = {"steps": "{} steps", "batch": f"{{}} images, {BATCH_STEPS} steps", "side": "{0} x {0} pixels"}
    for kind, values in by_kind.items():
        for value, seconds in values.items():
            median = float(np.median(seconds))
            images = int(value) if kind == "batch" else 1
            lines.append(
                f"| {kind} | {named[kind].format(value)} | {1e3 * median:.0f} ms | {1e3 * median / images:.0f} ms "
                f"| {images / median:.2f} |"
            )
    return "\n".join(lines)


def shares_table(measured: dict[str, Any]) -> str:
    """A Markdown table of the parts."""
    title = f"one explanation, {measured['n_steps']} steps, heatmap, mean of {measured['calls']}"
    lines = [f"| {title} | ms |", "|---|---|"]
    lines += [f"| {name} | {value:.1f} |" for name, value in measured["shares_ms"].items()]
    lines += [
        "",
        f"{measured['mean_ms']:.0f} ms in all (p50 {measured['p50_ms']:.0f}); "
        f"{measured['outside_gradients_ms']:.1f} ms outside the gradients, "
        f"{measured['outside_networks_ms']:.1f} ms without the classifier's forward pass.",
    ]
    return "\n".join(lines)
