"""A gRPC server with scripted answers, for those that Triton does not give on demand."""

from __future__ import annotations

import contextlib
import time
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


class Streaming(Scripted):
    """Answers each stream with a prediction and nothing more until it is cancelled; other requests not even that."""

    def ModelInfer(self, request, context):  # noqa: N802
        self.requests += 1
        _wait(context)
        return service_pb2.ModelInferResponse()

    def ModelStreamInfer(self, requests, context):  # noqa: N802
        self.requests += 1
        next(requests)
        message = service_pb2.ModelStreamInferResponse()
        response = message.infer_response
        for name, datatype, content in (
            ("PROBABILITIES", "BYTES", b"\x0b\0\0\x000.75:3:star"),
            ("EXPLAINED_CLASS", "INT64", (3).to_bytes(8, "little")),
        ):
            response.outputs.add(name=name, datatype=datatype, shape=[1, 1])
            response.raw_output_contents.append(content)
        response.parameters["triton_final_response"].bool_param = False
        yield message
        _wait(context)


def _wait(context):
    while context.is_active():
        time.sleep(0.02)


@contextlib.contextmanager
def scripted_server(unavailable: int, kind: type[Scripted] = Scripted) -> Iterator[tuple[Scripted, str]]:
    servicer = kind(unavailable)
    server = grpc.server(futures.ThreadPoolExecutor(64))
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield servicer, f"127.0.0.1:{port}"
    server.stop(0).wait()
