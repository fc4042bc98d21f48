"""Faults of a real device under a server that is supervised: memory that others hold, a failed assertion in a kernel.

Then what the client shares with the server through the device's memory, and the device's memory after many requests.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from explain_client import ExplainClient, ExplainError, TensorClient
from explain_client.tensors import SharedMemory
from tools.bench.load import jpeg_images
from tools.bench.overload import with_settings
from tools.evaluation.measuring import default_device, held_out_images, relative_distance
from tools.gpu_proof.part import Record
from tools.paths import OUTPUTS, ROOT
from tools.server import Ports
from tools.triton.options import LOCALHOST
from tools.triton.process import ServerError

DEVICE = default_device()
LEFT_BYTES = 700 << 20  # for the server, while another process holds the rest
STOP_SECONDS, START_SECONDS, RECOVERY_SECONDS = 8, 45, 60
# Their numbers of steps repeat after half of them: what is captured once must not count as lost.
REQUESTS = 200
LOG_WORDS = "no memory", "failed", "CUDA graphs", "rows a chunk"
# Added to the model in the repository of these tests: where a file asks for it, the next pass fails in a kernel.
FAULT = """

def _with_fault(initialize, request):
    def initialized(self, args):
        initialize(self, args)
        gradients = self.engine.passes.gradients

        def failing(rows, count, *rest):
            if count > 1 and request.exists():  # one row is that of a supervisor's request
                request.unlink()
                torch.zeros(1, device=self.device)[torch.tensor([9], device=self.device)].cpu()
            return gradients(rows, count, *rest)

        self.engine.passes.gradients = failing

    return initialized


TritonPythonModel.initialize = _with_fault(TritonPythonModel.initialize, __import__("pathlib").Path({request!r}))
"""
# Another process: it takes all but so many bytes of the device, says so, and holds them until its input ends.
HOLDER = """
import sys, torch
left, held = int(sys.argv[1]), []
torch.zeros(1, device="cuda")
while torch.cuda.mem_get_info()[0] > left + (64 << 20):
    held.append(torch.empty(min(1 << 30, torch.cuda.mem_get_info()[0] - left), dtype=torch.uint8, device="cuda"))
