"""Where the server is and how to reach it: addresses, TLS, headers and gRPC's channel options."""

from __future__ import annotations

import json
import os
import re
import socket
import ssl
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias, TypedDict
from urllib.parse import urlsplit

import grpc
import tritonclient.grpc as triton
import tritonclient.grpc.aio as triton_aio
from grpc.experimental import ChannelOptions
from tritonclient.grpc import service_pb2

from explain_client.errors import UnavailableError

DEFAULT_URL = "localhost:8001"
URL_VARIABLE, HEADERS_VARIABLE = "EXPLAIN_URL", "EXPLAIN_HEADERS"
PLAIN_PORT, TLS_PORT = 8001, 443
IS_TLS = {"grpc": False, "http": False, "grpcs": True, "https": True}
# Targets of gRPC's own resolvers, for example dns:///explain:8001 or unix:/run/triton.sock.
RESOLVER = re.compile(r"(dns|ipv4|ipv6|unix|unix-abstract|vsock|xds):(?!\d+$)")
ROUND_ROBIN = json.dumps({"loadBalancingConfig": [{"round_robin": {}}]})
LONGEST_MESSAGE = 2**31 - 1
# Of servers that go and come: when a connection ends, a name is looked up again, at most this often, and a server that
# cannot be reached is tried again at these intervals. gRPC's defaults are 30 s and 120 s.
LOOK_UP_MS, RECONNECT_MS = 5_000, 10_000

Url: TypeAlias = str | Sequence[str]
PathLike: TypeAlias = str | os.PathLike[str]


@dataclass(frozen=True)
class TLS:
    """How to speak TLS: PEM files.

    Attributes:
        ca: certificates to trust; the system's if None.
        certificate, key: of this client, if the server asks for one.
    """

    ca: PathLike | None = None
    certificate: PathLike | None = None
    key: PathLike | None = None

    def credentials(self) -> grpc.ChannelCredentials:
        """gRPC's credentials.

        Raises:
            ValueError: a certificate without a key, or the reverse.
            OSError: a file cannot be read.
        """
        if (self.certificate is None) != (self.key is None):
            raise ValueError("a client certificate needs its key, and a key its certificate")
        files = (self.ca or _system_roots(), self.key, self.certificate)
        return grpc.ssl_channel_credentials(*(None if file is None else Path(file).read_bytes() for file in files))


class ConnectionOptions(TypedDict):
    """Arguments of ``connect`` that the command gives to the clients."""

    url: Url | None
    headers: Mapping[str, str] | None
    token: str | None
    tls: TLS | None


@dataclass(frozen=True)
class Connection:
    """A server's address, resolved into what a gRPC channel takes.

    Attributes:
        name: the address as it was given, for messages.
        target: gRPC's target.
        credentials: of a channel with TLS, else None.
        headers: sent with every call; names in lower case.
        options: channel options.
    """

    name: str
    target: str
    credentials: grpc.ChannelCredentials | None = None
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)  # they may hold a secret
    options: Mapping[str, str | int] = field(default_factory=dict)

    def open(self) -> triton.InferenceServerClient:
        """A client; those of one connection share a channel's subchannels."""
        arguments = self._arguments()
        arguments["channel_args"].append((ChannelOptions.SingleThreadedUnaryStream, 1))  # for response_stream
        return self._with_headers(triton.InferenceServerClient(**arguments))

    def open_async(self) -> triton_aio.InferenceServerClient:
        """An asyncio client."""
        return self._with_headers(triton_aio.InferenceServerClient(**self._arguments()))

    def _arguments(self) -> dict[str, Any]:
        return {"url": self.target, "creds": self.credentials, "channel_args": list(self.options.items())}

    def _with_headers(self, client: Any) -> Any:
        def add_headers(request: Any) -> None:
            request.headers = {**self.headers, **(request.headers or {})}

        if self.headers:
            client.register_plugin(add_headers)
        return client


def response_stream(client: triton.InferenceServerClient) -> grpc.UnaryStreamMultiCallable:
    """The server's stream for one request, without threads of gRPC's.

    As a stream of requests, which is the same on the wire, it has two. The interpreter may end while one of them holds
    a lock that the stream's own end then waits for.
    """
    return client._channel.unary_stream(
        "/inference.GRPCInferenceService/ModelStreamInfer",
        request_serializer=service_pb2.ModelInferRequest.SerializeToString,
        response_deserializer=service_pb2.ModelStreamInferResponse.FromString,
    )


