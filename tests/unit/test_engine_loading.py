"""A TorchScript file becomes an engine for its device.

Not tested here: the rows that fit a GPU's memory, which only a CUDA device can tell.
"""

from __future__ import annotations

import ctypes
import resource
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import winograd_convolution
from attribution_engine import AttributionEngine
from attribution_job import Job
from classifier_loading import ClassifierError, check_gradients, load_classifier
from conftest import relative_distance
from engine_loading import CPU_MAX_ROWS, MALLOC_OPTIONS, PRECISIONS, WINOGRAD_MAX_ROWS, allow_tf32, build_engine
from path_density import PathDensity
from torch import nn

CPU = torch.device("cpu")
SHAPE = (3, 8, 8)


@pytest.fixture(scope="module")
def module() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 6 * 6, 5))


@pytest.fixture(scope="module")
def file(module: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "model.pt"
    torch.jit.script(module).save(str(path))
    return path


def loaded_module(engine: AttributionEngine) -> torch.jit.ScriptModule:
    module = engine.network.module
    assert isinstance(module, torch.jit.ScriptModule)
    return module


@pytest.fixture
def tf32_flags() -> Iterator[None]:
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def test_the_engine_has_the_files_network(module: nn.Module, file: Path) -> None:
    images = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = module(images)
        logits = build_engine(load_classifier(file, CPU), CPU, SHAPE).network(images)
    # The same float32 sums, perhaps in another order, because the weights' memory layout differs.
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-6)


def test_the_engines_weights_take_no_gradients_and_lie_channels_last(file: Path) -> None:
    network = loaded_module(build_engine(load_classifier(file, CPU), CPU, SHAPE))
    weights = list(network.parameters())
    assert len(weights) == 4
    assert not any(weight.requires_grad for weight in weights)
    assert all(weight.is_contiguous(memory_format=torch.channels_last) for weight in weights if weight.dim() == 4)
    assert not network.training


@pytest.mark.parametrize(("max_rows", "expected"), [(0, CPU_MAX_ROWS), (2, 2), (33, 33)])
def test_rows_of_a_pass_are_those_asked_for_or_chosen_by_the_device(file: Path, max_rows: int, expected: int) -> None:
    assert build_engine(load_classifier(file, CPU), CPU, SHAPE, max_rows=max_rows).max_rows == expected


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_cpu_computes_in_float32_whatever_the_precision(file: Path, precision: str) -> None:
    engine = build_engine(load_classifier(file, CPU), CPU, SHAPE, precision=precision)
    assert engine.network.precision is None
    assert {weight.dtype for weight in loaded_module(engine).parameters()} == {torch.float32}


def test_the_engine_has_the_density_that_it_is_given(file: Path) -> None:
    density = PathDensity({}, {})
    assert build_engine(load_classifier(file, CPU), CPU, SHAPE, density=density).density is density
    assert build_engine(load_classifier(file, CPU), CPU, SHAPE).density is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_rows": 1}, "max_rows must be 0 or at least 2"),
        ({"precision": "float32"}, "precision must be one of tf32, float16, ieee, not 'float32'"),
        ({"precision": ""}, "precision must be one of tf32, float16, ieee, not ''"),
    ],
    ids=str,
)
def test_wrong_settings_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_engine(nn.Linear(3, 2), CPU, SHAPE, **options)


@pytest.mark.usefixtures("tf32_flags")
@pytest.mark.parametrize(("precision", "allowed"), [("tf32", True), ("float16", True), ("ieee", False)])
def test_only_ieee_forbids_tf32(precision: str, allowed: bool) -> None:
    for before in (True, False):
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = before
        allow_tf32(precision)
        assert torch.backends.cuda.matmul.allow_tf32 is allowed
        assert torch.backends.cudnn.allow_tf32 is allowed


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="this C library is not glibc")
def test_what_a_pass_frees_stays_with_the_process_for_the_next(file: Path) -> None:
    build_engine(load_classifier(file, CPU), CPU, SHAPE)

    def new_pages() -> int:
        """Page faults of an allocation of 64 MiB, which is freed on return."""
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        activations = [torch.ones(4 << 20) for _ in range(4)]
        assert len(activations) == 4
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    # Memory that was returned to the system would fault 16,384 pages of 4 KiB, or 32 huge ones, each time. The first
    # allocations fault some, until freed pieces fit.
    assert min(new_pages() for _ in range(6)) < 16


