"""Where a Triton server's files are: in the nvidia-pytriton wheel, or in a folder that a setting names."""

from __future__ import annotations

import importlib.util
import sys
import sysconfig
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tools.triton.options import SettingError
from tools.triton.process import ServerError

FOLDER_SETTING, PYTHON_SETTING = "TRITON_FOLDER", "TRITON_PYTHON"


@dataclass(frozen=True)
class Installation:
    """A Triton server that this machine can run."""

    server: Path  # tritonserver
    python_backend: Path  # a folder
    stub: Path  # of the Python backend, for the Python that runs the models
    libraries: tuple[Path, ...]  # folders
    python: Path  # the stub takes its environment from the python3 in this folder

    @classmethod
    def find(cls, settings: Mapping[str, str]) -> Installation:
        """That of the settings, or the wheel's.

        Args:
            settings: TRITON_FOLDER has ``bin``, ``lib`` and ``backends/python`` with a stub; TRITON_PYTHON is a folder
                with the ``python3`` for which the stub was built, which needs the packages of the models.

        Raises:
            ServerError: the wheel is not installed, or does not fit this Python.
            SettingError: a setting does not name such a folder.
        """
        if folder := settings.get(FOLDER_SETTING):
            return cls._in_folder(Path(folder), Path(settings.get(PYTHON_SETTING) or Path(sys.executable).parent))
        return cls._in_wheel()

    @classmethod
    def _in_folder(cls, folder: Path, python: Path) -> Installation:
        backend = folder / "backends" / "python"
        server, stub = folder / "bin" / "tritonserver", backend / "triton_python_backend_stub"
        for setting, file in ((FOLDER_SETTING, server), (FOLDER_SETTING, stub), (PYTHON_SETTING, python / "python3")):
            if not file.is_file():
                raise SettingError(f"{setting}: there is no {file}")
        return cls(server, backend, stub, (folder / "lib",), python)

    @classmethod
    def _in_wheel(cls) -> Installation:
        package = wheel_folder("pytriton")
        server, version = package / "tritonserver", f"{sys.version_info.major}.{sys.version_info.minor}"
        stub = server / "python_backend_stubs" / version / "triton_python_backend_stub"
        if not stub.is_file():
            raise ServerError(f"the nvidia-pytriton wheel has no stub for Python {version}")
        libraries = package.parent / "nvidia_pytriton.libs", _python_library().parent
        backend = server / "backends" / "python"
        return cls(server / "bin" / "tritonserver", backend, stub, libraries, Path(sys.executable).parent)


def find_perf_analyzer(settings: Mapping[str, str]) -> tuple[Path, Path]:
    """perf_analyzer, and the folder of its libraries: in TRITON_FOLDER, or in the wheels.

    Raises:
        ServerError: the wheel is not installed.
    """
    if folder := settings.get(FOLDER_SETTING):
        return Path(folder) / "bin" / "perf_analyzer", Path(folder) / "lib"
    libraries = wheel_folder("pytriton").parent / "nvidia_pytriton.libs"
    return Path(sys.executable).with_name("perf_analyzer"), libraries


def wheel_folder(package: str) -> Path:
    """Folder of an installed package.

    Raises:
        ServerError: it is not installed.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ServerError("nvidia-pytriton, which carries the Triton server, is not installed; run make serve")
    return Path(spec.submodule_search_locations[0])


def _python_library() -> Path:
    """The shared libpython that the backend's stub links against."""
    library = Path(sysconfig.get_config_var("LIBDIR")) / (sysconfig.get_config_var("INSTSONAME") or "")
    if not library.is_file() or ".so" not in library.name:
        raise ServerError(
            f"{sys.executable} has no shared libpython ({library}), which Triton's Python backend needs; "
            "use a Python that was built with --enable-shared, as distributions' are"
        )
    return library
