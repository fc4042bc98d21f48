"""Fill a model repository that Triton will mount read-only: ``python3 -m tools.deploy.prepare``.

Copies this repository's `model_repository` to MODEL_REPOSITORY and exports there the classifier that WEIGHTS names:
``lite0``, ``imagenet`` (downloaded by torchvision), ``shapes``, ``pretrained`` (downloaded by timm), or the path of a
file, of the architecture ARCH with the class names in the file LABELS. SIZE, RESIZE, INTERPOLATION, MEAN and STD change
the preprocessing, as the options of `tools/export` do. It replaces the files of another classifier. The folder
may belong to another user, as the root of a volume does, if this one may write into it.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from cpu_quota import threads

from tools.classifiers.loading import load_source
from tools.classifiers.preprocessing import OPTIONS, Overrides
from tools.classifiers.source import ExportError
from tools.export import copy_models, export


def main() -> None:
    repository = Path(os.environ.get("MODEL_REPOSITORY") or "/models")
    weights = os.environ.get("WEIGHTS") or "lite0"
    labels = os.environ.get("LABELS")
    try:
        torch.set_num_threads(threads())
        overrides = Overrides.read({name: os.environ.get(name.upper(), "").split() for name in OPTIONS})
        architecture = os.environ.get("ARCH") or "resnet18"
        source = load_source(weights, architecture, Path(labels) if labels else None, overrides)
        copy_models(repository)
        export(source, repository)
    except (ExportError, OSError, ValueError) as error:
        sys.exit(f"prepare: {error}")
    print(f"{repository} serves {weights}")


if __name__ == "__main__":
    main()
