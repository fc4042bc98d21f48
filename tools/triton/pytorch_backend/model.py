"""Stand-in for Triton's libtorch backend where it is not installed: a Python-based backend of the same name.

Triton uses ``backends/pytorch/model.py`` for every model with ``backend: "pytorch"``, so one config serves both. It
runs TorchScript files by the same naming convention: inputs ``NAME__0``, ``NAME__1``, ... are positional arguments,
outputs likewise the elements of the returned tuple.
"""

from __future__ import annotations  # pb_utils has its types only inside Triton

import json
from pathlib import Path

import torch
import triton_python_backend_utils as pb_utils


def _position(name: str) -> int:
    return int(name.rpartition("__")[2])


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        config = json.loads(args["model_config"])
        self.inputs = sorted((tensor["name"] for tensor in config["input"]), key=_position)
        dims = {tensor["name"]: tensor["dims"] for tensor in config["input"]}
        self.dimensions = [1 + len(dims[name]) for name in self.inputs]
        self.outputs = sorted((tensor["name"] for tensor in config["output"]), key=_position)
        on_gpu = args["model_instance_kind"] == "GPU"
        self.device = torch.device("cuda", int(args["model_instance_device_id"])) if on_gpu else torch.device("cpu")
        # By this name, as libtorch's backend; without it the number of threads is that of OMP_NUM_THREADS.
        if threads := int(config["parameters"].get("INTRA_OP_THREAD_COUNT", {"string_value": "0"})["string_value"]):
            torch.set_num_threads(threads)
        file = Path(args["model_repository"]) / args["model_version"] / (config["default_model_filename"] or "model.pt")
        if not file.is_file():
            raise pb_utils.TritonModelException(f"{file} is missing; python -m tools.export writes it")
        try:
            self.module = torch.jit.load(str(file), map_location=self.device).eval()
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[-1]
            raise pb_utils.TritonModelException(f"{file} is not a TorchScript file: {reason}") from None

        pb_utils.Logger.log_info(f"{args['model_name']}: threads {torch.get_num_threads()}, on {self.device}")

    @torch.inference_mode()
    def execute(self, requests: list[pb_utils.InferenceRequest]) -> list[pb_utils.InferenceResponse]:
        responses = [None] * len(requests)
        batches = {}
        for number, request in enumerate(requests):
            batch = [pb_utils.get_input_tensor_by_name(request, name).as_numpy() for name in self.inputs]
            # Triton 2.51 drops the batch dimension of an empty batch; only that request is refused.
            if [array.ndim for array in batch] == self.dimensions:
                batches[number] = batch
            else:
                message = f"{', '.join(self.inputs)} must be at least one"
                error = pb_utils.TritonError(message, pb_utils.TritonError.INVALID_ARG)
                responses[number] = pb_utils.InferenceResponse(error=error)
        if not batches:
            return responses
        arguments = [
            torch.cat([torch.from_numpy(array) for array in column]).to(self.device)
            for column in zip(*batches.values())
        ]
        results = self.module(*arguments)
        results = [result.cpu() for result in (results if isinstance(results, tuple) else (results,))]
        if len(results) <= _position(self.outputs[-1]):
            raise pb_utils.TritonModelException(f"the network returns {len(results)} outputs, not {self.outputs}")
        start = 0
        for number, batch in batches.items():
            rows = slice(start, start + len(batch[0]))
            start = rows.stop
            wanted = requests[number].requested_output_names()
            tensors = [
                pb_utils.Tensor(name, results[_position(name)][rows].numpy()) for name in self.outputs if name in wanted
            ]
            responses[number] = pb_utils.InferenceResponse(output_tensors=tensors)
        return responses
