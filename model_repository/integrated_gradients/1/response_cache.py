"""Refuses Triton's response cache for models whose answers depend on more than their inputs.

The cache's key is the model, its version and the content of its inputs (`cache_manager.cc` of Triton's core). Request
parameters are not in it, so a cached `explain` would answer one request with another's map, and accept parameters that
are not valid. Requested outputs are not in it either, so a cached step would leave out what the first request did not
need.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from load_errors import LoadError

# The parts of a config in protobuf's text format. Comments and strings come first: nothing is found inside them.
_TOKEN = re.compile(
    r"""
      \#[^\n]*
    | (?P<string>"(?:[^"\\\n]|\\.)*"|'(?:[^'\\\n]|\\.)*')
    | (?P<word>\w+)
    | (?P<mark>[{}<>])
    """,
    re.VERBOSE,
)
# How protobuf writes false; all else counts as true.
_FALSE = ("false", "False", "f", "0")


class ResponseCacheError(LoadError):
    """A model's config enables the response cache, which it must not; the message names the model and the remedy."""


def refuse_own_cache(config: Mapping[str, Any]) -> None:
    """Check the config of a model, from Triton's arguments to it.

    Raises:
        ResponseCacheError: it enables the cache.
    """
    if config.get("response_cache", {}).get("enable"):
        raise _refusal(config["name"], Path(config["name"], "config.pbtxt"))


def refuse_caches_around(model_repository: str) -> None:
    """Check the models that cannot see their own configs: the classifier, and each ensemble with a step of this model.

    Args:
        model_repository: folder of this model, from Triton's arguments to it. The others lie beside it.

    Raises:
        ResponseCacheError: one of them enables the cache.
    """
    own = Path(model_repository)
    # Triton takes a model's config from the folder `configs` if it is started with `--model-config-name`.
    for file in sorted((*own.parent.glob("*/config.pbtxt"), *own.parent.glob("*/configs/*.pbtxt"))):
        strings, is_cached = _read(file.read_text(errors="replace"))
        place = file.relative_to(own.parent)
        model = place.parts[0]
        if is_cached and (model == "classifier" or own.name in strings):
            raise _refusal(model, place)


def _refusal(model: str, config: Path) -> ResponseCacheError:
    return ResponseCacheError(
        f"{model} must not use Triton's response cache, whose key has neither parameters nor requested outputs: "
        f"remove response_cache from {config}"
    )


def _read(config: str) -> tuple[set[str], bool]:
    """The strings of a config, and whether it enables the response cache."""
    strings: set[str] = set()
    words: list[str] = []  # since the last brace, or since the beginning
    block, is_cached = "", False
    for token in _TOKEN.finditer(config):
        if token["string"]:
            strings.add(token["string"][1:-1])
        elif token["word"]:
            if block == "response_cache" and words[-1:] == ["enable"]:
                is_cached = token["word"] not in _FALSE
            words.append(token["word"])
        elif token["mark"]:
            block = words[-1] if words and token["mark"] in "{<" else ""
            words = []
    return strings, is_cached
