"""Requests that no client would write are answered or refused, with nothing worse.

A crash would end this process; a hang or a slow case fails Hypothesis' deadline of a second.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import string
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import TypeVar

import pytest
from attribution_parameters import AttributionParameters, Limits, parse_parameters
from classifier_files import Preprocessing
from heatmap_parameters import HeatmapParameters
from heatmap_parameters import parse_parameters as parse_heatmap_parameters
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from image_decoding import ImageLimits, load_pixels, open_image
from image_structure import ImageError
from malformed_images import FILES, mutate
from request_parameters import ParameterError
from stream_levels import plan_stream

T = TypeVar("T")
QUICK, THOROUGH = 500, 50_000
# Resident memory may grow by this much over thousands of cases, because heaps fragment. Six times
# 20,000 mutated images added 20, 10, 1, 0, 4 and 0 MB.
GROWTH_MB = 30
LIMITS = ImageLimits(max_bytes=200_000, max_pixels=1_000_000)
PREPROCESSING = Preprocessing()

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
    """Run ``check`` on generated examples, each within a second."""
    checks = list(HealthCheck)
    # The same examples each time: failures can be reproduced, and do not appear in unrelated changes.
    once = settings(suppress_health_check=checks, max_examples=cases, deadline=1000, database=None, derandomize=True)
    once(given(strategy)(check))()


def assert_no_growth(check: Callable[[int], None], cases: int) -> None:
    """``check`` so many seeds and see that memory does not grow with their number. (Hypothesis' own would.)

    In a process of its own: one that had run the other slow tests grew by 224 MB, where a fresh one does not grow.
    """
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        assert pool.submit(growth_mb, check, cases).result() < GROWTH_MB


def growth_mb(check: Callable[[int], None], cases: int) -> float:
    """What so many checks add to the memory of a process that has done a few."""
    warnings.filterwarnings("ignore", module=r"PIL\.")  # as `preprocess` does
    for seed in range(min(2000, cases)):
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
        parameters.check_cost(1, 1, Limits())
        return parameters

    plan_stream(sent)
    parameters = answer_or_refusal(parse, ParameterError)
    if not isinstance(parameters, str):
        assert 1 <= parameters.n_steps * parameters.nt_samples <= 5000
        assert parameters.tolerance is None or 0.001 <= parameters.tolerance <= 0.5
        assert parameters.deadline_ms is None or 1 <= parameters.deadline_ms <= 60_000
        assert 0 <= parameters.stdevs <= 10
        assert 0 <= parameters.part < parameters.parts <= parameters.n_steps
    drawn = answer_or_refusal(lambda: parse_heatmap_parameters(sent), ParameterError)
    assert isinstance(drawn, str) or 50 <= drawn.clip_percentile <= 100


IMAGES = st.one_of(
    st.binary(max_size=500),
    st.builds(lambda file, end: file[:end], st.sampled_from(FILES), st.integers(0, 3000)),
    st.builds(mutate, st.sampled_from(FILES), st.integers(0, 2**32)),
    st.builds(mutate, st.sampled_from(FILES), st.integers(0, 2**32)),
)


def check_image(file: bytes) -> None:
    """It decodes to pixels or is refused in a sentence."""
    pixels = answer_or_refusal(
        lambda: load_pixels(open_image(file, PREPROCESSING, LIMITS), PREPROCESSING, LIMITS), ImageError
    )
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
