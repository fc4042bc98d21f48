"""Requests as nobody would write them: what comes from strangers is answered or refused, and never more than that.

A crash would end this process; a hang or a slow case fails Hypothesis' deadline of a second.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import string
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import numpy as np
import pytest
from attribution_parameters import AttributionParameters, Limits, ParameterError, parse_parameters
from conftest import encode, scene_image
from heatmap_parameters import HeatmapParameters
from heatmap_parameters import ParameterError as HeatmapParameterError
from heatmap_parameters import parse_parameters as parse_heatmap_parameters
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from image_decoding import ImageLimits, load_pixels, open_image
from image_structure import ImageError
from stream_levels import plan_stream
from test_serving import infer
from tritonclient.utils import InferenceServerException

from tools.triton.process import SHARED_MEMORY

T = TypeVar("T")
QUICK, THOROUGH = 2_000, 50_000
# Memory that may be resident after thousands of cases and was not after the first ones: heaps fragment. Six times
# 20,000 mutated images added 20, 10, 1, 0, 4 and 0 MB.
GROWTH_MB = 30
LIMITS = ImageLimits(max_bytes=200_000, max_pixels=1_000_000)
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]

# Everything that a request parameter can be: Triton takes booleans, 64-bit integers, doubles and strings.
NUMBERS = st.one_of(
    st.integers(-(2**63), 2**63 - 1),
    st.integers(-2, 1100),
    st.sampled_from([0, 1, 2, 3, 50]),
    st.floats(),
    st.floats(0, 1),
)
WORDS = ["gausslegendre", "riemann_middle", "calibrated", "blur", "noise", "probability", "1e400", "nan", "٣"]
VALUES = st.one_of(
    st.booleans(),
    NUMBERS,
    NUMBERS.map(str),
    st.text(max_size=50),
    st.text(string.digits + ".-+e_ ", max_size=12),
    st.sampled_from(WORDS),
)
KNOWN_NAMES = [*AttributionParameters.model_fields, *HeatmapParameters.model_fields, "triton_x"]
NAMES = st.one_of(st.sampled_from(KNOWN_NAMES), st.text(max_size=20))
PARAMETERS = st.dictionaries(NAMES, VALUES, max_size=6)


def resident_mb() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def fuzz(strategy: st.SearchStrategy, check: Callable, cases: int) -> None:
    """``check`` so many examples, each within a second."""
    checks = list(HealthCheck)
    # The same examples each time: a red run can be looked into, and nobody else's change turns red.
    options = {"max_examples": cases, "deadline": 1000, "database": None, "derandomize": True}
    settings(suppress_health_check=checks, **options)(given(strategy)(check))()


def assert_no_growth(check: Callable[[int], None], cases: int) -> None:
    """``check`` so many seeds and see that memory does not grow with their number. (Hypothesis' own would.)

    In a process of its own: one that had run the other slow tests grew by 224 MB, where a fresh one does not grow.
    """
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        assert pool.submit(growth_mb, check, cases).result() < GROWTH_MB


def growth_mb(check: Callable[[int], None], cases: int) -> float:
    """What so many checks add to the memory of a process that has done a few."""
    warnings.filterwarnings("ignore", module=r"PIL\.")  # as `preprocess` does
    for seed in range(2000):
        check(seed)
    before = resident_mb()
    for seed in range(cases):
        check(seed)
    return resident_mb() - before


def answer_or_refusal(answer: Callable[[], T], refusal: type[Exception]) -> T | str:
    """What a function returns, or the message with which it refuses to, which is one of bounded length."""
    try:
        return answer()
    except refusal as error:
        message = str(error)
    assert 0 < len(message) < 500
    return message


def check_parameters(sent: dict) -> None:
    """Each parser gives what is in the contract's bounds, or a refusal."""

    def parse() -> AttributionParameters:
        parameters = parse_parameters(sent, Limits())
        parameters.check_cost(1, Limits())
        return parameters

    plan_stream(sent)
    found = answer_or_refusal(parse, ParameterError)
    if not isinstance(found, str):
        assert 1 <= found.n_steps * found.nt_samples <= 5000
        assert found.tolerance is None or 0.001 <= found.tolerance <= 0.5
        assert found.deadline_ms is None or 1 <= found.deadline_ms <= 60_000
        assert 0 <= found.stdevs <= 10
        assert 0 <= found.part < found.parts <= found.n_steps
    drawn = answer_or_refusal(lambda: parse_heatmap_parameters(sent), HeatmapParameterError)
    assert isinstance(drawn, str) or 50 <= drawn.clip_percentile <= 100


# Lengths and sizes that parsers do not expect.
NUMBER_BYTES = (b"\0\0\0\0", b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\0\x01")


def mutate(file: bytes, seed: int) -> bytes:
    """A file with a few bytes changed, parts left out, doubled or taken from elsewhere in it."""
    generator = random.Random(seed)
    content = bytearray(file)
    for _ in range(generator.randint(1, 6)):
        at = generator.randrange(len(content) or 1)
        length = generator.choice((1, 2, 4, generator.randint(1, 400)))
        match generator.randrange(7):
            case 0:
                content[at : at + 1] = bytes([generator.randrange(256)])
            case 1:
                content[at : at + length] = generator.randbytes(length)
            case 2:
                del content[at : at + length]
            case 3:
                content[at:at] = content[at : at + length]
            case 4:
                content[at : at + 4] = generator.choice(
                    (b"\0\0\0\0", b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\0\x01")
                )
            case 6:  # what takes time is often what comes often
                content[at:at] = content[at : at + length] * generator.randint(2, 300)
            case 5:  # most that is of interest is at the beginning
                content[at % 64 : at % 64 + 1] = bytes([generator.randrange(256)])
    return bytes(content)


def small_files() -> list[bytes]:
    """One small image in each format and in some of its kinds."""
    scene = scene_image(0, 48)
    exif = scene.getexif()
    exif[0x0112] = 6
    exif[0x010E] = "a description"
    return [
        encode(scene, "JPEG", exif=exif, quality=60),
        encode(scene, "JPEG", progressive=True, quality=60),
        encode(scene.convert("CMYK"), "JPEG", quality=60),
        encode(scene, "PNG", exif=exif),
        encode(scene.convert("P"), "PNG", transparency=bytes(range(256))),
        encode(scene.convert("I;16") if scene.mode == "L" else scene.convert("L").convert("I;16"), "PNG"),
        encode(scene, "PNG", save_all=True, append_images=[scene.rotate(90)]),
        encode(scene, "WEBP", quality=60, exif=exif),
        encode(scene, "WEBP", lossless=True),
        encode(scene, "WEBP", save_all=True, append_images=[scene.rotate(90)]),
    ]


FILES = small_files()
IMAGES = st.one_of(
    st.binary(max_size=500),
    st.builds(lambda file, end: file[:end], st.sampled_from(FILES), st.integers(0, 3000)),
    st.builds(mutate, st.sampled_from(FILES), st.integers(0, 2**32)),
    st.builds(mutate, st.sampled_from(FILES), st.integers(0, 2**32)),
)


def check_image(file: bytes) -> None:
    """It decodes to pixels or is refused in a sentence."""
    pixels = answer_or_refusal(lambda: load_pixels(open_image(file, LIMITS), MEAN, STD, LIMITS), ImageError)
    if not isinstance(pixels, str):
        assert pixels.shape == (3, 224, 224)
        assert pixels.isfinite().all()


def check_mutated_image(seed: int) -> None:
    check_image(mutate(FILES[seed % len(FILES)], seed))


def check_random_parameters(seed: int) -> None:
    generator = random.Random(seed)
    values = [*WORDS, *range(-2, 60, 7), 0.05, 1e308, True, "x" * seed]
    check_parameters({name: generator.choice(values) for name in generator.sample(KNOWN_NAMES, 4)})


@pytest.mark.parametrize("cases", [QUICK, pytest.param(THOROUGH, marks=pytest.mark.slow)])
def test_any_parameters_are_parsed_or_refused(cases):
    fuzz(PARAMETERS, check_parameters, cases)
    assert_no_growth(check_random_parameters, cases)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("cases", [QUICK, pytest.param(THOROUGH, marks=pytest.mark.slow)])
def test_any_bytes_are_decoded_or_refused(cases):
    fuzz(IMAGES, check_image, cases)
    assert_no_growth(check_mutated_image, cases)


def stubs_of(server) -> dict[int, str]:
    """Process id -> model of each Python process of the server."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            parent = int(process.joinpath("stat").read_text().rpartition(")")[2].split()[1])
            command = process.joinpath("cmdline").read_bytes().split(b"\0")
        except (OSError, ValueError):
            continue  # it ended meanwhile
        if parent == server.process.pid and b"stub" in command[0]:
            found[int(process.name)] = command[1].decode()
    return found


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
        classify(whole * 8)  # more at once than eight clients ask: buffers of that size are there from now on
        list(pool.map(ask, range(-200, 0)))
        stubs, shared = stubs_of(server), shared_memory_bytes(server)
        said = list(pool.map(ask, range(2000)))
    answered = said.count("answered")
    refusals = [each for each in said if each != "answered"]
    assert all(each.startswith("StatusCode.INVALID_ARGUMENT") and "IMAGE" in each for each in refusals)
    assert min(answered, len(refusals)) > 200  # the corpus is neither all sound nor all broken
    assert stubs
    assert stubs_of(server) == stubs
    assert shared_memory_bytes(server) <= shared
    np.testing.assert_allclose(classify(whole), expected, atol=1e-5)
