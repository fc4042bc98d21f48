"""The command `explain`, against the live server."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pty
import re
import shutil
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
from conftest import scene_image
from PIL import Image

from explain_client.cli import main
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
    assert result.stderr.endswith(f"1 of 3 explained, 2 failed; heatmap in {tmp_path}/out/one.heatmap.png\n")
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
    assert "4 of 5 have their heatmaps\n" in result.stderr
    assert result.stderr.endswith(f"1 of 5 explained, 4 kept from before; heatmap in {out}/one.heatmap.png\n")
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


@pytest.mark.parametrize(
    ("asked", "classes"), [("top2", None), (f"{CLASSES[3]}, 0", [3, 0])], ids=["the likeliest", "by label and number"]
)
def test_several_classes_have_a_line_and_a_heatmap_each(server, folder, tmp_path, asked, classes):
    words = [folder / "one.png", folder / "broken.png", "--url", server.grpc_url, "--out", tmp_path, *FEW_STEPS]
    result = explain(*words, "--targets", asked, "--json", "--report", tmp_path / "report.html")
    assert result.returncode == 1
    assert "1 of 2 explained, 1 failed; heatmaps in" in result.stderr
    lines = [line for line in map(json.loads, result.stdout.splitlines()) if "error" not in line]
    predicted = [prediction["index"] for prediction in lines[0]["predictions"]]
    expected = classes or predicted[:2]
    assert [line["explained_class"] for line in lines] == expected
    heatmaps = [Path(line["heatmap"]) for line in lines]
    assert [path.name for path in heatmaps] == [f"one.{each}.heatmap.png" for each in expected]
    assert Image.open(heatmaps[0]).tobytes() != Image.open(heatmaps[1]).tobytes()
    page = (tmp_path / "report.html").read_text()
    assert all(f"<figcaption>Why {CLASSES[each]}?" in page for each in expected)
    assert ("the 2 likeliest classes" if classes is None else f"{CLASSES[3]}, {CLASSES[0]}") in page


def test_the_likeliest_classes_leave_out_the_one_that_is_subtracted(server, folder, tmp_path):
    words = [folder / "one.png", "--url", server.grpc_url, "--out", tmp_path, *FEW_STEPS, "--json", "--top-k", 3]
    best, second, third = (each["index"] for each in json.loads(explain(*words).stdout)["predictions"])
    result = explain(*words, "--targets", "top2", "--contrast", second, "--contact-sheet", tmp_path / "sheet.png")
    assert result.returncode == 0
    assert [json.loads(line)["explained_class"] for line in result.stdout.splitlines()] == [best, third]
    assert (tmp_path / "sheet.png").is_file()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--targets", "top0"], "--targets 'top0' is not one of the server's 12 labels"),
        (["--targets", "1,,2"], "must be top3 or the like, or classes separated by commas, not '1,,2'"),
        (["--targets", "top33"], "must be at most 32 classes, not 'top33'"),
        (["--targets", "3,4", "--contrast", "4"], "--contrast must not be one of --targets, 4"),
        (["--targets", "99"], "--targets 99 is not one of the server's classes, 0 to 11"),
        (["--targets", "top2", "--target", "1"], "argument --target: not allowed with argument --targets"),
        (["--targets", "top2", "--stream"], "--targets does not go with --stream"),
        (["--targets", "top2", "--skip-existing"], "--targets does not go with --skip-existing"),
    ],
)
def test_classes_that_cannot_be_asked_for_are_wrong_usage(server, folder, tmp_path, words, said):
    result = explain(folder / "one.png", "--url", server.grpc_url, "--out", tmp_path, *words)
    assert result.returncode == 2
    assert said in result.stderr


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
        header, first, *levels = result.stdout.splitlines()
        assert header.split() == ["image", "label", "prob.", "steps", "error", "ms"]
        assert re.match(rf"stdin +{CLASSES[draw_scene('test', 0).label]} +[\d.]+% +\d+", first)
        assert {len(line) for line in (first, *levels)} == {len(header)}
        errors = [float(level.split()[1].rstrip("%")) for level in levels]
    assert len(errors) == 2
    assert errors[0] > errors[1]
    assert (tmp_path / "stdin.heatmap.png").is_file()


def test_exit_status_tells_wrong_usage_and_absent_servers(server, folder, tmp_path):
    assert explain().returncode == 2
    for options in ([], ["--stream"]):
        result = explain(folder / "one.png", "--url", "127.0.0.1:9", "--out", tmp_path / "out", *options)
        assert result.returncode == 3
        assert "the server cannot be reached: " in result.stderr
        assert "127.0.0.1:9" in result.stderr
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


@pytest.fixture
def explain_here(server, capsys):
    """Runs the command in this process, which is faster; gives exit status, output and messages."""

    def call(*words: object) -> tuple[object, str, str]:
        with pytest.raises(SystemExit) as ended:
            main([*map(str, words), "--url", server.grpc_url])
        return ended.value.code, *capsys.readouterr()

    return call


def test_a_folder_is_explained_twice_without_its_own_heatmaps(explain_here, folder, monkeypatch):
    monkeypatch.chdir(folder / "more")
    for _ in range(2):
        assert explain_here(".", "--out", ".", *FEW_STEPS)[2] == "2 of 2 explained; heatmaps in ./\n"
    assert len(list(Path().iterdir())) == 4


def test_skipped_images_are_in_the_report_and_other_options_are_noticed(explain_here, folder, tmp_path):
    images, page = [folder / "one.png", folder / "two.jpg"], tmp_path / "page.html"
    words = ["--out", tmp_path / "out", "--skip-existing", "--report", page, *FEW_STEPS]
    explain_here(images[0], *words)
    heatmap = (tmp_path / "out" / "one.heatmap.png").read_bytes()
    for options, message in (
        ([], "1 of 2 have their heatmaps\n"),
        (
            ["--target", CLASSES[3]],
            "0 of 2 have their heatmaps; 2 were made with other options, or for no report, and are explained again",
        ),
        (["--target", 3], "2 of 2 have their heatmaps\n"),
    ):
        _, _, said = explain_here(*images, *words, *options)
        assert message in said
        assert page.read_text().count("<article") == 2
        assert ((tmp_path / "out" / "one.heatmap.png").read_bytes() == heatmap) == (options == [])
    assert said.endswith("0 of 2 explained, 2 kept from before\n")


def test_classes_are_listed_and_taken_by_name(explain_here, folder, tmp_path):
    listed = explain_here("labels")[1].splitlines()
    assert [line.split(maxsplit=1) for line in listed] == [[str(index), label] for index, label in enumerate(CLASSES)]
    assert json.loads(explain_here("labels", "--json")[1]) == list(CLASSES)
    words = [folder / "one.png", "--out", tmp_path / "out", "--json", "--top-k", 1, *FEW_STEPS]
    line = json.loads(explain_here(*words, "--target", CLASSES[2].upper(), "--contrast", CLASSES[4])[1])
    assert (line["explained_class"], line["explained_label"]) == (2, CLASSES[2])
    shutil.rmtree(tmp_path / "out")
    for option in ("--target", "--contrast"):
        for name, message in (("hart", "near are heart"), (99, "99 is not one of the server's classes, 0 to")):
            code, _, said = explain_here(*words, option, name)
            assert code == 2
            assert f"explain: {option}" in said
            assert message in said
    assert not (tmp_path / "out").exists()


def in_terminal(*words: object, columns: int, **variables: str) -> str:
    """What the command shows on a terminal of so many columns, with its control characters."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    environment = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "NO_COLOR")} | variables
    command = [sys.executable, "-m", "explain_client", *map(str, words)]
    process = subprocess.Popen(command, stdout=theirs, stderr=theirs, stdin=theirs, env=environment | {"TERM": "xterm"})
    os.close(theirs)
    shown = b""
    with contextlib.suppress(OSError):  # how a terminal ends
        while piece := os.read(ours, 4096):
            shown += piece
    os.close(ours)
    process.wait(20)
    return shown.decode()


