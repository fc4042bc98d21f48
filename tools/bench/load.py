"""Load for benchmarks: closed-loop clients, and the requests that they send."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import tritonclient.grpc
from PIL import Image

from tools.evaluation.image_files import encode
from tools.shapes.dataset import draw_view

IMAGES = 8
Ask = Callable[[int], int]  # sends a request about an image, by its number; returns bytes of request and response


def jpeg_images() -> list[bytes]:
    """JPEG files of held-out scenes, 224 x 224 pixels."""
    return [encode(_image(index), "JPEG", quality=90) for index in range(IMAGES)]


def _image(index: int) -> Image.Image:
    return Image.fromarray(draw_view("test", index).image)


def image_tensor(*images: bytes) -> tritonclient.grpc.InferInput:
    """The input tensor of one request with these image files."""
    tensor = tritonclient.grpc.InferInput("IMAGE", [len(images), 1], "BYTES")
    tensor.set_data_from_numpy(np.array(images, np.object_)[:, None])
    return tensor


def triton_asker(
    url: str, model: str, images: list[bytes], outputs: tuple[str, ...], parameters: dict[str, Any]
) -> Ask:
    client = tritonclient.grpc.InferenceServerClient(url)
    inputs = [image_tensor(image) for image in images]
    wanted = [tritonclient.grpc.InferRequestedOutput(name) for name in outputs]

    def ask(number: int) -> int:
        index = number % len(images)
        result = client.infer(model, [inputs[index]], outputs=wanted, parameters=parameters)
        for name in outputs:
            result.as_numpy(name)
        return len(images[index]) + result.get_response().ByteSize()

    return ask


@dataclass
class Block:
    """Measurements of closed-loop clients: seconds and bytes of each request, and seconds of all."""

    seconds: list[float] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    elapsed: float = 0.0


def run_block(make_asker: Callable[[], Ask], clients: int, requests: int, most_seconds: float = float("inf")) -> Block:
    """Send ``requests`` requests from clients in a closed loop; fewer if ``most_seconds`` are over."""
    block, lock = Block(), threading.Lock()
    numbers = iter(range(requests))
    failures: list[Exception] = []

    def work() -> None:
        ask = make_asker()
        try:
            while True:
                with lock:
                    number = next(numbers, None)
                if number is None or time.perf_counter() > until:
                    return
                started = time.perf_counter()
                size = ask(number)
                seconds = time.perf_counter() - started
                with lock:
                    block.seconds.append(seconds)
                    block.sizes.append(size)
        except Exception as failure:
            failures.append(failure)

    threads = [threading.Thread(target=work) for _ in range(clients)]
    started = time.perf_counter()
    until = started + most_seconds
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    block.elapsed = time.perf_counter() - started
    if failures:
        raise failures[0]
    return block


@contextmanager
def saturated(make_asker: Callable[[], Ask], clients: int) -> Iterator[None]:
    """Keep clients sending requests in a closed loop, without a pause."""
    is_over = threading.Event()
    failures: list[Exception] = []

    def work() -> None:
        try:
            ask, number = make_asker(), 0
            while not is_over.is_set():
                ask(number)
                number += 1
        except Exception as failure:
            failures.append(failure)

    threads = [threading.Thread(target=work) for _ in range(clients)]
    for thread in threads:
        thread.start()
    time.sleep(3)  # until all of them wait for gradients
    try:
        yield
    finally:
        is_over.set()
        for thread in threads:
            thread.join()
        if failures:
            raise failures[0]
