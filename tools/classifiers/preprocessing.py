"""Which preprocessing a network expects: that of its weights, changed by options."""

from __future__ import annotations

import importlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from classifier_files import INTERPOLATIONS, Preprocessing
from error_reasons import in_brief

from tools.classifiers.messages import either, suggestion
from tools.classifiers.source import ExportError

# Options of `tools/export` that change the preprocessing.
OPTIONS = ("size", "resize", "interpolation", "mean", "std")
# Largest side of an input or a resized image.
LARGEST_SIDE = 4096


@dataclass(frozen=True)
class Overrides:
    """What a person gave in place of the weights' own preprocessing; see ``Preprocessing``. None: not given."""

    size: tuple[int, int] | None = None
    resize: int | tuple[int, int] | None = None
    interpolation: str | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None

    @classmethod
    def read(cls, given: Mapping[str, Sequence[str]]) -> Overrides:
        """Read the options by name, each the words behind it; no words: not given.

        Raises:
            ExportError: a value is of the wrong kind, or out of its range.
        """
        words = {name: " ".join(given.get(name) or ()).replace(",", " ").split() for name in OPTIONS}
        size, resize = (_sides(name, words[name]) if words[name] else None for name in ("size", "resize"))
        mean, std = (_channel_values(name, words[name]) if words[name] else None for name in ("mean", "std"))
        interpolation = " ".join(words["interpolation"]) or None
        if interpolation is not None and interpolation not in INTERPOLATIONS:
            hint = suggestion(interpolation, INTERPOLATIONS)
            raise ExportError(
                f"--interpolation takes {either(INTERPOLATIONS)}, not {in_brief(interpolation, 40)!r}{hint}"
            )
        if mean and not all(0 <= value <= 1 for value in mean):
            raise ExportError(
                f"--mean takes means of values in [0, 1], not {_listed(mean)}: divide those of bytes by 255"
            )
        if std and not all(0 < value < math.inf for value in std):
            raise ExportError(f"--std takes finite numbers above 0, not {_listed(std)}")
        height_width = (size[0], size[-1]) if size else None
        shorter_or_exact = (resize[0] if len(resize) == 1 else (resize[0], resize[1])) if resize else None
        return cls(height_width, shorter_or_exact, interpolation, mean, std)

    def applied_to(self, own: Preprocessing, channels: int, name: str) -> Preprocessing:
        """The preprocessing of a network.

        Args:
            own: what its weights expect.
            channels: of its input.
            name: of the weights, for messages.

        Raises:
            ExportError: the values do not fit together, or not the network.
        """
        crop = self.size or own.crop
        resize = self.resize or (own.resize if crop == own.crop else _in_proportion(own, crop))
        enough = (resize, resize) if isinstance(resize, int) else resize
        if crop[0] > enough[0] or crop[1] > enough[1]:
            raise ExportError(
                f"an input of {_listed(crop)} cannot be cut from an image resized to {_listed(enough)}: "
                "give a larger --resize or a smaller --size"
            )
        if channels not in (1, 3):
            raise ExportError(f"{name} takes images of {channels} channels, but only 1 (grey) or 3 (RGB) can be served")
        values = {}
        for option in ("mean", "std"):
            given: tuple[float, ...] | None = getattr(self, option)
            value: tuple[float, ...] = given or _for_channels(getattr(own, option), channels)
            if len(value) != channels:
                raise ExportError(
                    f"{name} takes images of {channels} channel{'s' * (channels > 1)}, "
                    f"but --{option} has {len(value)} value{'s' * (len(value) > 1)}: give {channels}"
                )
            values[option] = value
        return Preprocessing(resize, crop, self.interpolation or own.interpolation, values["mean"], values["std"])


def of_torchvision(weights: Any) -> Preprocessing:
    """What an entry of torchvision's weights expects. Needs no download."""
    expected = weights.transforms()
    return Preprocessing(
        expected.resize_size[0],
        (expected.crop_size[0], expected.crop_size[0]),
        expected.interpolation.value,
        tuple(expected.mean),
        tuple(expected.std),
    )


def of_timm(network: Any) -> Preprocessing:
    """What the configuration of a timm network expects."""
    expected = importlib.import_module("timm.data").resolve_model_data_config(network)
    _, height, width = expected["input_size"]
    resized = math.floor(height / expected["crop_pct"]), math.floor(width / expected["crop_pct"])
    # Preprocessing knows the shorter side only for squares.
    is_exact = expected["crop_mode"] == "squash" or height != width
    interpolation = expected["interpolation"] if expected["interpolation"] in INTERPOLATIONS else "bicubic"
    own = Preprocessing(resized if is_exact else resized[0], (height, width), interpolation)
    return replace(own, mean=tuple(expected["mean"]), std=tuple(expected["std"]))


def _in_proportion(own: Preprocessing, crop: tuple[int, int]) -> int | tuple[int, int]:
    """The resizing for another input size, in the proportion of the weights' own."""
    if isinstance(own.resize, int):
        return round(max(crop) * own.resize / max(own.crop))
    return round(crop[0] * own.resize[0] / own.crop[0]), round(crop[1] * own.resize[1] / own.crop[1])


def _for_channels(values: tuple[float, ...], channels: int) -> tuple[float, ...]:
    """Own values for so many channels: grey has the average of RGB."""
    return (round(sum(values) / 3, 6),) if channels == 1 and len(values) == 3 else values


def _sides(option: str, words: Sequence[str]) -> tuple[int, ...]:
    """One or two sides in pixels."""
    sides = tuple(int(word) if word.isdecimal() and len(word) < 9 else 0 for word in words)
    if len(sides) > 2 or not all(0 < side <= LARGEST_SIDE for side in sides):
        raise ExportError(
            f"--{option} takes a whole number from 1 to {LARGEST_SIDE}, or two (height width), not {' '.join(words)!r}"
        )
    return sides


def _channel_values(option: str, words: Sequence[str]) -> tuple[float, ...]:
    """One value for grey, three for RGB."""
    try:
        values = tuple(float(word) for word in words)
    except ValueError:
        values = ()
    if len(values) not in (1, 3):
        raise ExportError(f"--{option} takes one number (grey) or three (RGB), not {' '.join(words)!r}")
    return values


def _listed(values: Sequence[float]) -> str:
    is_size = all(isinstance(value, int) for value in values)
    return (" x " if is_size else " ").join(map(str, values))
