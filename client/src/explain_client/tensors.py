"""For callers that preprocess themselves: tensors in and out, through shared memory on the server's own host."""

from __future__ import annotations

import contextlib
import uuid
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
import tritonclient.grpc as triton
from tritonclient.utils import InferenceServerException

from explain_client.connection import TLS, Url, connect
from explain_client.errors import closed_error, from_triton
from explain_client.parameters import as_sent

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from explain_client.parameters import TensorParameters

FloatArray = npt.NDArray[np.float32]
SharedMemory = Literal["system", "cuda"]


@dataclass(frozen=True)
class TensorAttribution:
    """The answer of ``integrated_gradients`` for n images.

    Attributes:
        attributions: float32 [n, channels, height, width].
        explained_classes: int64 [n].
        convergence_deltas, error_estimates: float32 [n]; the latter NaN where the method gives none.
        n_steps: int32 [n].
    """

    attributions: FloatArray
    explained_classes: npt.NDArray[np.int64]
    convergence_deltas: FloatArray
    n_steps: npt.NDArray[np.int32]
    error_estimates: FloatArray


class TensorClient:
    """Calls ``classifier`` and ``integrated_gradients`` with normalised pixels; not for several threads at once.

    Args:
        url: as of ``ExplainClient``, whose other arguments for the connection this class takes, too.
        timeout: seconds for a request.
        shared_memory: transfer pixels and attributions through system or CUDA shared memory of this host; None: over
            the connection.
        headers: sent with every call; for a server that restricts the shared-memory API, its key.
        device: number of the CUDA device whose memory is shared.

    Every method raises the errors of ``ExplainClient``'s methods.
    """

    def __init__(
        self,
        url: Url | None = None,
        timeout: float = 300.0,
        shared_memory: SharedMemory | None = None,
        headers: Mapping[str, str] | None = None,
        device: int = 0,
        *,
        token: str | None = None,
        tls: TLS | None = None,
        channel_options: Mapping[str, str | int] | None = None,
    ) -> None:
        self._triton = connect(url, headers, token, tls, channel_options).open()
        self._timeout = timeout
        self._kind, self._device = shared_memory, device
        self._regions: dict[str, _Region] = {}
        # Called at the interpreter's exit at the latest: shared memory would remain.
        self._close = weakref.finalize(self, _close, self._triton, self._regions)

    def __enter__(self) -> TensorClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Free the shared memory and close the connection."""
        self._close()

    def classify(self, pixels: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Logits and probabilities, float32 [n, classes], of normalised float32 pixels [n, channels, height, width]."""
        result = self._infer("classifier", [self._shared_input("INPUT__0", pixels)], ["OUTPUT__0", "OUTPUT__1"], {})
        return result.as_numpy("OUTPUT__0"), result.as_numpy("OUTPUT__1")

    def attribute(
        self,
        pixels: FloatArray,
        logits: FloatArray,
        targets: Sequence[int] | None = None,
        **parameters: Unpack[TensorParameters],
    ) -> TensorAttribution:
        """The attributions of normalised pixels.

        Args:
            pixels: float32 [n, channels, height, width].
            logits: float32 [n, classes], from ``classify`` for these pixels.
            targets: class to explain of each image; None: the predicted ones.
            parameters: request parameters of the serving contract.
        """
        inputs = [self._shared_input("PIXELS", pixels), _input("LOGITS", np.ascontiguousarray(logits, np.float32))]
        if targets is not None:
            inputs.append(_input("TARGET", np.asarray(targets, np.int64)[:, None]))
        names = ["EXPLAINED_CLASS", "CONVERGENCE_DELTA", "N_STEPS", "ERROR_ESTIMATE"]
        shared = self._region("ATTRIBUTIONS", pixels.nbytes)
        result = self._infer("integrated_gradients", inputs, [*names, "ATTRIBUTIONS"], parameters, shared)
        explained, deltas, steps, errors = (result.as_numpy(name)[:, 0] for name in names)
        attributions = result.as_numpy("ATTRIBUTIONS") if shared is None else shared.read(pixels.shape)
        return TensorAttribution(attributions, explained, deltas, steps, errors)

    def _infer(
        self,
        model: str,
        inputs: list[triton.InferInput],
        outputs: list[str],
        parameters: Mapping[str, Any],
        shared_output: _Region | None = None,
    ) -> triton.InferResult:
        self._check_open()
        requested = [triton.InferRequestedOutput(name) for name in outputs]
        if shared_output is not None:
            requested[-1].set_shared_memory(shared_output.name, shared_output.size)
        try:
            return self._triton.infer(
                model,
                inputs,
                outputs=requested,
                parameters=as_sent(parameters),
                client_timeout=self._timeout,
                timeout=int(1e6 * self._timeout),
            )
        except InferenceServerException as error:
            raise from_triton(error) from error

    def _check_open(self) -> None:
        if not self._close.alive:
            raise closed_error()

    def _shared_input(self, name: str, values: FloatArray) -> triton.InferInput:
        """An input tensor, in shared memory if the client uses it."""
        values = np.ascontiguousarray(values, np.float32)
        region = self._region(name, values.nbytes)
        if region is None:
            return _input(name, values)
        region.write(values)
        tensor = triton.InferInput(name, list(values.shape), "FP32")
        tensor.set_shared_memory(region.name, values.nbytes)
        return tensor

    def _region(self, name: str, size: int) -> _Region | None:
        """A shared region, kept between calls and replaced if it is too small; None without shared memory."""
        if self._kind is None:
            return None
        self._check_open()
        region = self._regions.get(name)
        if region is None or region.size < size:
            if region is not None:
                region.close()
            kind = _SystemRegion if self._kind == "system" else _CudaRegion
            self._regions[name] = region = kind(self._triton, size, self._device)
        return region


