"""Triton model: one ONNX graph in ONNX Runtime, the requests of a batch in one run."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    """Runs ``model.onnx`` beside it on the CPU."""

    def initialize(self, args: dict[str, str]) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = len(os.sched_getaffinity(0))
        # The graphs take turns: threads that spin after a run would take the cores from the next.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.enable_cpu_mem_arena = False  # it keeps the most that a batch ever took, and doubles it
        path = Path(args["model_repository"]) / args["model_version"] / "model.onnx"
        self.session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self.inputs = [value.name for value in self.session.get_inputs()]
        self.outputs = [value.name for value in self.session.get_outputs()]

    def execute(self, requests: list[Any]) -> list[Any]:
        given = [
            {name: pb_utils.get_input_tensor_by_name(request, name).as_numpy() for name in self.inputs}
            for request in requests
        ]
        sizes = [len(one[self.inputs[0]]) for one in given]
        joined = {name: np.concatenate([one[name] for one in given]) for name in self.inputs}
        results = self.session.run(self.outputs, joined)
        responses: list[Any] = []
        start = 0
        for size in sizes:
            parts = [np.ascontiguousarray(result[start : start + size]) for result in results]
            tensors = [pb_utils.Tensor(name, part) for name, part in zip(self.outputs, parts, strict=True)]
            responses.append(pb_utils.InferenceResponse(tensors))
            start += size
        return responses
