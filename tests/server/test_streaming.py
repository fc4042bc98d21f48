"""`explain_stream`, on the live server."""

import re
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from conftest import encode, relative_distance, scene_image
from live_server import Stream, infer, rows_passed

PREDICTION = {"PROBABILITIES", "EXPLAINED_CLASS"}
ATTRIBUTION = {"ATTRIBUTIONS", "SALIENCY", "CONVERGENCE_DELTA", "N_STEPS", "ERROR_ESTIMATE", "HEATMAP"}


@pytest.fixture(scope="module")
def image() -> bytes:
    return encode(scene_image(0))


def test_prediction_comes_first_then_ever_better_attributions(server, triton, image):
    before = rows_passed(server)
    heard = Stream(server, [image]).hear()
    # A part takes as many rows as it has nodes, so a stream takes as many as one explanation.
    assert rows_passed(server) - before == 50
    assert heard.error is None
    assert heard.finals == [False, False, False, True]
    first, *levels = heard.responses
    assert set(first) == PREDICTION
    assert all(set(level) == ATTRIBUTION for level in levels)
    assert [level["N_STEPS"][0, 0] for level in levels] == [13, 25, 50]
    integral = infer(triton, [image], n_steps=128, method="riemann_middle")
    errors = [relative_distance(level["ATTRIBUTIONS"], integral["ATTRIBUTIONS"]) for level in levels]
    estimates = [level["ERROR_ESTIMATE"][0, 0] for level in levels]
    assert errors[0] > errors[1] > errors[2]
    assert estimates[0] > estimates[1] > estimates[2]

    whole = infer(triton, [image])
    assert relative_distance(levels[-1]["ATTRIBUTIONS"], whole["ATTRIBUTIONS"]) <= 1e-5
    assert relative_distance(levels[-1]["SALIENCY"], whole["SALIENCY"]) <= 1e-5
    assert levels[-1]["CONVERGENCE_DELTA"] == pytest.approx(whole["CONVERGENCE_DELTA"], abs=1e-3)
    np.testing.assert_allclose(first["PROBABILITIES"], whole["PROBABILITIES"], atol=1e-5)
    assert first["EXPLAINED_CLASS"] == whole["EXPLAINED_CLASS"]
    assert levels[-1]["HEATMAP"][0, 0][:4] == b"\x89PNG"


@pytest.mark.parametrize(
    "parameters",
    [
        {"n_steps": 20, "method": "riemann_trapezoid", "output": "probability"},
        {"tolerance": 0.05, "clip_percentile": 98.5},
        {"method": "calibrated", "n_steps": 10},
        {"n_steps": 8, "nt_samples": 2, "baseline": "blur"},
        {"n_steps": 4, "contrast": 5, "baseline": "black,white"},
    ],
    ids=str,
)
def test_last_response_is_the_answer_of_explain(server, triton, image, parameters):
    heard = Stream(server, [image], [3], overlay="heatmap", **parameters).hear()
    assert (heard.error, heard.finals[-1]) == (None, True)
    whole = infer(triton, [image], [3], overlay="heatmap", **parameters)
    last = heard.responses[-1]
    assert relative_distance(last["ATTRIBUTIONS"], whole["ATTRIBUTIONS"]) <= 1e-5
    assert heard.responses[0]["EXPLAINED_CLASS"][0, 0] == 3


def test_deadline_of_a_stream_counts_from_its_arrival(server, triton, image):
    infer(triton, [image], deadline_ms=300)  # records the time of such passes
    started = time.monotonic()
    heard = Stream(server, [image], n_steps=1000, deadline_ms=500).hear()
    # On a busy machine the last pass may be long after the deadline.
    assert time.monotonic() - started < 2.5
    assert heard.error is None
    assert 0 < heard.responses[-1]["ERROR_ESTIMATE"][0, 0] < 2


def test_images_of_one_stream_keep_their_own_answers(server, triton):
    images = [encode(scene_image(index)) for index in range(2)]
    heard = Stream(server, images, [-1, 7], n_steps=8).hear()
    for index, target in enumerate((-1, 7)):
        alone = infer(triton, images[index : index + 1], [target], n_steps=8)
        assert relative_distance(heard.responses[-1]["ATTRIBUTIONS"][index], alone["ATTRIBUTIONS"][0]) <= 1e-5
        assert heard.responses[0]["EXPLAINED_CLASS"][index] == alone["EXPLAINED_CLASS"][0]


def test_only_requested_outputs_are_computed_and_sent(server, image):
    before = rows_passed(server)
    heard = Stream(server, [image], outputs=["PROBABILITIES"]).hear()
    assert [set(response) for response in heard.responses] == [{"PROBABILITIES"}]
    assert heard.finals == [True]
    assert rows_passed(server) == before
    heard = Stream(server, [image], outputs=["HEATMAP"], n_steps=8).hear()
    assert [set(response) for response in heard.responses] == [{"HEATMAP"}]


@pytest.mark.parametrize(
    ("file", "target", "parameters", "message", "responses"),
    [
        (b"text", None, {}, "IMAGE", 0),
        (None, 12, {}, "TARGET must be from -1 .* to 11, not 12", 0),
        (None, -2, {}, "TARGET must be from -1 .* to 11, not -2", 0),
        (None, None, {"n_steps": 0}, "'n_steps' must be an integer", 1),
        (None, None, {"n_steps": 2**63 - 1}, "'n_steps' must be an integer", 1),
        (None, None, {"n_steps": "many"}, "'n_steps' must be an integer", 1),
        (None, None, {"steps": 8}, "unknown parameter 'steps'", 1),
        (None, None, {"tolerance": 7}, "'tolerance' must be a number", 1),
        (None, None, {"deadline_ms": 60001}, "'deadline_ms' must be a number", 1),
        (None, None, {"deadline_ms": 50, "method": "calibrated"}, "'method' must be absent", 1),
        (None, None, {"deadline_ms": "soon"}, "'deadline_ms' must be a number", 1),
        (None, None, {"overlay": "disco", "n_steps": 4}, "'overlay' must be one of", 1),
    ],
    ids=str,
)
def test_an_error_ends_the_stream(server, image, file, target, parameters, message, responses):
    heard = Stream(server, [file or image], None if target is None else [target], **parameters).hear()
    assert len(heard.responses) == responses
    assert not any(heard.finals)
    assert re.search(message, heard.error.message())
    assert Stream(server, [image], n_steps=1).hear().error is None


def test_cancelled_stream_stops_costing_rows(server, image):
    before = rows_passed(server)
    stream = Stream(server, [image], n_steps=1000)
    outputs, final = stream.next()
    assert (set(outputs), final) == (PREDICTION, False)
    stream.client.stop_stream(cancel_requests=True)
    stream.client.close()
    time.sleep(3)
    spent = rows_passed(server) - before
    time.sleep(2)
    assert rows_passed(server) - before == spent
    # The request under way at the cancellation and the next: at most 32 rows each.
    assert spent <= 64


def test_more_streams_than_the_server_takes_are_refused_and_the_others_answered(server, image):
    with ThreadPoolExecutor(70) as pool:
        heards = list(pool.map(lambda _: Stream(server, [image], outputs=["N_STEPS"], n_steps=4).hear(), range(70)))
    refused = [heard for heard in heards if heard.error is not None]
    assert 1 <= len(refused) <= 6, {str(heard.error) for heard in refused}
    assert all("the most streams that this server takes, 64," in heard.error.message() for heard in refused)
    assert all(heard.responses[-1]["N_STEPS"][0, 0] == 4 for heard in heards if heard.error is None)
    assert Stream(server, [image], n_steps=1).hear().error is None
