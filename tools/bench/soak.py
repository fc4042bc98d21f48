"""Half an hour of mixed requests: ``python -m tools.bench.soak``.

Requests of all kinds are sent at random times, at a rate a little below the machine's capacity; 5 % are malformed and
5 % are cancelled. Every request is accounted for, answers are compared with those of an idle server, and the server's
memory, threads, open files and shared memory are sampled. Exit status 1 if a check fails. Writes JSON.
"""

from __future__ import annotations

import argparse
import os
import queue
import random
import re
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tritonclient.grpc
from tqdm import tqdm
from tritonclient.utils import InferenceServerException

from explain_client import ExplainClient, Level, RefusedError
from tools.bench.load import image_tensor, jpeg_images
from tools.bench.processes import Sampler, own_mb, session
from tools.bench.scaling import settled_metrics
from tools.evaluation.measuring import describe_machine, distribution, relative_distance, write_report
from tools.export import repository_with
from tools.paths import OUTPUTS
from tools.server import EmbeddedServer, Ports
from tools.triton.process import SHARED_MEMORY

# Gradients a second requested on average; 2 CPU cores compute about 21 besides all else.
GRADIENTS_PER_SECOND = 19.0
WORKERS = 16
WATCH_EVERY = 5.0
# Most relative distance of an answer to an idle server's: chunk sizes change rounding.
LARGEST_DISTANCE = 1e-4
# Most growth from the second fifth of the time to the last. Shared memory grows with the longest queue so far.
MOST_GROWTH = {"memory_mb": 120, "threads": 8, "files": 16, "shared_mb": 16}

# Kind -> its share of the requests, gradients it takes about, and its parameters.
KINDS: dict[str, tuple[float, float, dict[str, Any]]] = {
    "classify": (0.25, 0, {}),
    "explain, 8 steps": (0.2, 8, {"n_steps": 8}),
    "explain, 20 steps": (0.15, 20, {"n_steps": 20}),
    "explain, calibrated, black, probability": (
        0.1,
        12,
        {"method": "calibrated", "n_steps": 12, "baseline": "black", "output": "probability"},
    ),
    "explain, noise": (0.05, 12, {"n_steps": 4, "nt_samples": 3, "seed": 7}),
    "explain, tolerance": (0.05, 9, {"tolerance": 0.1}),
    "explain, deadline": (0.05, 10, {"deadline_ms": 500}),
    "stream": (0.05, 13, {"n_steps": 13}),
    "malformed": (0.05, 0, {}),
    "cancelled": (0.05, 20, {"n_steps": 60}),
}
MALFORMED: tuple[tuple[bytes, dict[str, Any]], ...] = (
    (b"no image", {}),
    (b"", {}),
    (b"\xff\xd8\xff\xe0" + bytes(100), {}),
    (b"", {"n_steps": 0}),
)
# Kinds whose answers do not depend on timing.
COMPARED = (
    "explain, 8 steps",
    "explain, 20 steps",
    "explain, calibrated, black, probability",
    "explain, noise",
    "stream",
)
# Kinds that bring the server's memory to its size for full batches, before it is sampled.
WARMING = ("classify", "explain, 8 steps", "explain, noise", "explain, deadline", "stream")