def connect(
    url: Url | None = None,
    headers: Mapping[str, str] | None = None,
    token: str | None = None,
    tls: TLS | None = None,
    channel_options: Mapping[str, str | int] | None = None,
) -> Connection:
    """How to reach a server; nothing is sent yet.

    Args:
        url: HOST:PORT, or with a prefix: ``grpc://`` or ``http://`` (port 8001 if absent), ``grpcs://`` or ``https://``
            for TLS (port 443 if absent), or a target of gRPC's resolvers such as ``dns:///explain:8001``. Several
            addresses, in a sequence or with commas between them, and those of a ``dns:`` target are used in turn, by
            gRPC's round robin. None: the variable EXPLAIN_URL, else ``localhost:8001``.
        headers: sent with every call, added to those of the variable EXPLAIN_HEADERS (``Name: value``, one a line).
        token: sent as ``authorization: Bearer TOKEN``.
        tls: files for TLS; absent, TLS is spoken if the address's prefix says so, with the system's certificates.
        channel_options: gRPC's channel arguments, for example ``{"grpc.keepalive_time_ms": 30_000}``.

    Raises:
        ValueError: an address or a header is malformed, or they contradict ``tls``.
        OSError: a file of ``tls`` cannot be read.
        UnavailableError: the name of one of several hosts cannot be resolved.
    """
    given = url or os.environ.get(URL_VARIABLE) or DEFAULT_URL
    addresses = [given] if isinstance(given, str) and RESOLVER.match(given) else _split(given)
    parsed = [_parse(address, tls is not None) for address in addresses]
    name = ", ".join(addresses)
    if len({is_tls for _, is_tls in parsed}) > 1:
        raise ValueError(f"{name}: some addresses are with TLS and some without")
    options: dict[str, str | int] = {
        "grpc.max_send_message_length": LONGEST_MESSAGE,
        "grpc.max_receive_message_length": LONGEST_MESSAGE,
        "grpc.dns_min_time_between_resolutions_ms": LOOK_UP_MS,
        "grpc.max_reconnect_backoff_ms": RECONNECT_MS,
    }
    target, is_tls = parsed[0]
    if len(parsed) > 1:
        if is_tls:  # else gRPC expects a certificate for the list
            options["grpc.ssl_target_name_override"] = target.rpartition(":")[0]
        target = _target_of([target for target, _ in parsed])
    if len(parsed) > 1 or target.startswith("dns:"):
        options["grpc.service_config"] = ROUND_ROBIN
    sent = _read_headers(os.environ.get(HEADERS_VARIABLE, "")) | ({"authorization": f"Bearer {token}"} if token else {})
    return Connection(
        name,
        target,
        (tls or TLS()).credentials() if is_tls else None,
        sent | _checked(headers or {}),
        options | dict(channel_options or {}),
    )


def parse_header(text: str) -> tuple[str, str]:
    """Name and value of ``Name: value``.

    Raises:
        ValueError: it is none.
    """
    name, colon, value = text.partition(":")
    if not colon:
        raise ValueError(f"a header is NAME: VALUE, not {text!r:.40}")
    ((name, value),) = _checked({name.strip(): value.strip()}).items()
    return name, value


def _read_headers(text: str) -> dict[str, str]:
    return dict(parse_header(line) for line in text.splitlines() if line.strip())


def _checked(headers: Mapping[str, str]) -> dict[str, str]:
    """The headers with their names in lower case, as gRPC wants them."""
    for name, value in headers.items():
        if not re.fullmatch(r"[0-9A-Za-z_.-]+", name):
            raise ValueError(f"{name!r:.40} is no name of a header")
        if not re.fullmatch(r"[ -~]*", value):  # its value may be a secret
            raise ValueError(f"the value of the header {name!r} is not printable ASCII")
    return {name.lower(): value for name, value in headers.items()}


def _split(url: Url) -> list[str]:
    parts = url.split(",") if isinstance(url, str) else list(url)
    return [part.strip() for part in parts]


def _parse(address: str, has_tls: bool) -> tuple[str, bool]:
    """The target of one address, and whether it is with TLS."""
    if RESOLVER.match(address):
        return address, has_tls
    scheme, separator, place = address.rpartition("://")
    problem = f"{address!r} is not HOST:PORT, for example {DEFAULT_URL}, nor grpc(s)://HOST:PORT"
    if separator and scheme.lower() not in IS_TLS:
        raise ValueError(problem)
    is_tls = IS_TLS[scheme.lower()] if separator else has_tls
    if has_tls and not is_tls:
        raise ValueError(f"{address!r} is without TLS, but TLS is asked for: write grpcs://")
    try:
        parts = urlsplit(f"//{place}")
        host, port = parts.hostname, parts.port
    except ValueError:
        raise ValueError(problem) from None
    if not host or parts.username is not None or parts.path.strip("/") or parts.query or re.search(r"\s", place):
        raise ValueError(problem)
    host = f"[{host}]" if ":" in host else host
    return f"{host}:{port or (TLS_PORT if is_tls else PLAIN_PORT)}", is_tls


def _target_of(addresses: Sequence[str]) -> str:
    """gRPC's target for a list, which must have numbers instead of names."""
    found = []
    for address in addresses:
        host, _, port = address.rpartition(":")
        try:
            entries = socket.getaddrinfo(host, int(port), socket.AF_INET, socket.SOCK_STREAM)
        except (OSError, ValueError) as error:
            raise UnavailableError(f"{address} has no IPv4 address: {error}") from error
        found += [f"{entry[4][0]!s}:{port}" for entry in entries]
    return "ipv4:" + ",".join(dict.fromkeys(found))


def _system_roots() -> str | None:
    """The system's trusted certificates; None for those of gRPC's package, or of gRPC's own variable."""
    if "GRPC_DEFAULT_SSL_ROOTS_FILE_PATH" in os.environ:
        return None
    return ssl.get_default_verify_paths().cafile or next(filter(os.path.exists, BUNDLES), None)


# Where distributions keep them, for a Python whose OpenSSL was built for another one (Go's crypto/x509 has this list).
BUNDLES = (
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/ssl/ca-bundle.pem",
    "/etc/pki/ca-trust/extracted/pem/tls-ca-bundle.pem",
    "/etc/ssl/cert.pem",
)
