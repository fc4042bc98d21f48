"""Programs that tests run."""

from __future__ import annotations

import shutil
import subprocess

import pytest


def needs(program: str):
    return pytest.mark.skipif(shutil.which(program) is None, reason=f"{program} is not installed")


def run(*words: str, **options) -> subprocess.CompletedProcess:
    return subprocess.run(words, capture_output=True, text=True, check=False, **options)
