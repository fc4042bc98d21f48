"""A gRPC server with scripted answers, for those that Triton does not give on demand."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from concurrent import futures

import grpc
import numpy as np
from tritonclient.grpc import service_pb2, service_pb2_grpc
from tritonclient.utils import serialize_byte_tensor, triton_to_np_dtype


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
        add_tensor(response, "PROBABILITIES", "BYTES", (b"0.75:3:star",))
        add_tensor(response, "EXPLAINED_CLASS", "INT64", [3])
        response.parameters["triton_final_response"].bool_param = False
        yield message
        _wait(context)


class CutOff(Streaming):
    """Ends each stream after the prediction, which is not its last response."""

    def ModelStreamInfer(self, requests, context):  # noqa: N802
        yield next(super().ModelStreamInfer(requests, context))


def _wait(context):
    while context.is_active():
        time.sleep(0.02)


class Tied(Scripted):
    """Two classes with the same probability, of which the explained one comes second; records headers and targets."""

    def __init__(self, unavailable: int) -> None:
        super().__init__(unavailable)
        self.headers: list[dict[str, str]] = []

    def ModelInfer(self, request, context):  # noqa: N802
        self.headers.append(dict(context.invocation_metadata()))
        return self._answer(request)

    def ModelStreamInfer(self, requests, context):  # noqa: N802
        self.headers.append(dict(context.invocation_metadata()))
        for request in requests:
            response = self._answer(request)
            response.parameters["triton_final_response"].bool_param = True
            yield service_pb2.ModelStreamInferResponse(infer_response=response)

    def _answer(self, request):
        count = request.outputs[0].parameters["classification"].int64_param
        response = service_pb2.ModelInferResponse(model_name=request.model_name)
        classes = (b"0.5:0:star", b"0.5:1:ring", b"0.0:2:cross")[:count]
        add_tensor(response, "PROBABILITIES", "BYTES", classes)
        if request.model_name != "classify":
            target = np.frombuffer(request.raw_input_contents[1], np.int64)[0]
            target = 1 if target == -1 else target  # the predicted class
            add_tensor(response, "EXPLAINED_CLASS", "INT64", [target])
            add_tensor(response, "CONVERGENCE_DELTA", "FP32", [-1e-6])
            add_tensor(response, "N_STEPS", "INT32", [4])
            add_tensor(response, "ERROR_ESTIMATE", "FP32", [0.01])
        return response


class Leaving(Tied):
    """Stops, as Triton says it, for the first ``unavailable`` requests and streams; then answers as ``Tied``."""

    def ModelInfer(self, request, context):  # noqa: N802
        self.requests += 1
        if self.requests <= self.unavailable:
            context.abort(grpc.StatusCode.NOT_FOUND, unknown(request.model_name))
        return super().ModelInfer(request, context)

    def ModelStreamInfer(self, requests, context):  # noqa: N802
        self.requests += 1
        if self.requests <= self.unavailable:
            request = next(requests)
            yield service_pb2.ModelStreamInferResponse(error_message=unknown(request.model_name))
            return
        yield from super().ModelStreamInfer(requests, context)


def unknown(model: str) -> str:
    """What Triton 2.51 says of a model after SIGTERM."""
    return f"Request for unknown model: '{model}' has no available versions"


class Guarded(Tied):
    """Before a server that wants a token."""

    def ModelInfer(self, request, context):  # noqa: N802
        if dict(context.invocation_metadata()).get("authorization") != "Bearer secret":
            context.abort(grpc.StatusCode.UNAUTHENTICATED, "no token")
        return super().ModelInfer(request, context)


def add_tensor(response, name: str, datatype: str, values) -> None:
    response.outputs.add(name=name, datatype=datatype, shape=[1, len(values)])
    array = np.array(values, triton_to_np_dtype(datatype))
    content = serialize_byte_tensor(array).item() if datatype == "BYTES" else array.tobytes()
    response.raw_output_contents.append(content)


@contextlib.contextmanager
def scripted_server(
    unavailable: int, kind: type[Scripted] = Scripted, address: str = "127.0.0.1:0", **options: int
) -> Iterator[tuple[Scripted, str]]:
    """A servicer and its address. Names of gRPC's channel arguments in ``options`` lack the prefix ``grpc.``."""
    servicer = kind(unavailable)
    arguments = [("grpc.so_reuseport", 0), *((f"grpc.{name}", value) for name, value in options.items())]
    server = grpc.server(futures.ThreadPoolExecutor(64), options=arguments)
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(servicer, server)
    port = server.add_insecure_port(address)
    server.start()
    yield servicer, f"{address.rpartition(':')[0]}:{port}"
    server.stop(0).wait()
