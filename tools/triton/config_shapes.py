"""Writes what a classifier's preprocessing decides into the models' ``config.pbtxt``: shapes of tensors, settings."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from classifier_files import Preprocessing

from tools.classifiers.source import ExportError

# What is told apart in a config. Comments and other strings come first, so that nothing is found inside them.
_TOKEN = re.compile(
    r"""
      \#[^\n]*
    | \bname\s*:\s*"(?P<tensor>\w+)"
    | \bkey\s*:\s*"(?P<parameter>\w+)"
    | \bdims\s*:\s*\[(?P<dims>[^\]]*)\]
    | \bstring_value\s*:\s*"(?P<value>[^"\n]*)"
    | "(?:[^"\\\n]|\\.)*"
    | [{}]
    """,
    re.VERBOSE,
)


def write_configs(repository: Path, preprocessing: Preprocessing) -> None:
    """Write a classifier's input shape and resizing into every config of a repository that names them.

    Only the values change: comments stay, and a file that already has the values is not written. Models that are not
    in the repository are skipped.

    Args:
        repository: the model repository.
        preprocessing: of the classifier that the repository serves.

    Raises:
        ExportError: a config has such a tensor or parameter, but not in a form that is known here. Nothing is written.
    """
    channels, height, width = preprocessing.input_shape
    pixels, map_ = (channels, height, width), (height, width)
    shapes = {"INPUT__0": pixels, "PIXELS": pixels, "ATTRIBUTIONS": pixels, "SALIENCY": map_, "RELEVANCE": map_}
    sides = (preprocessing.resize,) if isinstance(preprocessing.resize, int) else preprocessing.resize
    settings = {"resize": ", ".join(map(str, sides)), "interpolation": preprocessing.interpolation}
    files = sorted(repository.glob("*/config.pbtxt"))
    before = {file: file.read_text() for file in files}
    after = {file: _with_values(text, shapes, settings, file) for file, text in before.items()}
    for file, text in after.items():
        if text != before[file]:
            file.write_text(text)


def write_settings(file: Path, **settings: object) -> None:
    """Write values of a model's parameters into its config.

    Raises:
        ExportError: the config has no such parameter, or not in a form that is known here. Nothing is written.
    """
    text = file.read_text()
    if unknown := settings.keys() - {token["parameter"] for token in _TOKEN.finditer(text)}:
        raise ExportError(f"{file} has no parameter {', '.join(sorted(unknown))}")
    file.write_text(_with_values(text, {}, {name: str(value) for name, value in settings.items()}, file))


def _with_values(text: str, shapes: Mapping[str, tuple[int, ...]], settings: Mapping[str, str], file: Path) -> str:
    """A config's text with these shapes of tensors and values of parameters."""
    parts, at = [], 0
    for start, end, value in _replacements(text, shapes, settings, file):
        parts += [text[at:start], value]
        at = end
    return "".join([*parts, text[at:]])


def _replacements(
    text: str, shapes: Mapping[str, tuple[int, ...]], settings: Mapping[str, str], file: Path
) -> Iterator[tuple[int, int, str]]:
    """Start, end and new text of each value to change.

    Raises:
        ExportError: a tensor's block ends without its dims, or a parameter's without its value.
    """
    awaited = None  # the tensor or parameter whose value comes next
    for token in _TOKEN.finditer(text):
        name = token["tensor"] or token["parameter"]
        if name is not None:
            known = shapes if token["tensor"] else settings
            awaited = name if name in known else None
        elif awaited is None:
            continue
        elif token["dims"] is not None and awaited in shapes:
            shape, awaited = shapes[awaited], None
            if tuple(map(int, re.findall(r"-?\d+", token["dims"]))) != shape:
                yield *token.span("dims"), f" {', '.join(map(str, shape))} "
        elif token["value"] is not None and awaited in settings:
            value, awaited = settings[awaited], None
            if token["value"] != value:
                yield *token.span("value"), value
        elif token[0] == "}":
            raise ExportError(f"{file} has {awaited}, but after it neither dims in brackets nor a string_value")
