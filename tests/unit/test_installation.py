"""A Triton that settings name is used instead of the wheel's."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tools.triton.installation import Installation, find_perf_analyzer
from tools.triton.options import SettingError


@pytest.fixture
def folder(tmp_path):
    triton = tmp_path / "triton"
    for name in ("bin/tritonserver", "backends/python/triton_python_backend_stub", "python/python3"):
        (triton / name).parent.mkdir(parents=True, exist_ok=True)
        (triton / name).touch()
    return triton


def test_the_folder_of_the_settings_is_used(folder):
    settings = {"TRITON_FOLDER": str(folder), "TRITON_PYTHON": str(folder / "python")}
    found = Installation.find(settings)
    assert found.server == folder / "bin" / "tritonserver"
    assert found.stub.parent == found.python_backend == folder / "backends" / "python"
    assert found.libraries == (folder / "lib",)
    assert found.python == folder / "python"
    assert find_perf_analyzer(settings) == (folder / "bin" / "perf_analyzer", folder / "lib")


def test_without_a_python_it_is_this_one(folder):
    assert Installation.find({"TRITON_FOLDER": str(folder)}).python == Path(sys.executable).parent


@pytest.mark.parametrize(
    ("missing", "setting"),
    [
        ("bin/tritonserver", "TRITON_FOLDER"),
        ("backends/python/triton_python_backend_stub", "TRITON_FOLDER"),
        ("python/python3", "TRITON_PYTHON"),
    ],
)
def test_what_a_folder_lacks_is_named(folder, missing, setting):
    (folder / missing).unlink()
    with pytest.raises(SettingError, match=f"{setting}: there is no .*{missing}"):
        Installation.find({"TRITON_FOLDER": str(folder), "TRITON_PYTHON": str(folder / "python")})


def test_the_wheel_is_used_without_settings():
    found = Installation.find({})
    assert all(file.is_file() for file in (found.server, found.stub, found.python / "python3"))
    assert all(path.is_dir() for path in (found.python_backend, *found.libraries))
    binary, libraries = find_perf_analyzer({})
    assert binary.is_file()
    assert libraries == found.libraries[0]
