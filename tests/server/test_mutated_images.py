"""Thousands of damaged images, sent to the live server."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from conftest import encode, scene_image
from live_server import infer
from malformed_images import FILES, mutate
from tritonclient.utils import InferenceServerException

from tools.triton.process import SHARED_MEMORY


def stubs_of(server) -> dict[int, str]:
    """Process id -> model of each Python process of the server."""
    models = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            parent = int(process.joinpath("stat").read_text().rpartition(")")[2].split()[1])
            command = process.joinpath("cmdline").read_bytes().split(b"\0")
        except (OSError, ValueError):
            continue  # it ended meanwhile
        if parent == server.process.pid and b"stub" in command[0]:
            models[int(process.name)] = command[1].decode()
    return models


def shared_memory_bytes(server) -> int:
    return sum(region.stat().st_size for region in SHARED_MEMORY.glob(f"{server.region_prefix}*"))


def test_mutated_images_leave_the_live_server_as_it_was(server, triton):
    whole = [encode(scene_image(index)) for index in range(2)]

    def classify(files: list[bytes]) -> np.ndarray:
        return infer(triton, files, model="classify", outputs=("PROBABILITIES",))["PROBABILITIES"]

    def ask(seed: int) -> str:
        file = mutate(FILES[seed % len(FILES)], seed)
        try:
            is_answered = bool(np.isfinite(classify([file])).all())
        except InferenceServerException as refusal:
            return f"{refusal.status()} {refusal.message()}"
        return "answered" if is_answered else "not finite"

    expected = classify(whole)
    with ThreadPoolExecutor(8) as pool:
        classify(whole * 8)  # more images at once than the eight clients send, so that buffers have their final size
        list(pool.map(ask, range(-100, 0)))
        stubs, shared = stubs_of(server), shared_memory_bytes(server)
        outcomes = list(pool.map(ask, range(1000)))
    answered = outcomes.count("answered")
    refusals = [outcome for outcome in outcomes if outcome != "answered"]
    assert all(outcome.startswith("StatusCode.INVALID_ARGUMENT") and "IMAGE" in outcome for outcome in refusals)
    assert min(answered, len(refusals)) > 100  # the corpus has both intact and broken files
    assert stubs
    assert stubs_of(server) == stubs
    assert shared_memory_bytes(server) <= shared
    np.testing.assert_allclose(classify(whole), expected, atol=1e-5)