print(torch.cuda.mem_get_info()[0], flush=True)
sys.stdin.read()
"""


class Supervised:
    """What ``make serve`` runs, with the fault above."""

    def __init__(self, folder: Path) -> None:
        self.request, self.log = folder / "fail", folder / "log"
        self.repository = with_settings(folder, "integrated_gradients")
        file = self.repository / "integrated_gradients" / "1" / "model.py"
        file.write_text(file.read_text() + FAULT.format(request=str(self.request)))
        self.ports = Ports.free()
        self.url = f"{LOCALHOST}:{self.ports.grpc}"

    def __enter__(self) -> Supervised:
        settings = {f"{name.upper()}_PORT": str(port) for name, port in vars(self.ports).items()}
        command = [sys.executable, "-m", "tools.server", "--repository", str(self.repository), "--most-restarts", "9"]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command,
                cwd=ROOT,
                env={**os.environ, **settings, "PYTHONUNBUFFERED": "1", "NETWORK": "shapes"},
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        until = time.monotonic() + START_SECONDS
        while "ready; Ctrl-C" not in self.log.read_text():
            if self.process.poll() is not None or time.monotonic() > until:
                self.__exit__()
                raise ServerError(self.log.read_text()[-1000:])
            time.sleep(0.2)
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        try:
            self.process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()

    def ask(self, image: bytes, **options: Any) -> dict[str, Any]:
        """Seconds of a request without retries, and its error."""
        started = time.monotonic()
        error = ""
        try:
            with ExplainClient(self.url, timeout=30, retries=0) as client:
                client.explain(image, **options)
        except ExplainError as failure:
            error = f"{type(failure).__name__}: {failure}"
        return {"seconds": time.monotonic() - started, "error": error}

    def recovery(self, image: bytes) -> float:
        """Seconds until a request is answered."""
        started = time.monotonic()
        while self.ask(image, n_steps=1)["error"]:
            if time.monotonic() > started + RECOVERY_SECONDS:
                raise TimeoutError(f"no answer within {RECOVERY_SECONDS} s")
            time.sleep(0.2)
        return time.monotonic() - started


@contextmanager
def memory_held() -> Iterator[int]:
    """Hold the device's memory but ``LEFT_BYTES``; gives the bytes that are left. On a CPU nothing is held."""
    if DEVICE.type != "cuda":
        yield 0
        return
    command = [sys.executable, "-c", HOLDER, str(LEFT_BYTES)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdin is not None
        try:
            if not (left := holder.stdout.readline()):
                raise RuntimeError("the process that should hold the device's memory has ended")
            yield int(left)
        finally:
            holder.stdin.close()


def used_megabytes() -> float:
    """Memory of the device that all processes use."""
    if DEVICE.type != "cuda":
        return 0.0
    free, whole = torch.cuda.mem_get_info()
    return (whole - free) / 1e6


def measure(record: Record) -> None:
    image = jpeg_images()[0]
    with tempfile.TemporaryDirectory() as folder, Supervised(Path(folder)) as server:
        try:
            # Before the first explanation: later it has the memory of a whole pass, and keeps it.
            with memory_held() as left:
                record["little memory, MB left"] = left / 1e6
                record["little memory"] = {f"{steps} steps": server.ask(image, n_steps=steps) for steps in (50, 10)}
            record["memory is back, seconds until an answer"] = server.recovery(image)
            record["memory is back"] = [server.ask(image, n_steps=50) for _ in range(3)]
            server.request.touch()
            record["assertion in a kernel"] = server.ask(image, n_steps=50)
            record["assertion, seconds until the next answer"] = server.recovery(image)
            record["after the assertion"] = [server.ask(image, n_steps=50) for _ in range(2)]
        finally:
            record["supervisor"] = server.log.read_text().splitlines()[-8:]
            log = (OUTPUTS / "triton.log").read_text(errors="replace").splitlines()
            record["server's log"] = [line[:300] for line in log if any(word in line for word in LOG_WORDS)][-20:]


def share_memory(record: Record) -> None:
    """Shared memory, and the device's memory before and after many requests."""
    pixels = np.stack([each.numpy() for each in held_out_images("shapes", 2).values()])
    kinds: tuple[SharedMemory, ...] = ("system", "cuda") if DEVICE.type == "cuda" else ("system",)
    with tempfile.TemporaryDirectory() as folder, Supervised(Path(folder)) as server:
        key = next(OUTPUTS.glob(f"admin-{server.ports.grpc}.key")).read_text().strip()
        headers = {"triton-grpc-protocol-admin-key": key}
        for kind in kinds:
            record.attempt(f"{kind} shared memory", partial(compare_shared, record, server, headers, kind, pixels))
        image = jpeg_images()[0]
        used = [used_megabytes()]
        with ExplainClient(server.url, timeout=60) as client:
            for _ in range(2):
                for number in range(2 if record.quick else REQUESTS // 2):
                    client.explain(image, n_steps=2 + number)
                used.append(used_megabytes())
        record["device memory after none, half and all of the requests, MB"] = used


def compare_shared(
    record: Record, server: Supervised, headers: dict[str, str], kind: SharedMemory, pixels: Any
) -> None:
    """Attributions through shared memory against those over the connection."""
    with TensorClient(server.url, headers=headers) as client:
        logits, _ = client.classify(pixels)
        expected = client.attribute(pixels, logits, n_steps=20).attributions
    with TensorClient(server.url, headers=headers, shared_memory=kind) as client:
        started = time.monotonic()
        found = client.attribute(pixels, logits, n_steps=20).attributions
        record[f"{kind} shared memory"] = {
            "seconds": time.monotonic() - started,
            "distance": relative_distance(torch.tensor(found), torch.tensor(expected)),
        }


MEASURES = {"faults": measure, "shared memory": share_memory}
