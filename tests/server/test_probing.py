"""The health check, on the live server."""

from contextlib import nullcontext

import pytest

from tools.probe import NoAnswerError, ProbeError, probe, probe_patiently


def test_the_probe_asks_all_models(server):
    probe_patiently("127.0.0.1", server.ports.http, server.ports.metrics)
    probe_patiently("127.0.0.1", server.ports.http, server.ports.metrics, "classify")
    with pytest.raises(ProbeError, match="does not answer"):
        probe("127.0.0.1", 1)


@pytest.mark.parametrize("ended", [(3.0, 3.0), (3.0, 4.0)], ids=["none ends", "one ends"])
def test_late_streams_are_distinguished_from_streams_that_hang(server, monkeypatch, ended):
    """A real server; only its streams are made late."""

    def late(host, port, seconds):
        raise NoAnswerError("explain_stream did not answer")

    counts = iter(ended)
    monkeypatch.setattr("tools.probe.probe_stream", late)
    monkeypatch.setattr("tools.probe.total", lambda series, name: next(counts))
    with pytest.raises(NoAnswerError) if ended[0] == ended[1] else nullcontext():
        probe_patiently("127.0.0.1", server.ports.http, server.ports.metrics, seconds=3)
    assert next(counts, None) is None