class _Region:
    """Memory that is shared with the server and registered with it."""

    _memory: Any  # tritonclient's module for it

    def __init__(self, client: triton.InferenceServerClient, size: int, device: int) -> None:
        self.name, self.size = f"explain_client_{uuid.uuid4().hex}", size
        self._client, self._device = client, device
        self._handle = self._create()
        try:
            self._register()
        except InferenceServerException as error:
            self._memory.destroy_shared_memory_region(self._handle)
            raise from_triton(error) from error

    def write(self, values: FloatArray) -> None:
        self._memory.set_shared_memory_region(self._handle, [values])

    def read(self, shape: Sequence[int]) -> FloatArray:
        """A copy of what the server wrote."""
        values: FloatArray = self._memory.get_contents_as_numpy(self._handle, np.float32, shape)
        return values.copy()

    def close(self) -> None:
        try:
            with contextlib.suppress(InferenceServerException):  # with the server its registration is gone, too
                self._unregister()
        finally:
            self._memory.destroy_shared_memory_region(self._handle)

    def _create(self) -> Any:
        raise NotImplementedError

    def _register(self) -> None:
        raise NotImplementedError

    def _unregister(self) -> None:
        raise NotImplementedError


class _SystemRegion(_Region):
    def _create(self) -> Any:
        from tritonclient.utils import shared_memory

        self._memory = shared_memory
        return shared_memory.create_shared_memory_region(self.name, f"/{self.name}", self.size)

    def _register(self) -> None:
        self._client.register_system_shared_memory(self.name, f"/{self.name}", self.size)

    def _unregister(self) -> None:
        self._client.unregister_system_shared_memory(self.name)


class _CudaRegion(_Region):
    def _create(self) -> Any:
        from tritonclient.utils import cuda_shared_memory  # needs tritonclient[cuda]

        self._memory = cuda_shared_memory
        return cuda_shared_memory.create_shared_memory_region(self.name, self.size, self._device)

    def _register(self) -> None:
        handle = self._memory.get_raw_handle(self._handle)
        self._client.register_cuda_shared_memory(self.name, handle, self._device, self.size)

    def _unregister(self) -> None:
        self._client.unregister_cuda_shared_memory(self.name)


def _close(connection: triton.InferenceServerClient, regions: dict[str, _Region]) -> None:
    for region in regions.values():
        region.close()
    regions.clear()
    connection.close()


def _input(name: str, values: npt.NDArray[Any]) -> triton.InferInput:
    tensor = triton.InferInput(name, list(values.shape), {"f": "FP32", "i": "INT64"}[values.dtype.kind])
    tensor.set_data_from_numpy(values)
    return tensor
