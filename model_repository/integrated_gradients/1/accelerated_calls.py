"""Which arguments of Captum's ``attribute`` the engine takes; with any others, Captum's own code runs."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext
from torch.utils._python_dispatch import _get_current_dispatch_mode

# In narrower types Captum rounds points of the path in its own order.
DTYPES = (torch.float32, torch.float64)


def is_plain_context(images: Tensor) -> bool:
    """Whether nothing around the call changes what PyTorch's operators do with ``images``."""
    modes = _get_current_function_mode_stack()
    return (
        not torch.is_inference_mode_enabled()
        and not torch.is_autocast_enabled(images.device.type)
        and not torch.jit.is_tracing()
        and not torch.compiler.is_compiling()
        and _get_current_dispatch_mode() is None
        and torch._C._functorch.peek_interpreter_stack() is None
        and forward_ad._current_level < 0
        and all(isinstance(mode, DeviceContext) and mode.device.type == images.device.type for mode in modes)
    )


def plain_images(images: Tensor, start: Tensor | float) -> tuple[Tensor, Tensor] | None:
    """Images and their baselines without gradients, each [n, ...]; None if Captum may treat them otherwise."""
    if images.dim() < 2 or images.numel() == 0 or not _is_plain(images) or images.dtype not in DTYPES:
        return None
    if isinstance(start, Tensor):
        if not _is_plain(start) or (start.dtype, start.device) != (images.dtype, images.device):
            return None
        if start.shape[1:] != images.shape[1:] or start.dim() != images.dim():
            return None
    elif type(start) in (int, float):
        start = torch.full_like(images[:1], start)
    else:
        return None
    images, start = images.detach(), start.detach()
    if not (images.isfinite().all() and start.isfinite().all()):
        return None
    return images, start.expand_as(images)


def rows_targets(target: object, count: int, classes: int, device: torch.device) -> list[int] | None:
    """The class of each of ``count`` rows; None for targets that are not one class for each."""
    if isinstance(target, Tensor):
        if target.dtype != torch.int64 or (target.numel() > 1 and (target.dim() != 1 or target.device != device)):
            return None
        targets = target.reshape(-1).tolist()
        targets = targets * count if len(targets) == 1 else targets
    elif type(target) is int:
        targets = [target] * count
    elif type(target) is list and all(type(index) is int for index in target):
        targets = target
    else:
        return None
    if len(targets) != count or not all(0 <= index < classes for index in targets):
        return None
    return targets


def _is_plain(tensor: Tensor) -> bool:
    is_known = type(tensor) in (Tensor, torch.nn.Parameter)
    return is_known and tensor.layout == torch.strided and not tensor.is_inference()
