"""The notebook of the documentation runs."""

from __future__ import annotations

import nbformat
from conftest import scene_image
from nbclient import NotebookClient

from tools.paths import ROOT


def test_the_notebook_runs_and_shows_explanations(server, tmp_path, monkeypatch):
    monkeypatch.setenv("EXPLAIN_URL", server.grpc_url)
    scene_image(0).save(tmp_path / "photo.jpg")
    notebook = nbformat.read(ROOT / "docs" / "notebook.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells)
    NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    shown = [output.data["text/html"] for output in outputs if "text/html" in output.get("data", {})]
    assert len(shown) == 2
    assert all("<img" in each and "explanation accurate to about ±" in each for each in shown[:1])
    printed = "".join(output.text for output in outputs if output.output_type == "stream")
    assert "Classification(" in printed
    assert "FileNotFoundError" in printed
