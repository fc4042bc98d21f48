"""What the command refuses before it asks a server: here there is none, which would give another exit status."""

import pytest

from explain_client import __version__
from explain_client.cli import main
from explain_client.output import NO_SERVER, WRONG_USAGE
from explain_client.parameters import NAMES, choices

NOWHERE = ["--url", "127.0.0.1:9"]


def explain(*words: object, capsys) -> tuple[object, str]:
    with pytest.raises(SystemExit) as ended:
        main([*map(str, words)])
    return ended.value.code, capsys.readouterr().err


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "one.png"
    path.write_bytes(b"image")
    return path


def option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


@pytest.mark.parametrize("name", [name for name in NAMES if choices(name)])
def test_words_are_choices(name, image, capsys):
    code, said = explain(image, option(name), "guess", *NOWHERE, capsys=capsys)
    assert code == WRONG_USAGE
    assert f"argument {option(name)}: invalid choice: 'guess'" in said
    assert choices(name)[-1] in said


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--tolerance", 7], "--tolerance: must be a number from 0.001 to 0.5, not 7"),
        (["--tolerance", "nan"], "--tolerance: must be a number from 0.001 to 0.5, not nan"),
        (["--n-steps", 0], "--n-steps: must be an integer from 1, not 0"),
        (["--n-steps", "few"], "--n-steps: must be an integer from 1, not 'few'"),
        (["--deadline-ms", 0], "--deadline-ms: must be a number from 1 to 60000, not 0"),
        (["--nt-samples", 0], "--nt-samples"),
        (["--stdevs", 11], "--stdevs"),
        (["--seed", -1], "--seed"),
        (["--clip-percentile", 49], "--clip-percentile"),
        (["--contrast", -1], "--contrast: must be a class, not -1"),
        (["--target", -2], "--target: must be a class, not -2"),
        (["--top-k", 0], "--top-k: must be an integer from 1, not 0"),
        (["--concurrency", 0], "--concurrency"),
        (["--timeout", 0], "--timeout"),
        (["--timeout", "inf"], "--timeout"),
        (["--tolerance", 0.1, "--method", "riemann_left"], "method must be absent beside tolerance"),
        (["--method", "riemann_left", "--n-steps", 1], "n_steps must be at least 2 with riemann_left"),
        (["--tolerence=0.1"], "unrecognized arguments: --tolerence=0.1; did you mean '--tolerance'?"),
        (["--polarty=all"], "did you mean '--polarity'?"),
        (["--header", "nothing"], "a header is NAME: VALUE, not 'nothing'"),
        (["--stream", "--report", "x.html"], "--stream takes neither --report nor --contact-sheet"),
        (["--url", "ftp://node"], "explain: 'ftp://node' is not HOST:PORT"),
        (["--cert", "client.pem"], "explain: a client certificate needs its key"),
        (["--cacert", "absent.pem"], "absent.pem"),
    ],
)
def test_values_are_checked(words, message, image, capsys):
    if "--url" not in words:
        words = [*words, "--url", "grpcs://127.0.0.1:9" if words[0] in ("--cert", "--cacert") else NOWHERE[1]]
    code, said = explain(image, *words, capsys=capsys)
    assert code == WRONG_USAGE
    assert message in said.replace("\n", " ")
    assert len(said.splitlines()) <= 3


def test_paths_that_cannot_be_written_are_a_sentence(image, tmp_path, capsys):
    for words in (
        ["--out", image],
        ["--out", image / "below"],
        ["--out", "/proc/none"],
        ["--out", "/proc"],
        ["--report", tmp_path],
        ["--report", image / "report.html"],
        ["--report", "/proc/none/report.html"],
    ):
        code, said = explain(image, *words, *NOWHERE, capsys=capsys)
        assert code == WRONG_USAGE, words
        assert len(said.splitlines()) == 1
        assert str(words[1]).removesuffix("/report.html") in said


def test_an_empty_folder_is_no_run(tmp_path, capsys):
    code, said = explain(tmp_path, *NOWHERE, capsys=capsys)
    assert (code, said) == (WRONG_USAGE, "explain: no images found\n")


def test_an_absent_server_leaves_no_folder(image, tmp_path, capsys):
    out = tmp_path / "new" / "out"
    code, said = explain(image, "--out", out, "--report", tmp_path / "pages" / "x.html", *NOWHERE, capsys=capsys)
    assert code == NO_SERVER
    assert "cannot be reached" in said
    assert [path.name for path in tmp_path.iterdir()] == ["one.png"]


def test_the_address_is_that_of_the_variable(image, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("EXPLAIN_URL", "ftp://variable")
    for command in ([image], ["labels"]):
        code, said = (
            explain(*command, "--out", tmp_path, capsys=capsys)
            if command == [image]
            else explain("labels", capsys=capsys)
        )
        assert code == WRONG_USAGE
        assert "ftp://variable" in said


def test_version(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"explain-client {__version__}\n"
