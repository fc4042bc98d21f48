"""A network's calibration: its file, and the nodes from it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from error_law import ErrorLaw
from path_density import LEAST_ORDER, CalibrationError, PathDensity

SHA256 = "12" * 32


def write(folder: Path, **logit_law: Any) -> Path:
    """A valid calibration, except for the given values of the logit's law."""
    content = {
        "model_sha256": SHA256,
        "density": {"logit": [1, 2.5, 0], "probability": [3]},
        "error_law": {
            "logit": {"scale": 2, "order": 1.2, "margin": 1.4, **logit_law},
            "probability": {"scale": 0.5, "order": 1, "margin": 3},
        },
    }
    file = folder / "path_density.json"
    file.write_text(json.dumps(content))
    return file


def test_a_file_gives_each_output_its_density_and_its_law(tmp_path: Path) -> None:
    calibration = PathDensity.load(write(tmp_path), SHA256)
    assert {name: density.tolist() for name, density in calibration.density.items()} == {
        "logit": [1, 2.5, 0],
        "probability": [3],
    }
    assert all(density.dtype == torch.float64 for density in calibration.density.values())
    assert calibration.law == {"logit": ErrorLaw(2.0, 1.2, 1.4), "probability": ErrorLaw(0.5, 1.0, 3.0)}


def test_numbers_in_a_law_may_be_strings(tmp_path: Path) -> None:
    assert PathDensity.load(write(tmp_path, scale="0.25"), SHA256).law["logit"].scale == 0.25


@pytest.mark.parametrize(
    ("law", "is_valid"),
    [
        ({"order": LEAST_ORDER}, True),
        ({"order": LEAST_ORDER - 0.01}, False),
        ({"margin": 0}, False),
        ({"margin": -1}, False),
        ({"scale": float("nan")}, False),
        ({"scale": None}, False),
    ],
    ids=str,
)
def test_a_law_is_of_positive_numbers_and_an_order_that_is_not_too_small(
    tmp_path: Path, law: dict[str, Any], is_valid: bool
) -> None:
    file = write(tmp_path, **law)
    if is_valid:
        PathDensity.load(file, SHA256)
    else:
        with pytest.raises(CalibrationError, match="has no valid density or error_law for 'logit'"):
            PathDensity.load(file, SHA256)


@pytest.mark.parametrize("density", [[[1, 2], [3, 4]], 1, [[1], [1, 2]], ["1"], None, [1, None]], ids=str)
def test_a_density_is_one_list_of_numbers(tmp_path: Path, density: Any) -> None:
    file = write(tmp_path)
    content = json.loads(file.read_text())
    content["density"]["logit"] = density
    file.write_text(json.dumps(content))
    with pytest.raises(CalibrationError, match="has no valid density or error_law for 'logit'"):
        PathDensity.load(file, SHA256)


def test_what_is_no_text_file_cannot_be_read(tmp_path: Path) -> None:
    file = tmp_path / "path_density.json"
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(CalibrationError, match=r"cannot be read .*python -m tools\.calibrate writes it"):
        PathDensity.load(file, SHA256)
    with pytest.raises(CalibrationError, match="cannot be read"):
        PathDensity.load(tmp_path, SHA256)


@pytest.mark.parametrize("n_steps", [1, 2, 7, 100])
@pytest.mark.parametrize("output", ["logit", "probability"])
def test_edges_invert_the_densitys_integral(output: str, n_steps: int) -> None:
    densities = {"logit": [4.0, 1.0, 2.0, 8.0, 1.0], "probability": [1.0, 6.0]}
    calibration = PathDensity({name: torch.tensor(each).double() for name, each in densities.items()}, {})
    integral = np.concatenate(([0], np.cumsum(densities[output])))
    expected = np.interp(
        np.linspace(0, integral[-1], n_steps + 1), integral, np.linspace(0, 1, len(densities[output]) + 1)
    )
    # Float64 rounding alone.
    np.testing.assert_allclose(calibration.edges(output, n_steps), expected, rtol=0, atol=1e-13)


def test_a_law_of_integers_beyond_floats_is_not_valid(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="has no valid density or error_law for 'logit'"):
        PathDensity.load(write(tmp_path, scale=10**400), SHA256)
