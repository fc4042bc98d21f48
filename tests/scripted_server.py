"""A gRPC server with scripted answers, for those that Triton does not give on demand."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from concurrent import futures

import grpc
from tritonclient.grpc import service_pb2, service_pb2_grpc


class Scripted(service_pb2_grpc.GRPCInferenceServiceServicer):
    """Answers UNAVAILABLE to the first ``unavailable`` requests, then a prediction."""

    def __init__(self, unavailable: int) -> None:
        self.unavailable, self.requests = unavailable, 0

    def ModelInfer(self, request, context):  # noqa: N802
        self.requests += 1
        if self.requests <= self.unavailable:
            context.abort(grpc.StatusCode.UNAVAILABLE, "no room")
        response = service_pb2.ModelInferResponse(model_name=request.model_name)
        output = response.outputs.add(name="PROBABILITIES", datatype="BYTES", shape=[1, 1])
        output.contents.bytes_contents.append(b"0.75:3:star")
        return response


@contextlib.contextmanager
def scripted_server(unavailable: int, kind: type[Scripted] = Scripted) -> Iterator[tuple[Scripted, str]]:
    servicer = kind(unavailable)
    server = grpc.server(futures.ThreadPoolExecutor(2))
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield servicer, f"127.0.0.1:{port}"
    server.stop(0).wait()
