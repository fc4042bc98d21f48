"""The whole library in a file that mypy checks strictly, as a user's editor does."""

import re

from mypy import api

from tools.paths import ROOT

PROGRAM = """
from pathlib import Path

import numpy as np
from PIL import Image

from explain_client import (
    TLS, AsyncExplainClient, Attribution, Classification, ExplainClient, ExplainError, Explanation, Level, Parameters,
    Prediction, RefusedError, TensorAttribution, TensorClient, TensorParameters, TimedOutError, UnavailableError, View,
    __version__,
)
from explain_client.images import as_seen

parameters: Parameters = {"tolerance": 0.05, "baseline": "blur", "polarity": "all"}
noise: TensorParameters = {"nt_samples": 4, "stdevs": 0.2, "seed": 1}


def run() -> None:
    tls = TLS(ca=Path("ca.pem"), certificate="client.pem", key="client.key")
    options: dict[str, str | int] = {"grpc.keepalive_time_ms": 1000}
    with ExplainClient(["a:1", "b:2"], 30.0, 2, headers={"x": "y"}, tls=tls, channel_options=options) as client:
        predictions: tuple[Prediction, ...] = client.classify(b"bytes", top_k=3)
        explanation: Explanation = client.explain("a.jpg", target="cat", **parameters)
        first, second = client.explain("a.jpg", targets=["cat", 3], tolerance=0.1)[:2]
        print(first.explained_label, second.error_estimate + 1)
        client.explain(Image.new("RGB", (8, 8)), target=3, contrast="cat", want=["heatmap"], deadline_ms=100)
        for response in client.explain_stream(np.zeros((8, 8, 3), np.uint8), method="riemann_middle", output="logit"):
            if isinstance(response, Classification):
                print(response.predictions[0].label, response.explained_label)
            else:
                print(response.is_last, response.error_estimate + 1)
        for result in client.explain_many([Path("a.jpg")], concurrency=2, colormap="turbo", clip_percentile=99.5):
            print(result if isinstance(result, Exception) else result.heatmap.size)
        labels: tuple[str, ...] = client.labels()
        view: View = client.view()
        as_seen(b"bytes", view).save("seen.png")
        print(labels, predictions, explanation.explained_label, explanation.n_steps + 1, __version__)


async def run_async() -> None:
    async with AsyncExplainClient("dns:///explain:8001") as client:
        await client.check()
        explanation: Attribution = await client.explain("a.jpg", **parameters)
        async for response in client.explain_stream("a.jpg", tolerance=0.1):
            level: Level | Classification = response
        async for result in client.explain_many(["a.jpg"], n_steps=4):
            if isinstance(result, (RefusedError, TimedOutError, UnavailableError, ExplainError, OSError)):
                raise result
            print(result.saliency, level, explanation.heatmap_png, (await client.labels())[0], await client.view())


def run_tensors() -> None:
    with TensorClient("https://node", shared_memory="system", token="t") as client:
        logits, _ = client.classify(np.zeros((1, 3, 224, 224), np.float32))
        answer: TensorAttribution = client.attribute(np.zeros((1, 3, 8, 8), np.float32), logits, [1], **noise)
        print(answer.attributions.shape)
"""


def check(program: str, folder, monkeypatch) -> str:
    monkeypatch.setenv("MYPYPATH", str(ROOT / "client" / "src"))
    (folder / "program.py").write_text(program)
    # Imports are followed as those of an installed package are.
    options = ["--strict", "--config-file=", "--follow-imports=silent", f"--cache-dir={ROOT}/.mypy_cache/strict"]
    said, trouble, _ = api.run([*options, str(folder / "program.py")])
    assert not trouble
    return said


def test_the_whole_library_is_typed_and_misspelt_parameters_are_refused(tmp_path, monkeypatch):
    wrong = {
        'client.explain("a.jpg", tolerence=0.1)': 'Unexpected keyword argument "tolerence"',
        'client.explain_stream("a.jpg", baseline="grey")': "incompatible type \"Literal['grey']\"",
        'client.explain_many(["a.jpg"], n_step=3)': 'Unexpected keyword argument "n_step"',
        'client.explain("a.jpg", n_steps="many")': "No overload variant",
    }
    program = f"{PROGRAM}\n\ndef wrong(client: ExplainClient) -> None:\n"
    first = program.count("\n") + 1
    said = check(program + "".join(f"    {line}\n" for line in wrong), tmp_path, monkeypatch)
    errors = dict(reversed(re.findall(r"program\.py:(\d+): error: (.*)", said)))  # the first of each line
    assert sorted(map(int, errors)) == list(range(first, first + len(wrong))), said
    for number, expected in enumerate(wrong.values(), first):
        assert expected in errors[str(number)]
