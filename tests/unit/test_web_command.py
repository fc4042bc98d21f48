"""``explain web`` ends with one sentence where it cannot serve."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest

from explain_client import cli


def test_without_gradio_it_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(SystemExit) as ended:
        cli.main(["web"])
    assert ended.value.code == cli.WRONG_USAGE
    assert "pip install 'explain-client[web]'" in capsys.readouterr().err


def test_without_a_server_it_says_so(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", ModuleType("gradio"))
    with pytest.raises(SystemExit) as ended:
        cli.main(["web", "--url", "127.0.0.1:1"])
    assert ended.value.code == cli.NO_SERVER
    assert capsys.readouterr().err.startswith("the server cannot be reached: ")
