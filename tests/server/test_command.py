"""The command `explain`, against the live server."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import scene_image
from PIL import Image

from explain_client.runs import find_sources
from tools.paths import MODEL_REPOSITORY, ROOT
from tools.server import EmbeddedServer, Ports
from tools.shapes.dataset import CLASSES, draw_scene

EXPLAIN = str(Path(sys.executable).with_name("explain"))
FEW_STEPS = ["--n-steps", "2"]


def explain(*words: object, stdin: bytes = b"") -> subprocess.CompletedProcess:
    """Run the command; its outputs are text."""
    result = subprocess.run([EXPLAIN, *map(str, words)], input=stdin, capture_output=True, check=False)
    return subprocess.CompletedProcess(result.args, result.returncode, result.stdout.decode(), result.stderr.decode())


@pytest.fixture
def folder(tmp_path) -> Path:
    """Five images, two of which have one stem, and one that is none."""
    images = tmp_path / "images"
    (images / "more").mkdir(parents=True)
    for index, name in enumerate(("one.png", "two.jpg", "two.webp", "more/three.png", "more/four.jpeg")):
        scene_image(index).save(images / name)
    (images / "broken.png").write_bytes(b"no picture")
    (images / "notes.txt").write_text("not looked at")
    return images


def test_command_explains_what_it_can_and_names_what_it_cannot(server, folder, tmp_path):
    options = ["--n-steps", 4, "--method", "riemann_middle", "--baseline", "blur", "--target", 2]
    images = [folder / "one.png", folder / "broken.png", tmp_path / "absent.jpg"]
    result = explain(*images, "--url", server.grpc_url, *options, "--out", tmp_path / "out")
    assert result.returncode == 1
    assert re.search(rf"one.png +\S+ +[\d.]+% +{CLASSES[2]} +4 +- +-?\d+\.\d+ +\d+\n", result.stdout)
    assert "broken.png: in ensemble 'explain', [invalid] IMAGE is not a JPEG, PNG or WEBP file" in result.stderr
    assert "absent.jpg" in result.stderr
    with Image.open(tmp_path / "out" / "one.heatmap.png") as heatmap:
        assert heatmap.size == (224, 224)
    assert not (tmp_path / "out" / "broken.heatmap.png").exists()


def test_a_folder_keeps_its_shape_shows_progress_and_is_taken_up_again(server, folder, tmp_path):
    out = tmp_path / "out"
    words = [folder, "--url", server.grpc_url, "--out", out, *FEW_STEPS]
    result = explain(*words, "--progress")
    assert result.returncode == 1
    assert re.search(r"6/6 \[\d\d:\d\d<.*image", result.stderr)
    written = sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file())
    assert written == [
        "more/four.heatmap.png",
        "more/three.heatmap.png",
        "one.heatmap.png",
        "two.heatmap.png",
        "two.webp.heatmap.png",
    ]
    (out / "one.heatmap.png").unlink()
    (folder / "broken.png").unlink()
    result = explain(*words, "--skip-existing")
    assert result.returncode == 0
    assert "4 of 5 have their heatmaps" in result.stderr
    assert (out / "one.heatmap.png").is_file()
    assert "one.png" in result.stdout
    assert "two" not in result.stdout


def test_json_lines_have_everything_and_the_failures(server, folder, tmp_path):
    result = explain(
        f"{folder}/*.png", "--url", server.grpc_url, "--out", tmp_path, "--json", "--top-k", 3, "--tolerance", 0.5
    )
    assert result.returncode == 1
    lines = {Path(line["image"]).name: line for line in map(json.loads, result.stdout.splitlines())}
    assert set(lines) == {"one.png", "broken.png"}
    assert "IMAGE is not" in lines["broken.png"]["error"]
    line = lines["one.png"]
    assert line["predictions"][0]["label"] == CLASSES[draw_scene("test", 0).label]
    assert len(line["predictions"]) == 3
    assert line["explained_label"] == line["predictions"][0]["label"]
    assert 0 < line["error_estimate"] <= 0.5
    assert Path(line["heatmap"]).is_file()


@pytest.mark.parametrize("as_json", [False, True])
def test_stream_shows_the_prediction_and_then_the_error_shrinking(server, folder, tmp_path, as_json):
    options = ["--url", server.grpc_url, "--out", tmp_path, "--stream", "--n-steps", 16, *["--json"] * as_json]
    result = explain("-", *options, stdin=(folder / "one.png").read_bytes())
    assert result.returncode == 0
    if as_json:
        first, *levels = map(json.loads, result.stdout.splitlines())
        assert first["image"] == "stdin"
        errors = [level["error_estimate"] for level in levels]
    else:
        _, first, *levels = result.stdout.splitlines()
        assert re.match(rf"stdin: {CLASSES[draw_scene('test', 0).label]} [\d.]+% after \d+ ms", first)
        errors = [float(re.search(r"estimated error +([\d.]+)%", level)[1]) for level in levels]
    assert len(errors) == 2
    assert errors[0] > errors[1]
    assert (tmp_path / "stdin.heatmap.png").is_file()


def test_exit_status_tells_wrong_usage_and_absent_servers(server, folder, tmp_path):
    assert explain().returncode == 2
    assert explain(folder / "one.png", "--top-k", 0).returncode == 2
    assert explain(folder / "one.png", "--stream", "--report", "x.html").returncode == 2
    empty = tmp_path / "empty"
    empty.mkdir()
    assert explain(empty, "--url", server.grpc_url).returncode == 2
    for options in ([], ["--stream"]):
        result = explain(folder / "one.png", "--url", "127.0.0.1:9", "--out", tmp_path / "out", *options)
        assert result.returncode == 3
        assert "127.0.0.1:9 cannot be reached" in result.stderr
        assert "Traceback" not in result.stderr


def test_a_heatmap_that_cannot_be_written_fails_its_image_alone(server, folder, tmp_path):
    out = tmp_path / "out"
    (out / "one.heatmap.png").mkdir(parents=True)
    result = explain(folder / "one.png", folder / "two.jpg", "--url", server.grpc_url, "--out", out, *FEW_STEPS)
    assert result.returncode == 1
    assert "one.png" in result.stderr
    assert (out / "two.heatmap.png").is_file()


def test_sources_are_found_once_and_their_heatmaps_have_names_of_their_own(folder, tmp_path):
    out = tmp_path / "out"
    sources = find_sources([str(folder), str(folder / "one.png"), f"{folder}/more/*", "-", "gone.png"], out)
    assert [source.name for source in sources if source.path is None] == ["stdin"]
    paths = [source.path for source in sources if source.path is not None]
    assert len(paths) == len(set(paths)) == 7
    assert len({source.heatmap for source in sources}) == len(sources)


def doctor(url: str) -> tuple[int, str]:
    result = explain("doctor", "--url", url)
    assert "Traceback" not in result.stderr
    return result.returncode, result.stdout


def test_doctor_finds_nothing_wrong_with_a_good_server(server):
    code, said = doctor(server.grpc_url)
    assert code == 0
    assert "FAULT" not in said
    assert re.search(r"latency of classify: \d+ ms", said)


def test_doctor_names_a_server_that_is_down_and_a_wrong_port(server):
    for url, message in (
        ("127.0.0.1:9", "nothing answers at 127.0.0.1:9"),
        (server.http_url, "speaks HTTP, not gRPC: give the gRPC port"),
        (server.metrics_url.removeprefix("http://").removesuffix("/metrics"), "speaks HTTP"),
        ("localhost", "not HOST:PORT"),
    ):
        code, said = doctor(url)
        assert code == 1
        assert f"FAULT {'address' if url == 'localhost' else 'protocol' if 'HTTP' in message else 'connection'}" in said
        assert message in said


def test_doctor_names_models_that_are_missing_or_not_ready(tmp_path):
    """The real server with an `explain` that fails to load, and without the other models."""
    shutil.copytree(MODEL_REPOSITORY / "heatmap", tmp_path / "models" / "explain")
    (tmp_path / "models" / "explain" / "1" / "model.py").write_text("raise RuntimeError('not today')\n")
    options = ["--exit-on-error=false", "--strict-readiness=false"]
    with EmbeddedServer(tmp_path / "models", Ports.free(), tmp_path / "log", options=options) as server:
        code, said = doctor(server.grpc_url)
    assert code == 1
    assert "FAULT classify: the server has no model 'classify'" in said
    assert "FAULT explain: model 'explain' is not ready" in said
    assert "FAULT explain_stream: the server has no model 'explain_stream'" in said


def resident_kb(process: subprocess.Popen) -> int:
    lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS"))


@pytest.mark.slow
def test_client_alone_explains_two_hundred_images_in_flat_memory(server, tmp_path):
    """In an environment that has the client and nothing else of this project."""
    environment = tmp_path / "venv"
    uv = str(Path(sys.executable).with_name("uv"))
    subprocess.run([uv, "venv", "--quiet", "--python", sys.executable, environment], check=True)
    python = environment / "bin" / "python"
    install = [uv, "pip", "install", "--quiet", "--python", python, "--constraints", ROOT / "constraints.txt"]
    subprocess.run([*install, ROOT / "client"], check=True)
    packages = subprocess.run(
        [uv, "pip", "list", "--python", python], capture_output=True, text=True, check=True
    ).stdout
    assert not re.search(r"^(torch|captum|nvidia)", packages, re.MULTILINE)

    images = tmp_path / "images"
    images.mkdir()
    for index in range(199):
        scene_image(index % 20).save(images / f"scene{index:03}.jpg")
    (images / "broken.jpg").write_bytes(b"no picture")
    command = [environment / "bin" / "explain", images, "--url", server.grpc_url, "--out", tmp_path / "out"]
    command += ["--progress", "--report", tmp_path / "report.html", *FEW_STEPS]
    with (tmp_path / "stdout").open("w") as stdout, (tmp_path / "stderr").open("w") as stderr:
        process = subprocess.Popen([*map(str, command)], stdout=stdout, stderr=stderr, env={"PATH": os.environ["PATH"]})
        early, late = 0, 0
        while process.poll() is None:
            done = len(list((tmp_path / "out").glob("*.png"))) if (tmp_path / "out").exists() else 0
            if 40 <= done < 60:
                early = max(early, resident_kb(process))
            elif done >= 150:
                late = max(late, resident_kb(process))
            time.sleep(0.1)
    assert process.returncode == 1
    said = (tmp_path / "stderr").read_text()
    assert re.search(r"200/200 \[", said)
    assert "broken.jpg: in ensemble 'explain', [invalid] IMAGE is not" in said
    assert len(list((tmp_path / "out").glob("*.heatmap.png"))) == 199
    print(f"resident: {early} kB after 40 to 60 images, {late} kB after 150 and more")
    assert early > 0
    assert late - early < 5000
    assert (tmp_path / "report.html").read_text().count("<article") == 200
