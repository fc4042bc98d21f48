"""Clients learn which network a server explains."""

from __future__ import annotations

import asyncio
import hashlib

from explain_client import AsyncExplainClient, ExplainClient


def test_client_learns_the_networks_name_and_checksum(server, repository):
    with ExplainClient(server.grpc_url) as client:
        network = client.network()
    assert network.architecture == "resnet18"
    assert network.weights == "shapes"
    assert network.sha256 == hashlib.sha256((repository / "classifier" / "1" / "model.pt").read_bytes()).hexdigest()

    async def ask():
        async with AsyncExplainClient(server.grpc_url) as client:
            return await client.network()

    assert asyncio.run(ask()) == network
