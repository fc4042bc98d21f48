"""The clients through a proxy that speaks TLS and asks for a client certificate or a token: a real nginx."""

from __future__ import annotations

import asyncio
import json
import subprocess
import time
from pathlib import Path

import pytest
from conftest import encode, scene_image, scene_pixels
from programs import needs, run

from explain_client import (
    TLS,
    AsyncExplainClient,
    Classification,
    ExplainClient,
    RefusedError,
    TensorClient,
    UnavailableError,
)
from explain_client.cli import main
from explain_client.doctor import diagnose
from tools.server import Ports

pytestmark = [needs("nginx"), needs("openssl")]
TOKEN = "kept-secret"
CONFIG = """
worker_processes 1; pid nginx.pid; error_log error.log;
events {{ worker_connections 64; }}
http {{
    access_log off;
    ssl_certificate server.pem;
    ssl_certificate_key server.key;
    server {{
        listen 127.0.0.1:{tls} ssl http2;
        if ($http_authorization != "Bearer {token}") {{ return 401; }}
        location / {{ grpc_pass grpc://{server}; }}
    }}
    server {{
        listen 127.0.0.1:{mutual} ssl http2;
        ssl_client_certificate ca.pem;
        ssl_verify_client on;
        location / {{ grpc_pass grpc://{server}; }}
    }}
}}
"""


def certificate(folder: Path, name: str, *extensions: str) -> None:
    """A key and a certificate of that name, signed by the folder's CA."""
    keys = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-keyout", f"{name}.key"]
    signer = [] if name == "ca" else ["-CA", "ca.pem", "-CAkey", "ca.key"]
    added = [word for extension in extensions for word in ("-addext", extension)]
    words = ["req", "-x509", "-days", "2", "-subj", f"/CN={name}", *keys, *signer, *added, "-out", f"{name}.pem"]
    made = run("openssl", *words, cwd=folder)
    assert made.returncode == 0, made.stderr


@pytest.fixture(scope="module")
def proxy(server, tmp_path_factory):
    """The folder of the certificates, and the addresses that want a token and a certificate."""
    folder = tmp_path_factory.mktemp("nginx")
    certificate(folder, "ca", "basicConstraints=critical,CA:TRUE")
    certificate(folder, "server", "subjectAltName=IP:127.0.0.1", "basicConstraints=critical,CA:FALSE")
    certificate(folder, "client", "basicConstraints=critical,CA:FALSE")
    ports = Ports.free()
    config = CONFIG.format(tls=ports.http, mutual=ports.grpc, server=server.grpc_url, token=TOKEN)
    (folder / "nginx.conf").write_text(config)
    words = ["nginx", "-p", str(folder), "-c", str(folder / "nginx.conf"), "-g", "daemon off;"]
    process = subprocess.Popen(words, stderr=(folder / "stderr").open("w"))
    for _ in range(100):
        if (folder / "nginx.pid").is_file():
            break
        time.sleep(0.05)
    assert process.poll() is None, (folder / "stderr").read_text()
    yield folder, f"grpcs://127.0.0.1:{ports.http}", f"https://127.0.0.1:{ports.grpc}"
    process.terminate()
    process.wait(20)


def test_all_clients_speak_tls_and_send_a_token(proxy):
    folder, url, _ = proxy
    image, tls = encode(scene_image(0)), TLS(ca=folder / "ca.pem")

    async def ask():
        async with AsyncExplainClient(url, token=TOKEN, tls=tls) as client:
            await client.check()
            return await client.explain(image, n_steps=2, want=[])

    with ExplainClient(url, token=TOKEN, tls=tls) as client, TensorClient(url, token=TOKEN, tls=tls) as tensors:
        predicted = client.classify(image)[0].index
        assert client.view().crop == (224, 224)
        first, *levels = client.explain_stream(image, n_steps=2, want=[])
        assert isinstance(first, Classification)
        assert levels[-1].is_last
        assert tensors.classify(scene_pixels(0)[None].numpy())[0].argmax() == predicted
    assert asyncio.run(ask()).explained_class == predicted
    with ExplainClient(url, tls=tls) as client, pytest.raises(RefusedError, match="401") as refusal:
        client.classify(image)
    assert refusal.value.status == "UNAUTHENTICATED"


def test_the_systems_certificates_are_trusted_and_no_others(proxy, monkeypatch):
    folder, url, _ = proxy
    image = encode(scene_image(0))
    with (
        ExplainClient(url, token=TOKEN, retries=0, timeout=10) as client,
        pytest.raises(UnavailableError, match="CERT"),
    ):
        client.classify(image)
    monkeypatch.delenv("GRPC_DEFAULT_SSL_ROOTS_FILE_PATH", raising=False)
    monkeypatch.setenv("SSL_CERT_FILE", str(folder / "ca.pem"))
    with ExplainClient(url, token=TOKEN) as client:
        assert client.classify(image)


def test_a_client_certificate_is_shown(proxy):
    folder, _, url = proxy
    image = encode(scene_image(0))
    tls = TLS(folder / "ca.pem", folder / "client.pem", folder / "client.key")
    with ExplainClient(url, tls=tls) as client:
        assert client.explain(image, n_steps=2).n_steps == 2
    with ExplainClient(url, tls=TLS(folder / "ca.pem"), retries=0) as client, pytest.raises(Exception, match="400"):
        client.classify(image)
    assert next(diagnose(url, tls=tls)).name == "version"
    assert next(diagnose(url)).name == "server"  # cannot answer


def test_the_command_takes_files_headers_and_variables(proxy, tmp_path, monkeypatch, capsys):
    folder, with_token, with_certificate = proxy
    monkeypatch.chdir(tmp_path)
    Path("one.png").write_bytes(encode(scene_image(0)))
    files = ["--cacert", folder / "ca.pem", "--cert", folder / "client.pem", "--key", folder / "client.key"]
    for words, variables in (
        (["--url", with_certificate, *files], {}),
        (["--url", with_token, *files[:2], "-H", f"authorization: Bearer {TOKEN}"], {}),
        (["--url", with_token, *files[:2], "--token", TOKEN], {}),
        (files[:2], {"EXPLAIN_URL": with_token, "EXPLAIN_HEADERS": f"Authorization: Bearer {TOKEN}"}),
    ):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(SystemExit) as ended:
            main(["one.png", "--json", "--n-steps", "2", *map(str, words)])
        assert ended.value.code == 0
        assert json.loads(capsys.readouterr().out)["n_steps"] == 2