class Traffic:
    """Sends requests and records their outcomes, latencies and faults."""

    def __init__(self, url: str, images: list[bytes], seed: int = 0) -> None:
        self.url, self.images = url, images
        self._random = random.Random(seed)
        self.outcomes: Counter[tuple[str, str]] = Counter()
        self.latencies: list[tuple[float, str, float]] = []  # seconds from the start, kind, seconds taken
        self.distances: list[float] = []
        self.wrong: list[str] = []
        self._lock = threading.Lock()
        self._local = threading.local()
        self._expected = {
            (kind, index): self._saliency(kind, index) for kind in COMPARED for index in range(len(images))
        }
        self.warm_up()
        self._started = time.monotonic()

    def _client(self) -> ExplainClient:
        if not hasattr(self._local, "client"):
            self._local.client = ExplainClient(self.url, timeout=120, retries=0)
        return self._local.client

    def _saliency(self, kind: str, index: int) -> np.ndarray:
        parameters = KINDS[kind][2]
        if kind == "stream":
            *_, last = self._client().explain_stream(self.images[index], **parameters)
            assert isinstance(last, Level)
            saliency = last.saliency
        else:
            saliency = self._client().explain(self.images[index], **parameters).saliency
        assert saliency is not None  # it is requested by default
        return saliency

    def warm_up(self) -> None:
        """Send ``WORKERS`` requests at once, of a few kinds in turn.

        Raises:
            Exception: a request failed."""
        indices = [worker % len(self.images) for worker in range(WORKERS)]
        with ThreadPoolExecutor(WORKERS) as pool:
            for kind in WARMING:
                list(pool.map(self._ask, [kind] * WORKERS, indices))

    def ask(self, kind: str, index: int, at: float) -> None:
        """Send one request that was due at ``at`` (by ``time.monotonic``) and record its outcome."""
        try:
            outcome = self._ask(kind, index)
        except Exception as failure:
            outcome = f"{type(failure).__name__}"
            with self._lock:
                self.wrong.append(f"{kind}: {failure!r:.300}")
        with self._lock:
            self.outcomes[kind, outcome] += 1
            self.latencies.append((at - self._started, kind, time.monotonic() - at))

    def _ask(self, kind: str, index: int) -> str:
        client, image, parameters = self._client(), self.images[index], KINDS[kind][2]
        if kind == "classify":
            client.classify(image)
        elif kind == "malformed":
            content, parameters = MALFORMED[index % len(MALFORMED)]
            try:
                client.explain(content or image if parameters else content, **parameters)
            except RefusedError:
                return "refused"
            raise AssertionError(f"malformed request {index % len(MALFORMED)} was answered")
        elif kind == "cancelled":
            return self._cancel(image, parameters)
        elif kind in COMPARED:
            distance = relative_distance(
                torch.from_numpy(self._saliency(kind, index).copy()),
                torch.from_numpy(self._expected[kind, index].copy()),
            )
            with self._lock:
                self.distances.append(distance)
            if not distance <= LARGEST_DISTANCE:
                raise AssertionError(f"image {index} is {distance:.1e} from the idle server's answer")
        else:
            client.explain(image, **parameters)
        return "answered"

    def _cancel(self, image: bytes, parameters: dict[str, Any]) -> str:
        """At random, leave a stream after its prediction or cancel a call."""
        if self._random.random() < 0.5:
            for _ in self._client().explain_stream(image, **parameters):
                return "cancelled"
        if not hasattr(self._local, "triton"):
            self._local.triton = tritonclient.grpc.InferenceServerClient(self.url)
        ended: queue.Queue[InferenceServerException | None] = queue.Queue()
        call = self._local.triton.async_infer(
            "explain",
            [image_tensor(image)],
            lambda result, error: ended.put(error),
            parameters={**parameters, "n_steps": 20},
        )
        time.sleep(self._random.uniform(0.02, 0.5))
        call.cancel()
        try:
            error = ended.get(timeout=60)
        except queue.Empty:
            raise AssertionError("a cancelled call has not ended") from None
        if error is None:
            return "answered before"
        if error.status() != "StatusCode.CANCELLED":
            raise error
        return "cancelled"