def test_output_fits_a_narrow_terminal_and_colours_can_be_switched_off(server, folder, tmp_path):
    images = [folder / name for name in ("one.png", "two.webp", "broken.png")]
    words = [*images, "--url", server.grpc_url, "--out", tmp_path, *FEW_STEPS]
    shown = in_terminal(*words, columns=60)
    assert "\x1b[31m" in shown
    table = [line for line in re.split(r"[\r\n]+", shown) if re.match(r"image |\S+\.(png|jpe?g|webp) +\S", line)]
    assert len(table) == 3
    assert max(map(len, table)) <= 60
    assert "\x1b[31m" not in in_terminal(images[-1], *words[3:], columns=60, NO_COLOR="1")


def test_a_closed_pipe_ends_the_run_quietly(server, folder, tmp_path):
    images = [folder / "one.png", folder / "two.jpg", folder / "two.webp"]
    command = [EXPLAIN, *images, "--url", server.grpc_url, "--out", tmp_path / "out", "--concurrency", 1, *FEW_STEPS]
    process = subprocess.Popen([*map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait(20) == 1
    assert len(list((tmp_path / "out").iterdir())) < len(images)


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
        ("ftp://localhost", "not HOST:PORT"),
    ):
        code, said = doctor(url)
        assert code == 1
        assert f"FAULT {'address' if '//' in url else 'protocol' if 'HTTP' in message else 'connection'}" in said
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
    """Resident memory of a process; 0 if it has ended."""
    lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    return next((int(line.split()[1]) for line in lines if line.startswith("VmRSS")), 0)


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
