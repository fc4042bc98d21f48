"""Architectures by name, and their networks with given weights."""

from __future__ import annotations

import importlib
import re
from collections import OrderedDict
from types import ModuleType
from typing import Any

import torch
import torchvision
from error_reasons import in_brief, reason
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tools.classifiers.messages import suggestion
from tools.classifiers.source import ExportError

TIMM = "timm:"
KINDS = "a name of torchvision, timm:NAME, or package.module:function"
# Wrappers of networks put these before the name of each weight.
PREFIXES = ("module.", "_orig_mod.", "model.", "backbone.", "network.", "net.")
# Classifiers that torchvision trains with heads which only help the training.
AUXILIARY_HEADS = {"googlenet": ("aux1.", "aux2."), "inception_v3": ("AuxLogits.",)}
# Least share of names that a network of torchvision has in common with the first of its module: measured, 0.36.
FAMILY_LIKENESS = 0.3
# What torchvision's DenseNets called their layers when their weights were published.
_OLD_DENSENET = re.compile(r"^(.*denselayer\d+\.(?:norm|relu|conv))\.([12]\.\w+)$")


class _ShapesOnly(TorchFunctionMode):
    """New tensors have shapes only. ``torch.device("meta")`` would break networks that compute their shapes."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in (torch.empty, torch.ones, torch.zeros):
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


def is_torchvision(architecture: str) -> bool:
    """Whether torchvision has a classifier of this name."""
    return architecture in _torchvision_names()


def check_name(architecture: str) -> None:
    """Refuse a name that no architecture can have, before anything is read or fetched.

    Raises:
        ExportError: torchvision or timm has no such network, or timm is not installed.
    """
    if architecture.startswith(TIMM):
        name = architecture.removeprefix(TIMM)
        model, _, tag = name.partition(".")
        timm = timm_module()
        if not timm.is_model(model):
            raise ExportError(f"timm has no {name!r}{suggestion(model, timm.list_models())}")
        tags = timm.list_pretrained(f"{model}.*")
        if tag and name not in tags:
            raise ExportError(f"timm has no {name!r}{suggestion(name, tags) or ': leave the tag out'}")
    elif ":" not in architecture and not is_torchvision(architecture):
        hint = suggestion(architecture, _torchvision_names()) or f": give {KINDS}"
        raise ExportError(f"torchvision.models has no {architecture!r}{hint}")


def build(architecture: str, **timm_options: Any) -> nn.Module:
    """The network of an architecture, in evaluation mode.

    Args:
        architecture: see ``KINDS``. A function is called without arguments; a line is printed that says so.
        timm_options: for ``timm.create_model``.

    Raises:
        ExportError: there is no such network, or it cannot be built.
    """
    check_name(architecture)
    if architecture.startswith(TIMM):
        return timm_module().create_model(architecture.removeprefix(TIMM), **timm_options).eval()
    if ":" in architecture:
        return _from_function(architecture).float().eval()
    return _from_torchvision(architecture).eval()


def build_with(architecture: str, tensors: dict[str, Tensor], name: str) -> nn.Module:
    """The network of an architecture with the weights of a state dict, in evaluation mode.

    The network gets as many classes and input channels (1 or 3) as the weights have. Prefixes that wrappers put before
    all names are ignored.

    Args:
        architecture: see ``build``.
        tensors: the state dict.
        name: of the weights, for messages.

    Raises:
        ExportError: see ``build``; or the weights are those of another network.
    """
    network = build(architecture)
    state = _of_network(architecture, network, tensors)
    assumed_head = _adapt(network, state)
    try:
        network.load_state_dict(state)
    except (RuntimeError, ValueError) as error:
        misfit = _describe_misfit(network, state) or reason(error)
        unknown_head = _unknown_head(network, state)
        matching = None if unknown_head else _matching(tensors)
        if unknown_head:
            advice = (
                f"what its own head {unknown_head} computes is not in the file: give --arch package.module:function, a "
                "function that builds the network"
            )
        elif matching and matching != architecture:
            advice = f"its keys are those of {matching}: give --arch {matching}"
        else:
            advice = f"give the --arch it was saved from: {KINDS}"
        raise ExportError(f"{name} does not hold the weights of a {architecture}: {misfit}; {advice}") from None
    if assumed_head:
        print(f"{name} has a linear head {assumed_head}; layers without weights before it are dropout", flush=True)
    if getattr(network, "transform_input", False):
        print(f"{name} is taken to expect torchvision's transform_input, as its own {architecture} does", flush=True)
    return network


def timm_module() -> ModuleType:
    """timm, which need not be installed.

    Raises:
        ExportError: it is not.
    """
    try:
        return importlib.import_module("timm")
    except ImportError:
        raise ExportError("timm is not installed: run pip install timm, or give an --arch of torchvision") from None


def input_channels(network: nn.Module) -> int | None:
    """Channels of the first convolution that an eager network has; None if there is none."""
    return next((layer.in_channels for layer in network.modules() if isinstance(layer, nn.Conv2d)), None)


def _torchvision_names() -> list[str]:
    return torchvision.models.list_models(module=torchvision.models)


def _from_torchvision(name: str) -> nn.Module:
    # torchvision's own weights of networks with auxiliary heads need transform_input; so do those fine-tuned from them.
    options = {"aux_logits": False, "init_weights": False, "transform_input": True} if name in AUXILIARY_HEADS else {}
    return torchvision.models.get_model(name, weights=None, **options)


def _from_function(architecture: str) -> nn.Module:
    module_name, _, function_name = architecture.partition(":")
    print(f"--arch {architecture} runs that function's code, which must be yours or trusted", flush=True)
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # a person's code may raise anything
        is_missing = isinstance(error, ModuleNotFoundError) and module_name.startswith(error.name or "-")
        hint = "set PYTHONPATH to the folder that has it" if is_missing else "correct that module"
        raise ExportError(f"--arch {architecture} cannot be imported ({reason(error)}): {hint}") from None
    function = getattr(module, function_name, None)
    if not callable(function):
        names = [name for name, value in vars(module).items() if callable(value)]
        raise ExportError(f"{module_name} has no function {function_name!r}{suggestion(function_name, names)}")
    try:
        network = function()
    except Exception as error:
        raise ExportError(
            f"--arch {architecture} failed with {type(error).__name__} ({reason(error)}): it must return a network "
            "when it is called without arguments"
        ) from None
    if not isinstance(network, nn.Module):
        raise ExportError(
            f"--arch {architecture} returned no torch.nn.Module but an object of type {type(network).__name__}"
        )
    return network


def _of_network(architecture: str, network: nn.Module, tensors: dict[str, Tensor]) -> OrderedDict[str, Tensor]:
    """The weights under the network's own names."""
    own = network.state_dict().keys()
    # torch.optim.swa_utils counts its averages beside the weights.
    state = {name: tensor for name, tensor in tensors.items() if name != "n_averaged"}
    while state and own.isdisjoint(state):
        prefix = next((prefix for prefix in PREFIXES if all(name.startswith(prefix) for name in state)), None)
        if prefix is None:
            break
        state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    if architecture.startswith("densenet"):
        state = {_OLD_DENSENET.sub(r"\1\2", name): tensor for name, tensor in state.items()}
    left_out = AUXILIARY_HEADS.get(architecture, ())
    ordered = OrderedDict((name, tensor) for name, tensor in state.items() if not name.startswith(left_out))
    # torchvision's MNASNet asks for the version of its layout, which not every format keeps.
    ordered._metadata = {"": {"version": getattr(network, "_version", 1)}}  # type: ignore[attr-defined]
    return ordered


