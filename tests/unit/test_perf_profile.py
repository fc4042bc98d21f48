"""What is read from perf_analyzer's export."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tools.bench.perf import ProfileError, read_profile

REQUEST = {"timestamp": 1_000_000, "response_timestamps": [3_000_000, 9_000_000]}
PROFILE = {"experiments": [{"experiment": {"mode": "concurrency", "value": 1}, "requests": [REQUEST]}]}


def test_times_to_the_first_and_the_last_response(tmp_path: Path) -> None:
    (tmp_path / "profile.json").write_text(json.dumps(PROFILE))
    (load,) = read_profile(tmp_path / "profile.json")
    assert (load["requests"], load["first_ms"], load["last_ms"]) == (1, [2.0] * 3, [8.0] * 3)


def test_an_export_that_ends_at_a_nan_is_told_with_the_remedy(tmp_path: Path) -> None:
    text = json.dumps(PROFILE).replace("9000000", '9000000], "response_outputs": [{"ERROR_ESTIMATE":')
    (tmp_path / "profile.json").write_text(text[: text.index("ERROR_ESTIMATE") + 16])
    with pytest.raises(ProfileError, match=r"profile.json is cut off: .* at least 8 steps, or a tolerance"):
        read_profile(tmp_path / "profile.json")
