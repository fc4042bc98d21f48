"""The shapes checkpoint on disk: int8 weights with one float32 scale per output channel, everything else float32.

A ResNet-18 is 45 MB in float32 and 11 MB like this, small enough for the repository. Convolution and linear
weights are quantised symmetrically (``weight ~ scale * int8``); batch-norm and bias tensors stay float32.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

DEMO_CHECKPOINT = Path(__file__).with_name("shapes_resnet18.safetensors")
# Its calibration, by python -m tools.calibrate --network shapes --out THIS_FILE
DEMO_CALIBRATION = Path(__file__).with_name("path_density.json")
_SCALE_SUFFIX = ".scale"


def save_quantized(path: Path, state: dict[str, torch.Tensor], classes: tuple[str, ...], facts: dict) -> None:
    """Quantise a torchvision state dict and write it with its class names and training facts."""
    tensors = {}
    for name, tensor in state.items():
        tensor = tensor.detach().cpu().contiguous()
        if name.endswith("num_batches_tracked"):
            continue
        if tensor.dim() >= 2:
            scale = tensor.flatten(1).abs().amax(dim=1).clamp_min(1e-12) / 127
            tensors[name + _SCALE_SUFFIX] = scale
            shape = (-1,) + (1,) * (tensor.dim() - 1)
            tensor = (tensor / scale.view(shape)).round().to(torch.int8)
        tensors[name] = tensor.contiguous()
    metadata = {"classes": json.dumps(classes), "training": json.dumps(facts)}
    save_file(tensors, path, metadata=metadata)


def load_dequantized(path: Path) -> tuple[dict[str, torch.Tensor], tuple[str, ...]]:
    """Read a checkpoint back as (float32 state dict for torchvision, class names)."""
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, a file handle is no dict
        classes = tuple(json.loads(file.metadata()["classes"]))
    state = {}
    for name, tensor in tensors.items():
        if name.endswith(_SCALE_SUFFIX):
            continue
        if tensor.dtype == torch.int8:
            scale = tensors[name + _SCALE_SUFFIX].view((-1,) + (1,) * (tensor.dim() - 1))
            tensor = tensor.float() * scale
        state[name] = tensor
    return state, classes
