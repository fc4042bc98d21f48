"""Loads the classifier's file, and checks at start-up that it can be served and explained."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from classifier_network import Network, Rows, split_fault
from error_reasons import reason
from load_errors import LoadError
from torch import Tensor

# Largest difference of the second output from the softmax of the first; float16's rounding is 5e-4.
TOLERANCE = 2e-3
ADVICE = "python -m tools.export --weights FILE writes a file that can be served"


class ClassifierError(LoadError):
    """The classifier's file cannot be served or explained; the message names it and says what to do."""


def load_classifier(file: Path, device: torch.device) -> Any:
    """A classifier in evaluation mode, whose weights take no gradients and lie in channels_last.

    Args:
        file: TorchScript, or a program of `torch.export` if its name ends with ``.pt2``.
        device: of its weights.

    Raises:
        ClassifierError: the file is missing or cannot be read.
    """
    if not file.is_file():
        raise ClassifierError(f"{file} is missing; python -m tools.export writes it")
    try:
        if file.suffix == ".pt2":
            module = torch.export.load(file).module().to(device)
        else:
            module = torch.jit.load(str(file), map_location=device).eval()
    except Exception as error:  # the readers raise whatever they stumble over
        kind = "program of torch.export" if file.suffix == ".pt2" else "TorchScript file"
        raise ClassifierError(
            f"{file} is not a {kind} that torch {torch.__version__} can read ({reason(error)}); {ADVICE}"
        ) from None
    for weight in module.parameters():
        weight.requires_grad_(False)
    return torch.nn.Module.to(module, memory_format=torch.channels_last)  # type: ignore[call-overload]


def check_classifier(module: Any, file: Path, image_shape: Sequence[int], device: torch.device) -> int:
    """Run a classifier on two images of noise; returns its number of classes.

    Args:
        module: see ``load_classifier``.
        file: for messages.
        image_shape: [channels, height, width].
        device: of the module.

    Raises:
        ClassifierError: it does not return (logits, probabilities), each [images, classes] and finite.
    """
    shape = " x ".join(map(str, image_shape))
    pixels = torch.randn(2, *image_shape, generator=torch.Generator().manual_seed(0)).to(device)
    try:
        with torch.no_grad():
            outputs = module(pixels)
    except Exception as error:
        raise ClassifierError(
            f"{file} fails on images of {shape}, the shape in the configs ({reason(error)}); {ADVICE}, "
            "and --size sets the shape"
        ) from None
    if not isinstance(outputs, tuple) or len(outputs) != 2 or not all(isinstance(each, Tensor) for each in outputs):
        returned = f"{len(outputs)} outputs" if isinstance(outputs, (tuple, list)) else "one output"
        raise ClassifierError(f"{file} returns {returned} instead of (logits, probabilities); {ADVICE}")
    logits, probabilities = outputs
    if logits.dim() != 2 or len(logits) != 2 or logits.shape[1] < 2 or probabilities.shape != logits.shape:
        raise ClassifierError(
            f"{file} returns {list(logits.shape)} and {list(probabilities.shape)} for 2 images instead of logits and "
            f"probabilities [2, classes]; {ADVICE}"
        )
    if not logits.isfinite().all():
        raise ClassifierError(f"{file} answers an image with logits that are not finite; export other weights")
    if not (probabilities - logits.softmax(dim=1)).abs().max() <= TOLERANCE:
        raise ClassifierError(f"the second output of {file} is not the softmax of its first; {ADVICE}")
    return int(logits.shape[1])


def check_gradients(network: Network, file: Path, image_shape: Sequence[int], device: torch.device) -> None:
    """Take the gradients of two rows, at points and over the segment between them.

    Args:
        network: of the engine.
        file: for messages.
        image_shape: [channels, height, width].
        device: of the network.

    Raises:
        ClassifierError: they cannot be taken, are not finite, or are zero everywhere; or the stem is not affine.
    """
    images = torch.randn(2, *image_shape, generator=torch.Generator().manual_seed(0)).to(device)
    try:
        fault = split_fault(network.module, images) if network.hoists else ""
        features = network.stem(images)
        rows = Rows.like(features[:1], torch.float32, 2)
        rows.features.copy_(features)
        rows.signs[:, 0] = 1.0
        rows.paired[0] = network.has_mean_slopes
        gradients = [network.row_gradients(rows, any_paired) for any_paired in {False, network.has_mean_slopes}]
    except Exception as error:
        raise ClassifierError(f"{file} has no gradients ({reason(error)}); {ADVICE}") from None
    if fault:
        raise ClassifierError(f"{file} has a stem and a tail that cannot be used: {fault}; {ADVICE}")
    are_finite = all(each.isfinite().all() for each in gradients)
    if not are_finite or not any(each.any() for each in gradients):
        what = "zero everywhere" if are_finite else "not finite"
        raise ClassifierError(
            f"the gradients of {file} are {what}, so there is nothing to explain; export other weights"
        )
