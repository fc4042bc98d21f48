"""The list of error codes, and its readers."""

import pytest
from attribution_metrics import OUTCOMES
from error_codes import STATUSES, code_of
from tritonclient.utils import InferenceServerException

from explain_client.errors import STATUS_BY_CODE, RefusedError, UnavailableError, from_stream


@pytest.mark.parametrize(
    ("message", "code"),
    [
        ("[invalid] parameter 'n_steps' must be", "invalid"),
        ("in ensemble 'explain', [late] the request's timeout", "late"),
        ("[unknown] of another server", None),
        ("IMAGE [invalid] is no beginning", None),
        ("Request timeout expired", None),
    ],
)
def test_a_code_stands_at_the_beginning(message, code):
    assert code_of(message) == code


def test_the_client_knows_the_servers_codes_and_the_metrics_count_them():
    assert {name: {"INVALID_ARG": "INVALID_ARGUMENT"}.get(each, each) for name, each in STATUSES.items()} == (
        STATUS_BY_CODE
    )
    assert set(OUTCOMES) == {"explained", *STATUSES}


def test_a_streams_error_is_what_its_code_says():
    refused = from_stream(InferenceServerException("[invalid] IMAGE is not a JPEG file"))
    assert isinstance(refused, RefusedError)
    assert refused.status == "INVALID_ARGUMENT"
    assert isinstance(from_stream(InferenceServerException("[overloaded] the most streams")), UnavailableError)
    assert from_stream(InferenceServerException("something else")).status == ""
