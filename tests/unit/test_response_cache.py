"""Which models' configs enable Triton's response cache, and which must not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from google.protobuf import json_format, text_format
from response_cache import ResponseCacheError, refuse_caches_around, refuse_own_cache
from tritonclient.grpc import model_config_pb2

from tools.paths import MODEL_REPOSITORY

ENABLED = "response_cache { enable: true }"


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """The configs of the repository's models."""
    for file in MODEL_REPOSITORY.glob("*/config.pbtxt"):
        (tmp_path / file.parent.name).mkdir()
        shutil.copy(file, tmp_path / file.parent.name)
    return tmp_path


def append(repository: Path, model: str, text: str) -> None:
    with (repository / model / "config.pbtxt").open("a") as config:
        config.write(f"\n{text}\n")


def check(repository: Path) -> None:
    """What `integrated_gradients` checks of the others when it loads."""
    refuse_caches_around(str(repository / "integrated_gradients"))


@pytest.mark.parametrize(
    "text",
    [
        ENABLED,
        "response_cache: { enable: true }",
        "response_cache{enable:True}",
        "response_cache < enable: t >",
        "response_cache\n{ # none\n  enable # true or false\n  : 1\n}",
        "response_cache { enable: true }  # response_cache { enable: false }",
        'parameters { key: "quote" value { string_value: "\\"#" } } response_cache { enable: true }',
        "response_cache { enable: false }",
        "response_cache { enable: 0 }",
        "response_cache { }",
        "# response_cache { enable: true }",
        'parameters { key: "response_cache" value { string_value: "{ enable: true }" } }',
        "parameters { key: 'response_cache { enable: true }' value { string_value: '#' } }",
        "optimization { input_pinned_memory { enable: true } }",
        "response_cache { enable: false } optimization { output_pinned_memory { enable: true } }",
    ],
)
def test_the_cache_is_found_where_protobuf_finds_it(repository: Path, text: str) -> None:
    append(repository, "explain", text)
    config = (repository / "explain" / "config.pbtxt").read_text()
    if text_format.Parse(config, model_config_pb2.ModelConfig()).response_cache.enable:
        with pytest.raises(ResponseCacheError):
            check(repository)
    else:
        check(repository)


def test_models_that_the_gradients_depend_on_or_feed_are_refused_and_named(repository: Path) -> None:
    """And an ensemble of somebody's own, but no model that has nothing to do with the gradients."""
    (repository / "mine").mkdir()
    shutil.copy(repository / "explain" / "config.pbtxt", repository / "mine")
    (repository / "unrelated").mkdir()
    append(repository, "unrelated", f'platform: "onnxruntime_onnx" {ENABLED}')
    append(repository, "classify", ENABLED)
    check(repository)
    ensembles = [path.parent.name for path in MODEL_REPOSITORY.glob("explain*/config.pbtxt")]
    for model in {"classifier", "mine", *ensembles} - {"explain_stream"}:  # Triton refuses it for a decoupled model
        before = (repository / model / "config.pbtxt").read_bytes()
        append(repository, model, ENABLED)
        with pytest.raises(ResponseCacheError, match=rf"^{model} must not .*: remove .* from {model}/config.pbtxt$"):
            check(repository)
        (repository / model / "config.pbtxt").write_bytes(before)


def test_configs_that_an_option_of_triton_chooses_are_read_too(repository: Path) -> None:
    (repository / "explain" / "configs").mkdir()
    text = (repository / "explain" / "config.pbtxt").read_text()
    (repository / "explain" / "configs" / "cached.pbtxt").write_text(f"{text}\n{ENABLED}\n")
    with pytest.raises(ResponseCacheError, match=r"^explain must not .*: remove .* from explain/configs/cached.pbtxt$"):
        check(repository)


@pytest.mark.parametrize("model", ["preprocess", "integrated_gradients", "heatmap"])
def test_python_models_are_refused_by_the_config_that_triton_gives_them(repository: Path, model: str) -> None:
    def given() -> dict:
        text = (repository / model / "config.pbtxt").read_text() + f'\nname: "{model}"'
        config = text_format.Parse(text, model_config_pb2.ModelConfig())
        return json.loads(json_format.MessageToJson(config, preserving_proto_field_name=True))

    refuse_own_cache(given())
    append(repository, model, ENABLED)
    with pytest.raises(ResponseCacheError, match=rf"^{model} must not .*: remove .* from {model}/config.pbtxt$"):
        refuse_own_cache(given())
