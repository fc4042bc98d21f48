"""The stand-in for libtorch's backend, outside Triton: what it reads from a model's config."""

from __future__ import annotations

import importlib.util
import json
import sys
import types

import pytest
import torch

from tools.paths import ROOT


@pytest.mark.parametrize(("parameters", "threads"), [({"INTRA_OP_THREAD_COUNT": {"string_value": "3"}}, [3]), ({}, [])])
def test_a_config_may_set_the_threads_by_libtorchs_name(monkeypatch, tmp_path, parameters, threads):
    class ModelError(Exception):
        pass

    utilities = types.ModuleType("triton_python_backend_utils", "What the stand-in takes from Triton.")
    vars(utilities)["TritonModelException"] = ModelError
    monkeypatch.setitem(sys.modules, utilities.__name__, utilities)
    file = ROOT / "tools" / "triton" / "pytorch_backend" / "model.py"
    spec = importlib.util.spec_from_file_location("pytorch_backend_model", file)
    backend = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(backend)
    chosen: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    config = {"input": [], "output": [], "parameters": parameters, "default_model_filename": ""}
    arguments = {
        "model_config": json.dumps(config),
        "model_instance_kind": "CPU",
        "model_repository": str(tmp_path),
        "model_version": "1",
    }
    with pytest.raises(ModelError, match=r"model\.pt is missing"):  # after its settings have been read
        backend.TritonPythonModel().initialize(arguments)
    assert chosen == threads
