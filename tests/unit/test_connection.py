"""Addresses, headers and files of a connection."""

import pytest

from explain_client import TLS, AsyncExplainClient, ExplainClient, TensorClient, UnavailableError
from explain_client.connection import ROUND_ROBIN, connect, parse_header


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch):
    for name in ("EXPLAIN_URL", "EXPLAIN_HEADERS"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("url", "target", "is_tls"),
    [
        (None, "localhost:8001", False),
        ("node:9001", "node:9001", False),
        ("node", "node:8001", False),
        ("http://node:9001/", "node:9001", False),
        ("grpc://node", "node:8001", False),
        ("https://node", "node:443", True),
        ("GRPCS://node:8443", "node:8443", True),
        ("grpc://[::1]:8001", "[::1]:8001", False),
        ("unix:/run/triton.sock", "unix:/run/triton.sock", False),
    ],
)
def test_addresses_become_targets_of_grpc(url, target, is_tls):
    connection = connect(url)
    assert connection.target == target
    assert (connection.credentials is not None) == is_tls
    assert "grpc.service_config" not in connection.options


def test_several_servers_are_used_in_turn():
    for url, target in (
        ("dns:///explain:8001", "dns:///explain:8001"),
        (["127.0.0.1:8001", "localhost:9001"], "ipv4:127.0.0.1:8001,127.0.0.1:9001"),
        ("127.0.0.1:8001,127.0.0.2", "ipv4:127.0.0.1:8001,127.0.0.2:8001"),
    ):
        connection = connect(url, channel_options={"grpc.keepalive_time_ms": 1000})
        assert connection.target == target
        assert connection.options["grpc.service_config"] == ROUND_ROBIN
        assert connection.options["grpc.keepalive_time_ms"] == 1000
    with pytest.raises(UnavailableError, match=r"nowhere\.invalid:8001 has no IPv4 address"):
        connect(["nowhere.invalid", "localhost"])


@pytest.mark.parametrize(
    "url",
    ["ftp://node", "node:port", "http://", "http://node/path", "http://me:secret@node", "a b:1", "node:99999", "a,,b"],
)
@pytest.mark.parametrize("client", [ExplainClient, AsyncExplainClient, TensorClient])
def test_addresses_that_are_none_are_refused(url, client):
    with pytest.raises(ValueError, match=r"is not HOST:PORT, for example localhost:8001"):
        client(url)


def test_tls_and_the_prefix_must_agree():
    assert connect("node", tls=TLS()).target == "node:443"
    with pytest.raises(ValueError, match="without TLS, but TLS is asked for"):
        connect("http://node", tls=TLS())
    with pytest.raises(ValueError, match="some addresses are with TLS and some without"):
        connect(["https://node", "http://node"])


def test_files_of_tls_are_read_at_once(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"absent\.pem"):
        connect("node", tls=TLS(ca=tmp_path / "absent.pem"))
    with pytest.raises(ValueError, match="a client certificate needs its key"):
        connect("node", tls=TLS(certificate=tmp_path / "client.pem"))


def test_variables_give_address_and_headers(monkeypatch):
    monkeypatch.setenv("EXPLAIN_URL", "grpc://node:1")
    monkeypatch.setenv("EXPLAIN_HEADERS", "Authorization: Basic YTpi\n\nX-Team: vision: 1\n")
    connection = connect()
    assert connection.target == "node:1"
    assert connection.headers == {"authorization": "Basic YTpi", "x-team": "vision: 1"}
    assert connect("other:2", {"X-Team": "b"}, "secret").headers == {"authorization": "Bearer secret", "x-team": "b"}
    assert "secret" not in repr(connect(token="secret"))


@pytest.mark.parametrize("header", ["no colon", "with space: x", ": x", "name: ü"])
def test_headers_that_are_none_are_refused(header):
    with pytest.raises(ValueError, match="header") as refusal:
        parse_header(header)
    assert "ü" not in str(refusal.value)  # a value may be a secret