def run(traffic: Traffic, seconds: float, seed: int) -> int:
    """Send requests at random times for ``seconds``; returns their number."""
    random_ = random.Random(seed)
    kinds, weights = zip(*((kind, share) for kind, (share, *_) in KINDS.items()))
    rate = GRADIENTS_PER_SECOND / sum(share * gradients for share, gradients, _ in KINDS.values())
    count, at = 0, (started := time.monotonic())
    until = started + seconds
    with ThreadPoolExecutor(WORKERS) as pool, tqdm(total=round(seconds), unit="s") as progress:
        while at < until:
            time.sleep(max(0.0, at - time.monotonic()))
            kind, index = random_.choices(kinds, weights)[0], random_.randrange(len(traffic.images))
            pool.submit(traffic.ask, kind, index, at)
            count += 1
            at += random_.expovariate(rate)
            progress.update(round(min(at, until) - started) - progress.n)
    return count


def answered_by(server: EmbeddedServer) -> Counter[str]:
    """Requests to each model that the server counts as answered."""
    counts: Counter[str] = Counter()
    for name, labels, value in settled_metrics(server):
        if name == "nv_inference_request_success":
            counts[re.findall('model="([^"]+)"', labels)[0]] += round(value)
    return counts


def unaccounted(traffic: Traffic, requests: int, answered: Counter[str]) -> list[str]:
    """Disagreements between requests sent, their outcomes, and the server's count ``answered``.

    The server may count a cancelled request as answered.
    """
    wrong = []
    if (ended := sum(traffic.outcomes.values())) != requests:
        wrong.append(f"{requests} requests were sent, and {ended} have ended")
    counts: Counter[str] = Counter()
    for (kind, outcome), count in traffic.outcomes.items():
        if outcome.startswith("answered") and kind != "stream":
            counts["classify" if kind == "classify" else "explain"] += count
    cancelled = traffic.outcomes["cancelled", "cancelled"]
    for model, least in counts.items():
        if not least <= answered[model] <= least + (cancelled if model == "explain" else 0):
            wrong.append(f"{least} requests to {model} were answered, {answered[model]} by its own count")
    return wrong


def held(server: EmbeddedServer) -> dict[str, float]:
    """Memory, threads, open files and shared memory of the server's processes now."""
    processes = list(session(server.process.pid))
    regions = SHARED_MEMORY.glob(f"{server.region_prefix}*")
    return {
        "memory_mb": sum(map(own_mb, processes)),
        "threads": sum(_entries(process, "task") for process in processes),
        "files": sum(_entries(process, "fd") for process in processes),
        "shared_mb": sum(region.stat().st_blocks * 512 for region in regions) / 1e6,
    }


def _entries(process: int, name: str) -> int:
    try:
        return len(os.listdir(f"/proc/{process}/{name}"))
    except OSError:
        return 0


def by_fifths(samples: list[dict[str, float]]) -> dict[str, list[float]]:
    """Median of each sampled value in each fifth of the time."""
    parts = np.array_split(np.arange(len(samples)), 5)
    return {
        name: [float(np.median([samples[number][name] for number in part])) for part in parts if len(part)]
        for name in MOST_GROWTH
    }


