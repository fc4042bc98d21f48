"""What a run of the command writes for people, against the live server."""

from __future__ import annotations

import hashlib
import re

import pytest
from conftest import encode, scene_image
from PIL import Image

from explain_client import cli
from tools.shapes.dataset import CLASSES, draw_scene


def test_report_and_contact_sheet_say_what_was_asked(server, repository, tmp_path):
    image = tmp_path / "one.png"
    image.write_bytes(encode(scene_image(0)))
    (tmp_path / "broken.png").write_bytes(b"no image")
    label = draw_scene("test", 0).label
    other = (label + 1) % len(CLASSES)
    words = [image, tmp_path / "broken.png", "--url", server.grpc_url, "--out", tmp_path / "out", "--n-steps", 16]
    words += ["--contrast", other, "--report", tmp_path / "report.html", "--contact-sheet", tmp_path / "sheet.png"]
    with pytest.raises(SystemExit) as ended:
        cli.main([*map(str, words)])
    assert ended.value.code == cli.SOME_FAILED
    page = (tmp_path / "report.html").read_text()
    facts = dict(re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", page))
    assert facts["Network"] == "resnet18 · shapes"
    assert facts["Checksum"] == hashlib.sha256((repository / "classifier" / "1" / "model.pt").read_bytes()).hexdigest()
    assert facts["Explained"] == f"the class that the network predicted rather than {CLASSES[other]}"
    assert facts["Parameters"] == "n_steps = 16"
    assert f"Why {CLASSES[label]} rather than {CLASSES[other]}?" in page
    assert page.count("<article") == 2
    assert "[invalid]" in page
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.width > 600
