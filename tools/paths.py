"""Folders of this repository."""

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MODEL_REPOSITORY = ROOT / "model_repository"
OUTPUTS = ROOT / "out"