def _adapt(network: nn.Module, state: dict[str, Tensor]) -> str | None:
    """Give a network the input channels and the head that the weights have. Changes ``network``.

    Returns:
        The name of a head that replaced the architecture's own, of which only the weights are known.
    """
    layers = {name: layer for name, layer in network.named_modules() if isinstance(layer, (nn.Conv2d, nn.Linear))}
    if not layers:
        return None
    name, first = next(((n, layer) for n, layer in layers.items() if isinstance(layer, nn.Conv2d)), ("", None))
    weight = state.get(f"{name}.weight")
    if first is not None and first.groups == 1 and weight is not None and weight.dim() == 4:
        channels = weight.shape[1]
        if channels in (1, 3) and channels != first.in_channels:
            first.in_channels = channels
            first.weight = nn.Parameter(torch.empty(first.out_channels, channels, *first.kernel_size))
            if hasattr(network, "transform_input"):
                setattr(network, "transform_input", channels == 3)  # noqa: B010, a type checker sees modules only
    name, head = list(layers.items())[-1]
    weight = state.get(f"{name}.weight")
    if weight is None:
        return _replace_head(network, name, state)
    # Some networks have several heads of the same classes, whose answers they average.
    classes, before = weight.shape[0], head.weight.shape[0]
    for each, layer in layers.items():
        weight = state.get(f"{each}.weight")
        if weight is not None and layer.weight.shape[0] == before and weight.shape[0] == classes:
            _resize_outputs(
                layer, classes, has_bias=f"{each}.bias" in state if layer is head else layer.bias is not None
            )
    return None


