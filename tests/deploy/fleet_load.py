"""Sends requests until its input ends, then prints what became of them; runs in a pod, by itself, as `python -c`.

Its argument is a JSON object:

- ``explain``, ``classify``: their URLs;
- ``clients``: kind -> how many clients send requests one after the other: ``explain``, ``stream`` and ``classify`` by
  `ExplainClient`, ``plain`` by a tritonclient that repeats nothing;
- ``n_steps``: gradients of an explanation;
- ``folder``: images that the command `explain` explains, once; 0: it does not run;
- ``concurrency``: of that command.

All images are unlike, or the server would answer them from those that it has kept.
"""

from __future__ import annotations

import io
import json
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
import tritonclient.grpc as triton
from PIL import Image

from explain_client import ExplainClient

SAMPLE = Image.open("/opt/explaining/sample.jpg").convert("RGB").crop((0, 0, 256, 256))
SECONDS = 300
# Of a client after an answer. `rare` waits longer than a server that drains takes for quiet.
PAUSES = {"classify": 0.2, "rare": 8.0}
# As a user of tritonclient writes it; everything else is gRPC's default.
ROUND_ROBIN = [("grpc.service_config", json.dumps({"loadBalancingConfig": [{"round_robin": {}}]}))]
answered: Counter[str] = Counter()
failures: list[str] = []
is_over = threading.Event()


def unlike() -> bytes:
    """The sample with a coloured square somewhere, as a JPEG file."""
    image, (left, top) = SAMPLE.copy(), random.choices(range(192), k=2)
    image.paste(tuple(random.randbytes(3)), (left, top, left + 64, top + 64))
    file = io.BytesIO()
    image.save(file, "JPEG")
    return file.getvalue()


def ask(kind: str, url: str, n_steps: int) -> None:
    """Send requests of a kind until all is over."""
    is_plain = kind in ("plain", "rare")
    client = triton.InferenceServerClient(url, channel_args=ROUND_ROBIN) if is_plain else ExplainClient(url)
    with client:
        while not is_over.is_set():
            try:
                ask_once(kind, client, n_steps)
                answered[kind] += 1
                is_over.wait(PAUSES.get(kind, 0.0))
            except Exception as error:  # whatever it is, the test must hear of it
                status = getattr(error, "status", None)
                status = status() if callable(status) else status
                failures.append(f"{kind} after {time.monotonic() - started:.0f} s: {status} {error!r}")
                time.sleep(0.2)


def ask_once(kind: str, client: ExplainClient | triton.InferenceServerClient, n_steps: int) -> None:
    file = unlike()
    if isinstance(client, triton.InferenceServerClient):
        image = triton.InferInput("IMAGE", [1, 1], "BYTES")
        image.set_data_from_numpy(np.array([[file]], np.object_))
        answer = client.infer("explain", [image], parameters={"n_steps": n_steps}, client_timeout=SECONDS)
        assert answer.as_numpy("SALIENCY").any()
    elif kind == "classify":
        assert client.classify(file)
    elif kind == "stream":
        assert list(client.explain_stream(file, n_steps=n_steps))[-1].is_last
    else:
        assert client.explain(file, n_steps=n_steps).n_steps == n_steps


def explain_folder(url: str, images: int, n_steps: int, concurrency: int) -> dict:
    """Run the command `explain` over a folder: its exit status, its lines, its errors and its seconds."""
    with tempfile.TemporaryDirectory() as folder:
        for number in range(images):
            (Path(folder) / f"{number}.jpg").write_bytes(unlike())
        words = ["explain", folder, "--url", url, "--json", "--out", f"{folder}/out", "--n-steps", str(n_steps)]
        began = time.monotonic()
        run = subprocess.run([*words, "--concurrency", str(concurrency)], capture_output=True, text=True, check=False)
        seconds = time.monotonic() - began
    lines = [json.loads(line) for line in run.stdout.splitlines()]
    return {"status": run.returncode, "lines": lines, "stderr": run.stderr[-2000:], "seconds": seconds}


def main() -> None:
    asked = json.loads(sys.argv[1])
    urls = {kind: asked["classify" if kind == "classify" else "explain"] for kind in asked["clients"]}
    threads = [
        threading.Thread(target=ask, args=(kind, urls[kind], asked["n_steps"]))
        for kind, clients in asked["clients"].items()
        for _ in range(clients)
    ]
    for thread in threads:
        thread.start()
    told = {}
    if images := asked["folder"]:
        told["folder"] = explain_folder(asked["explain"], images, asked["n_steps"], asked["concurrency"])
    sys.stdin.read()
    is_over.set()
    for thread in threads:
        thread.join()
    print(json.dumps({**told, "answered": answered, "failures": failures}))


started = time.monotonic()
if __name__ == "__main__":
    main()
