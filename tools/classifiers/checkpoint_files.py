"""What a file of weights holds: a state dict, a TorchScript module, or a ``torch.export`` program.

Pickles are read with ``weights_only=True`` alone, so that a state dict cannot run code. A TorchScript file and a
program are code by nature.
"""

from __future__ import annotations

import argparse
import logging
import os
import pickle
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from error_reasons import in_brief, reason
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from tools.classifiers.messages import shown
from tools.classifiers.source import ExportError
from tools.shapes.checkpoint import load_dequantized

# Names under which trainers save a state dict, in the order in which they are looked for.
WRAPPERS = (
    "state_dict",
    "model",
    "model_state",
    "model_state_dict",
    "ema",
    "state_dict_ema",
    "model_ema",
    "net",
)
# Names under which trainers save the names of the classes.
CLASS_NAMES = ("classes", "class_names", "labels")


@dataclass(frozen=True)
class StateDict:
    """Tensors by name, and the names of the classes if the file has them."""

    tensors: dict[str, Tensor]
    class_names: list[str] | None = None


@dataclass(frozen=True)
class Program:
    """A network whose code is in the file. ``input_shape`` is [channels, height, width] if the file fixes it."""

    module: nn.Module
    kind: str
    input_shape: tuple[int, int, int] | None = None


def read(path: Path) -> StateDict | Program:
    """Read a file of weights.

    Raises:
        ExportError: it is damaged, holds something else, or cannot be read without running pickled code.
    """
    if path.is_dir():
        raise ExportError(f"{shown(path)} is a folder: give the file of weights in it")
    try:
        with path.open("rb") as file:
            beginning = file.read(64)
    except OSError as error:
        raise ExportError(f"{shown(path)} cannot be read: {error.strerror}") from None
    if not beginning:
        raise ExportError(f"{shown(path)} is empty: save or copy it again")
    if beginning.startswith(b"version https://git-lfs"):
        raise ExportError(f"{shown(path)} is a pointer of Git LFS, not the weights: run git lfs pull")
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    parts = {part for member in _members(path) for part in PurePosixPath(member).parts}
    if "constants.pkl" in parts:
        return _read_torchscript(path)
    if "aotinductor" in parts:
        raise ExportError(f"{shown(path)} holds compiled code: export it without compiling it")
    if parts & {"archive_format", "serialized_exported_program.json"}:
        return _read_exported(path)
    return _read_pickle(path, beginning)


def _members(path: Path) -> list[str]:
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.namelist()
    except (zipfile.BadZipFile, OSError):
        return []


def _read_safetensors(path: Path) -> StateDict:
    try:
        with safe_open(path, framework="pt") as file:
            facts = file.metadata() or {}
        # The files of `tools/shapes` are quantised and name their classes.
        if {"classes", "training"} <= facts.keys():
            state, classes = load_dequantized(path)
            return StateDict(state, list(classes))
        state = load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise ExportError(
            f"{shown(path)} is not a whole safetensors file ({reason(error)}): save or copy it again"
        ) from None
    if not state:
        raise ExportError(f"{shown(path)} holds no weights: save network.state_dict()")
    return StateDict(state)


def _read_torchscript(path: Path) -> Program:
    print(f"{shown(path)} is TorchScript, which is code that must be yours or trusted", flush=True)
    try:
        return Program(torch.jit.load(str(path), map_location="cpu").eval(), "TorchScript")
    except RuntimeError as error:
        raise ExportError(
            f"{shown(path)} is a TorchScript file that torch {torch.__version__} cannot load ({reason(error)}): "
            "save it again"
        ) from None


def _read_exported(path: Path) -> Program:
    print(f"{shown(path)} is a torch.export program, which is code that must be yours or trusted", flush=True)
    try:
        with no_pickled_code():
            program = torch.export.load(path)
    except Exception as error:  # whatever a reader of archives raises
        raise ExportError(
            f"{shown(path)} is a torch.export program that torch {torch.__version__} cannot load ({reason(error)}): "
            "export it again"
        ) from None
    inputs = [node for node in program.graph.nodes if node.name in program.graph_signature.user_inputs]
    shape = tuple(inputs[0].meta["val"].shape)[1:] if inputs else ()
    is_fixed = len(shape) == 3 and all(isinstance(side, int) for side in shape)
    return Program(program.module(), "torch.export", (shape[0], shape[1], shape[2]) if is_fixed else None)


@contextmanager
def no_pickled_code() -> Iterator[None]:
    """Make every ``torch.load`` one of weights only, for ``torch.export.load`` would run pickled code; log nothing."""
    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)
        os.environ.pop(name)
        if before is not None:
            os.environ[name] = before


def _read_pickle(path: Path, beginning: bytes) -> StateDict:
    name = shown(path)
    try:
        # Trainers save their command line beside the weights; a namespace runs nothing.
        with torch.serialization.safe_globals([argparse.Namespace]):
            held = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a file of any bytes raises anything
        pickled = re.search(r"GLOBAL (\S+)", str(error))
        if isinstance(error, pickle.UnpicklingError) and pickled:
            raise ExportError(
                f"{name} holds a pickled {in_brief(pickled[1], 60)}, which could run code when it is read: save the "
                "weights alone, torch.save(network.state_dict(), FILE), and give the network's --arch"
            ) from None
        if beginning[:2] == b"PK" or beginning[:1] == b"\x80":
            raise ExportError(f"{name} is truncated or damaged: save or copy it again") from None
        raise ExportError(
            f"{name} is not a weights file: give a state dict (torch.save or safetensors), a TorchScript file or a "
            "torch.export program"
        ) from None
    levels = [held] if isinstance(held, Mapping) else []
    while levels:
        inner = [wrapper for wrapper in WRAPPERS if isinstance(levels[-1].get(wrapper), Mapping)]
        if not inner:
            break
        if len(inner) > 1:
            print(f"{name} has weights under {' and '.join(inner)}; those under {inner[0]} are taken", flush=True)
        levels.append(levels[-1][inner[0]])
    tensors = {str(key): value for key, value in levels[-1].items() if isinstance(value, Tensor)} if levels else {}
    if not tensors:
        what = f"under its keys {', '.join(map(str, held)) or '(none)'}" if levels else f"but a {type(held).__name__}"
        raise ExportError(
            f"{name} holds no weights {in_brief(what, 100)}: save network.state_dict(), alone or under state_dict"
        )
    class_names = next((names for level in levels if (names := _class_names(level))), None)
    return StateDict(tensors, class_names)


def _class_names(held: Mapping[Any, Any]) -> list[str] | None:
    """The names of the classes that a checkpoint carries, in the order of its outputs."""
    for key in CLASS_NAMES:
        names = held.get(key)
        if isinstance(names, (list, tuple)) and all(isinstance(name, str) for name in names):
            return list(names)
    indices = held.get("class_to_idx")
    if isinstance(indices, Mapping) and set(indices.values()) == set(range(len(indices))):
        return [str(name) for name in sorted(indices, key=lambda name: indices[name])]
    return None
