"""The script of the TensorRT tests on a GPU, which a test without one proves sound."""

from __future__ import annotations

SHAPES = """
import sys
import numpy as np
from tiue_cli.backends.onnx_backend import OnnxBackend
from tiue_cli.backends.trt_backend import TrtBackend
from tiue_cli.backends.cuda import memory_bytes
from tiue_cli.export.tolerance import psnr_db
from tiue_cli.model.noise import draw_noise

with TrtBackend(sys.argv[1]) as backend, OnnxBackend(sys.argv[1], provider="cpu") as reference:
    free = []
    for round in range(20):
        for batch, steps in ((1, 4), (3, 4), (16, 1), (3, 4), (3, 2), (1, 1)):
            noise = draw_noise(range(batch), backend.latent_shape((32, 32)))
            prompts = (["a red heart", "a yellow star"] * 8)[:batch]
            found = backend.generate(prompts, noise, steps=steps)
            if round in (0, 1, 19):
                expected = reference.generate(prompts, noise, steps=steps)
                assert psnr_db(found, expected) >= 35, (round, batch, steps)
        free.append(memory_bytes()[0])
    assert backend.graph_problem is None, backend.graph_problem
    chains = [chain for chains in backend._chains.values() for chain in chains.values()]
    assert len(chains) == 5, "a shape has a chain of its own"
    assert [chain.captures for chain in chains] == [1] * 5, [chain.captures for chain in chains]
    assert sum(chain.graph_runs for chain in chains) == 20 * 6 - 5, "shapes that alternate run as graphs"
    assert free[-1] >= free[1] - 2**20, "memory leaks away"
"""
