"""What the models that know the classifier read first when they load."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from classifier_files import ClassifierFiles, Preprocessing, pixels_shape
from response_cache import refuse_own_cache


@dataclass(frozen=True)
class ModelSetup:
    """A model's config, the settings in it, the classifier's files, and how images become the classifier's input."""

    config: Mapping[str, Any]
    settings: Mapping[str, str]
    files: ClassifierFiles
    preprocessing: Preprocessing

    @classmethod
    def read(cls, args: Mapping[str, str]) -> ModelSetup:
        """Read Triton's arguments to a model.

        Raises:
            LoadError: the model uses the response cache, or its config does not fit the classifier.
        """
        config = json.loads(args["model_config"])
        refuse_own_cache(config)
        settings = {name: value["string_value"] for name, value in config["parameters"].items()}
        files = ClassifierFiles.beside(args["model_repository"], args["model_version"])
        return cls(config, settings, files, files.preprocessing(settings, pixels_shape(config)))