def slopes(samples: list[dict[str, float]]) -> dict[str, float]:
    """Growth of each sampled value in an hour: least squares over all but the first fifth of the time."""
    later = samples[len(samples) // 5 :]
    hours = [sample["seconds"] / 3600 for sample in later]
    return {name: float(np.polyfit(hours, [sample[name] for sample in later], 1)[0]) for name in MOST_GROWTH}


def too_much_growth(held_by_fifths: dict[str, list[float]]) -> list[str]:
    """Values that grew by more than ``MOST_GROWTH`` from the second fifth of the time to the last."""
    wrong = []
    for name, values in held_by_fifths.items():
        early, late = values[min(1, len(values) - 1)], values[-1]
        if late - early > MOST_GROWTH[name]:
            wrong.append(f"{name} grew from {early:.0f} to {late:.0f}")
    return wrong


def by_kind(traffic: Traffic, seconds: float) -> dict[str, dict[str, Any]]:
    """For each kind of request: outcomes, seconds, and median seconds in each fifth of the time."""
    kinds: dict[str, dict[str, Any]] = {}
    for kind in KINDS:
        latencies = [(at, latency) for at, sent, latency in traffic.latencies if sent == kind]
        fifths: list[list[float]] = [[] for _ in range(5)]
        for at, latency in latencies:
            fifths[min(4, int(5 * at / seconds))].append(latency)
        if latencies:
            kinds[kind] = {
                "outcomes": {name: count for (sent, name), count in traffic.outcomes.items() if sent == kind},
                "seconds": distribution([latency for _, latency in latencies]),
                "p50_by_fifths": [float(np.median(part)) if part else None for part in fifths],
            }
    return kinds


def table(report: dict[str, Any]) -> str:
    """Markdown tables of latencies and growth, and a summary."""
    lines = ["| kind | requests | outcomes | p50 | p95 | p99 |", "|---|---|---|---|---|---|"]
    for kind, measured in report["kinds"].items():
        outcomes = ", ".join(f"{count} {name}" for name, count in measured["outcomes"].items())
        p50, p95, p99 = (f"{1e3 * measured['seconds'][part]:.0f} ms" for part in ("p50", "p95", "p99"))
        lines.append(f"| {kind} | {measured['seconds']['count']} | {outcomes} | {p50} | {p95} | {p99} |")
    lines += ["", "| p50 by fifths of the time | | | | | |", "|---|---|---|---|---|---|"]
    for kind, measured in report["kinds"].items():
        cells = ("" if value is None else f"{1e3 * value:.0f} ms" for value in measured["p50_by_fifths"])
        lines.append(f"| {kind} | {' | '.join(cells)} |")
    lines += ["", "| median by fifths of the time | | | | | | an hour |", "|---|---|---|---|---|---|---|"]
    for name, values in report["held_by_fifths"].items():
        medians = " | ".join(f"{value:.0f}" for value in values)
        lines.append(f"| {name} | {medians} | {report['slopes'][name]:+.0f} |")
    lines += [
        "",
        f"{report['requests']} requests in {report['seconds']:.0f} s, all accounted for: {report['accounted']}; "
        f"{report['compared']} answers compared, the largest distance {report['largest_distance']:.1e}; "
        f"wrong: {'; '.join(report['wrong']) or 'nothing'}.",
    ]
    return "\n".join(lines)


def soak(server: EmbeddedServer, seconds: float, seed: int = 0) -> dict[str, Any]:
    """Run the benchmark; failed checks are in ``wrong``."""
    images = jpeg_images()[:4]
    traffic = Traffic(server.grpc_url, images, seed)
    before = answered_by(server)
    started = time.monotonic()
    with Sampler(lambda: {"seconds": time.monotonic() - started, **held(server)}, WATCH_EVERY) as watch:
        requests = run(traffic, seconds, seed)
        elapsed = time.monotonic() - started
    held_by_fifths = by_fifths(watch.samples)
    missing = unaccounted(traffic, requests, answered_by(server) - before)
    wrong = [*traffic.wrong[:20], *too_much_growth(held_by_fifths), *missing]
    return {
        "seconds": elapsed,
        "requests": requests,
        "accounted": not missing,
        "kinds": by_kind(traffic, elapsed),
        "compared": len(traffic.distances),
        "largest_distance": max(traffic.distances, default=0.0),
        "held_by_fifths": held_by_fifths,
        "slopes": slopes(watch.samples),
        "wrong": wrong,
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.bench.soak", description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=OUTPUTS / "bench" / "soak.json")
    arguments = parser.parse_args()
    with EmbeddedServer(repository_with("shapes"), Ports.free(), log_file=OUTPUTS / "bench" / "soak.log") as server:
        measured = soak(server, 60 * arguments.minutes, arguments.seed)
    report = {
        "command": " ".join(["python -m tools.bench.soak", *sys.argv[1:]]),
        "machine": describe_machine(),
        **measured,
    }
    write_report(report, table(report), arguments.out)
    sys.exit(1 if report["wrong"] else 0)


if __name__ == "__main__":
    main()