def _resize_outputs(layer: nn.Conv2d | nn.Linear, outputs: int, has_bias: bool) -> None:
    if isinstance(layer, nn.Conv2d):
        layer.out_channels = outputs
    else:
        layer.out_features = outputs
    layer.weight = nn.Parameter(torch.empty(outputs, *layer.weight.shape[1:]))
    layer.bias = nn.Parameter(torch.empty(outputs)) if has_bias else None


def _replace_head(network: nn.Module, head: str, state: dict[str, Tensor]) -> str | None:
    """Put a linear layer in the place of the head for which the weights have another name; returns that name."""
    slot = _replaced_slot(network, head, state)
    if slot is None:
        return None
    keys = [key for key in state if key.startswith(f"{slot}.")]
    name = keys[0].rpartition(".")[0]
    weight = state.get(f"{name}.weight")
    if weight is None or weight.dim() != 2 or not {f"{name}.weight", f"{name}.bias"}.issuperset(keys):
        return None
    layer: nn.Module = nn.Linear(weight.shape[1], weight.shape[0], bias=f"{name}.bias" in state)
    for part in reversed(name.removeprefix(slot).split(".")[1:]):
        layer = nn.Sequential(OrderedDict([(part, layer)]))
    network.set_submodule(slot, layer)
    return name


def _replaced_slot(network: nn.Module, head: str, state: dict[str, Tensor]) -> str | None:
    """The innermost module around the head in which the weights have something else, if all else fits."""
    missing, unexpected, misshapen = _misfit(network, state)
    slot = head
    while slot:
        inside = f"{slot}."
        is_held = any(key.startswith(inside) for key in state)
        if is_held and all(key.startswith(inside) for key in (*missing, *unexpected, *misshapen)):
            return slot
        slot = slot.rpartition(".")[0]
    return None


def _unknown_head(network: nn.Module, state: dict[str, Tensor]) -> str | None:
    """The module in whose place the weights have others, of which they do not tell what they compute."""
    layers = [name for name, layer in network.named_modules() if isinstance(layer, (nn.Conv2d, nn.Linear))]
    return _replaced_slot(network, layers[-1], state) if layers else None


def _misfit(network: nn.Module, state: dict[str, Tensor]) -> tuple[list[str], list[str], list[str]]:
    """Names of the network's weights that are missing, unexpected, and of another shape."""
    own = network.state_dict()
    missing = [name for name in own if name not in state and not name.endswith("num_batches_tracked")]
    unexpected = [name for name in state if name not in own]
    return missing, unexpected, [name for name in own if name in state and own[name].shape != state[name].shape]


def _describe_misfit(network: nn.Module, state: dict[str, Tensor]) -> str:
    own = [name for name in network.state_dict() if not name.endswith("num_batches_tracked")]
    missing, unexpected, misshapen = _misfit(network, state)
    parts = []
    if missing:
        parts.append(f"{len(missing)} of {len(own)} are missing ({in_brief(missing[0], 40)})")
    if unexpected:
        parts.append(f"{len(unexpected)} unexpected ({in_brief(unexpected[0], 40)})")
    if misshapen:
        parts.append(f"{len(misshapen)} of another shape ({in_brief(misshapen[0], 40)})")
    return ", ".join(parts)


def _matching(tensors: dict[str, Tensor]) -> str | None:
    """The architecture of torchvision whose names and shapes a state dict has."""
    with _ShapesOnly():
        for family in _families():
            for name in family:
                network = _from_torchvision(name)
                state = _of_network(name, network, tensors)
                own = network.state_dict().keys()
                if name == family[0] and len(own & state.keys()) < FAMILY_LIKENESS * min(len(own), len(state)):
                    break
                _adapt(network, state)
                if not any(_misfit(network, state)):
                    return name
    return None


def _families() -> list[list[str]]:
    """torchvision's architectures by the module that defines them."""
    families: dict[str, list[str]] = {}
    for name in _torchvision_names():
        families.setdefault(torchvision.models.get_model_builder(name).__module__, []).append(name)
    return list(families.values())
