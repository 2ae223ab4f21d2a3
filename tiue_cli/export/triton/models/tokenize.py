"""Triton model: prompts and seeds in, token ids and starting noise out, as ``tiue generate`` makes them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils
from tokenizers import Tokenizer

MAX_SEED = 2**63 - 1


class TritonPythonModel:
    """Reads ``tokenizer.json`` and ``settings.json`` beside it."""

    def initialize(self, args: dict[str, str]) -> None:
        folder = Path(args["model_repository"]) / args["model_version"]
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.shape = tuple(json.loads((folder / "settings.json").read_text(encoding="utf-8"))["latent_shape"])

    def execute(self, requests: list[Any]) -> list[Any]:
        return [self.answer(request) for request in requests]

    def answer(self, request: Any) -> Any:
        prompts = pb_utils.get_input_tensor_by_name(request, "prompt").as_numpy().ravel()
        seeds = [int(seed) for seed in pb_utils.get_input_tensor_by_name(request, "seed").as_numpy().ravel()]
        try:
            texts = [prompt.decode("utf-8").strip() for prompt in prompts]
        except UnicodeDecodeError:
            return failure("the prompt is not UTF-8")
        if not all(texts):
            return failure("the prompt is empty")
        if not all(0 <= seed <= MAX_SEED for seed in seeds):
            return failure(f"the seed is out of range: 0 to {MAX_SEED}")
        ids = np.array([row.ids for row in self.tokenizer.encode_batch(texts)], dtype=np.int64)
        noise = np.empty((len(seeds), *self.shape), dtype=np.float32)
        for row, seed in zip(noise, seeds, strict=True):
            # The seed is the key itself; see tiue_cli/model/noise.py.
            np.random.Generator(np.random.Philox(key=seed)).standard_normal(dtype=np.float32, out=row)
        return pb_utils.InferenceResponse([pb_utils.Tensor("input_ids", ids), pb_utils.Tensor("noise", noise)])


def failure(message: str) -> Any:
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(message))
