"""The arguments of `make demo`."""

import sys

import pytest
from conftest import encode, scene_image

from tools import demo


def test_images_are_checked_before_a_server_is_started(tmp_path, monkeypatch, capsys):
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "empty").mkdir()
    for path, message in (
        ("absent.jpg", "absent.jpg is not an image that can be read: No such file or directory"),
        ("text.png", "text.png is not an image that can be read: of no known format"),
        ("empty", "demo: no images in"),
    ):
        monkeypatch.setattr(sys, "argv", ["demo", str(tmp_path / path)])
        with pytest.raises(SystemExit) as ended:
            demo.main()
        assert message in str(ended.value.code)
        assert capsys.readouterr().out == ""


def test_a_folder_is_its_images(tmp_path):
    for name in ("one.png", "more/two.jpg", "one.heatmap.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(encode(scene_image(0)))
    assert [path.name for path in demo._images_of([tmp_path])] == ["two.jpg", "one.png"]