def test_options_are_those_of_glibcs_malloc_h() -> None:
    """mallopt does not report unknown ones."""
    trim_threshold, top_pad, mmap_threshold, arena_max = -1, -2, -3, -8
    assert set(MALLOC_OPTIONS) == {trim_threshold, top_pad, mmap_threshold, arena_max}


def test_another_c_library_is_left_alone(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ctypes.CDLL", lambda name: object())
    assert build_engine(load_classifier(file, CPU), CPU, SHAPE).max_rows == CPU_MAX_ROWS


def test_negative_rows_are_refused(file: Path) -> None:
    with pytest.raises(ValueError, match="max_rows must be 0 or at least 2"):
        build_engine(load_classifier(file, CPU), CPU, SHAPE, max_rows=-3)


def convolutional(kernels: int) -> nn.Module:
    """A network whose second and third layer Winograd's algorithm serves if they have whole runs of channels."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, kernels, 3, padding=1), nn.ReLU()]
    layers += [nn.Conv2d(kernels, kernels, 3, padding=1, bias=False), nn.ReLU()]
    layers += [
        nn.Conv2d(kernels, kernels, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(kernels * SHAPE[1] * SHAPE[2], 5),
    ]
    network: Any = nn.Sequential(*layers)  # its stub does not know this argument
    return network.to(memory_format=torch.channels_last)


def test_winograd_serves_the_layers_that_it_can(monkeypatch):
    monkeypatch.setattr(winograd_convolution, "LEAST_GAIN", 0)
    network = convolutional(32)
    engine, direct = (build_engine(network, CPU, SHAPE, winograd=chosen) for chosen in (True, False))
    assert engine.network.convolutions.layers == 4
    assert (engine.max_rows, direct.max_rows) == (WINOGRAD_MAX_ROWS, CPU_MAX_ROWS)
    image = torch.rand(SHAPE)
    found, expected = (
        each.explain([Job(image, torch.zeros(SHAPE), 1, 20)])[0].attributions for each in (engine, direct)
    )
    assert not torch.equal(found, expected)
    assert relative_distance(found, expected) <= 1e-4


@pytest.mark.parametrize(("kernels", "options"), [(24, {}), (32, {"precision": "ieee"})], ids=["no layer fits", "ieee"])
def test_without_winograd_convolutions_are_pytorchs(monkeypatch, kernels, options):
    monkeypatch.setattr(winograd_convolution, "LEAST_GAIN", 0)
    engine = build_engine(convolutional(kernels), CPU, SHAPE, winograd=True, **options)
    assert not hasattr(engine.network.convolutions, "layers")
    assert engine.max_rows == CPU_MAX_ROWS
    assert build_engine(convolutional(kernels), CPU, SHAPE, 5, winograd=True, **options).max_rows == 5


@pytest.mark.parametrize("module", [lambda images: images.detach(), lambda images: images.mean()])
@pytest.mark.parametrize("winograd", [False, True])
def test_a_network_that_cannot_be_explained_is_refused_by_the_check(module, winograd):
    """Its sentence comes before whatever measuring such a network raises."""
    check = partial(check_gradients, file=Path("model.pt"), image_shape=SHAPE, device=CPU)
    with pytest.raises(ClassifierError, match=r"model\.pt has no gradients"):
        build_engine(module, CPU, SHAPE, winograd=winograd, check=check)
