"""Builds the engine of a classifier, set up for its device."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Sequence
from typing import Any

import torch
from attribution_engine import AttributionEngine
from classifier_network import Network, Rows
from path_density import PathDensity

PRECISIONS = ("tf32", "float16", "ieee")
# Rows a chunk on a CPU, and with Winograd's algorithm: see the tables in README.md beside this folder.
CPU_MAX_ROWS, WINOGRAD_MAX_ROWS = 9, 17
# Options of glibc's malloc, by their numbers in malloc.h. Without them it returns each pass's memory to the system, and
# the next pass takes page faults: 32 mean gradients of an EfficientNet-Lite0 took 75 ms each on 2 cores, and 41 ms with
# the options, at the same peak of memory. There is one arena, since those of further threads keep no freed memory.
MALLOC_OPTIONS = {
    -1: 2**31 - 1,  # M_TRIM_THRESHOLD
    -2: 256 << 20,  # M_TOP_PAD
    -3: 32 << 20,  # M_MMAP_THRESHOLD
    -8: 1,  # M_ARENA_MAX
}
# On a GPU, a pass has at most this many rows and takes at most this share of the free memory.
GPU_MAX_ROWS = 64
GPU_MEMORY_SHARE = 0.25


def build_engine(
    module: Any,
    device: torch.device,
    image_shape: Sequence[int],
    max_rows: int = 0,
    precision: str = "tf32",
    density: PathDensity | None = None,
    winograd: bool = False,
    check: Callable[[Network], object] = lambda network: None,
) -> AttributionEngine:
    """Build the engine that explains a classifier.

    Args:
        module: see ``load_classifier`` and ``Network``.
        device: of the module.
        image_shape: [channels, height, width], to measure the memory of a row.
        max_rows: most rows of a pass, at least 2; 0 chooses by the device.
        precision: ``tf32``, ``float16`` or ``ieee`` on a CUDA device; a CPU always computes in float32.
        density: node density of this network's paths.
        winograd: on a CPU, use Winograd's algorithm for the convolutions that it makes faster; not with ``ieee``.
        check: called with the network before its passes are measured; raises what is wrong with it.

    Raises:
        ValueError: unknown precision, or ``max_rows`` of 1 or below 0.
    """
    if max_rows == 1 or max_rows < 0:
        raise ValueError("max_rows must be 0 or at least 2: a mean gradient between two points takes both")
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, not {precision!r}")
    if device.type == "cpu":
        _keep_freed_memory()
        network, rows = Network(module), max_rows or CPU_MAX_ROWS
        check(network)
        if winograd and precision != "ieee" and _use_winograd(network, image_shape, max_rows or WINOGRAD_MAX_ROWS):
            rows = max_rows or WINOGRAD_MAX_ROWS
        return AttributionEngine(network, max_rows=rows, density=density)
    allow_tf32(precision)
    torch.backends.cudnn.benchmark = True
    network = Network(module, torch.float16 if precision == "float16" else None, float64_stem=precision == "ieee")
    check(network)
    rows = max_rows or _rows_that_fit(network, device, image_shape)
    return AttributionEngine(network, max_rows=rows, capture=True, density=density)


def _use_winograd(network: Network, image_shape: Sequence[int], max_rows: int) -> bool:
    """Let a network's passes use Winograd's algorithm for layers that it makes faster; whether there are some."""
    from winograd_convolution import WinogradConvolutions  # it loads a compiler

    convolutions = WinogradConvolutions()
    with convolutions.measuring():
        network.convolutions = convolutions
        network.row_gradients(Rows.like(network.stem(torch.zeros(1, *image_shape)), torch.float32, max_rows))
    if not convolutions.layers:
        network.convolutions = contextlib.nullcontext()
    _call_libc("malloc_trim", 0)  # what only the timing took
    return bool(convolutions.layers)


def _keep_freed_memory() -> None:
    """Keep the memory that a pass frees in this process, for the next pass; only with glibc."""
    for option, value in MALLOC_OPTIONS.items():
        _call_libc("mallopt", option, value)


def _call_libc(name: str, *arguments: int) -> None:
    """Call a function of the C library that only glibc has."""
    library = ctypes.CDLL(None)
    if hasattr(library, name):
        getattr(library, name)(*arguments)


def allow_tf32(precision: str) -> None:
    """Set, for the whole process, whether float32 products on a CUDA device may use TF32."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision != "ieee"


def _rows_that_fit(network: Network, device: torch.device, image_shape: Sequence[int]) -> int:
    """Rows, a power of two, whose activations take at most ``GPU_MEMORY_SHARE`` of the free memory."""
    features = network.stem(torch.zeros(1, *image_shape, device=device))
    row = Rows.like(features, torch.float32, 1)
    paired = network.has_mean_slopes  # paired rows take more memory
    network.row_gradients(row, paired)  # the first pass also loads libraries
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    network.row_gradients(row, paired)
    row_bytes = max(1, torch.cuda.max_memory_allocated(device) - before)
    fitting = int(GPU_MEMORY_SHARE * torch.cuda.mem_get_info(device)[0] / row_bytes)
    return 1 << max(1, min(fitting, GPU_MAX_ROWS).bit_length() - 1)
