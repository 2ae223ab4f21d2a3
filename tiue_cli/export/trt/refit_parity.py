"""Does an engine take other weights, and its own again? Every plan is refitted once and compared with its graph.

TensorRT 11.3 knows of refittable plans that lose a bias (its release notes): only running one shows that it is right.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final

import numpy as np
import onnx
from onnx import numpy_helper

from tiue_cli.backends.cuda import open_stream
from tiue_cli.backends.trt_backend import read_plan
from tiue_cli.backends.trt_device import rebuild_command
from tiue_cli.backends.trt_plan import Plan, open_plan
from tiue_cli.backends.trt_refit import refit_plan
from tiue_cli.backends.trt_runner import PlanChain
from tiue_cli.export.tolerance import check_relative_error, output_errors
from tiue_cli.export.trt.parity import PlanCase, Reference, Tensors
from tiue_cli.export.trt.refit import Weights, graph_weights
from tiue_cli.files.engines import EngineManifest, PlanSpec
from tiue_cli.files.exports import ExportManifest, GraphSpec

_NEXT: Final = "please report this; without --refit the engine is built for the weights that it has"
_SHARE: Final = 0.3
"""Of the weights that are mixed in: enough to be seen, and of the same size, so that nothing overflows."""


def check_refits(
    folder: Path,
    export: Path,
    engine: EngineManifest,
    manifest: ExportManifest,
    reference: Reference,
    cases: Sequence[PlanCase],
    *,
    say: Callable[[float, str], None] | None = None,
) -> None:
    """Refit every plan in ``folder`` with other weights and back, and compare it with ONNX Runtime each time.

    Raises ParityError naming the output, DeviceError where TensorRT refuses.
    """
    specs = [spec for spec in engine.plans if spec.refit]
    for number, spec in enumerate(specs):
        if say is not None:
            say(number / len(specs), spec.plan.file)
        graph = manifest.graph(spec.graph, size=spec.size)
        case = min((case for case in cases if spec.shapes[case.profile]), key=lambda case: case.batch)
        weights = graph_weights(export / graph.onnx.file)
        own = {weight.name: weights[weight.name] for weight in spec.refit}
        other = {name: _mixed(value) for name, value in own.items()}
        tensors = reference.tensors(case)
        expected = _with_weights(export / graph.onnx.file, other, graph, reference, tensors)
        plan = open_plan(spec.plan.file, read_plan(folder, spec, rebuild=rebuild_command(export)))
        _check(plan, spec, graph, case, tensors, [(other, expected, "other"), (own, tensors, "its own")], reference)
    if say is not None:
        say(1.0, "done")


def _check(
    plan: Plan,
    spec: PlanSpec,
    graph: GraphSpec,
    case: PlanCase,
    tensors: Tensors,
    rounds: Sequence[tuple[Weights, Tensors, str]],
    reference: Reference,
) -> None:
    outputs = [output.name for output in graph.outputs]
    with open_stream() as stream, PlanChain([(plan, spec.plan_profile(case.profile))], stream, graphs=False) as chain:
        inputs = {name: tensors[name] for name in chain.inputs}
        chain.run(inputs, outputs)  # contexts that have run already must see the new weights
        for weights, expected, what in rounds:
            refit_plan(plan, weights, weights.__getitem__)
            for name, value in chain.run(inputs, outputs).items():
                where = f"TensorRT's {graph.name}, refitted with {what} weights: {name} with {case.label}"
                _, relative = output_errors(value, expected[name], where=where, reference=reference.name, hint=_NEXT)
                check_relative_error(relative, where=where, precision=graph.precision, hint=_NEXT)


def _mixed(value: np.ndarray) -> np.ndarray:
    """Other weights of the same size: each with a share of another one's."""
    return ((1 - _SHARE) * value + _SHARE * value.ravel()[::-1].reshape(value.shape)).astype(value.dtype)


def _with_weights(
    onnx_file: Path, weights: Mapping[str, np.ndarray], graph: GraphSpec, reference: Reference, tensors: Tensors
) -> dict[str, np.ndarray]:
    """What ONNX Runtime makes of ``tensors`` with a copy of the graph that has ``weights``."""
    model = onnx.load(str(onnx_file))
    for tensor in model.graph.initializer:
        if tensor.name in weights:
            tensor.CopyFrom(numpy_helper.from_array(weights[tensor.name], tensor.name))
    with tempfile.TemporaryDirectory(prefix="tiue-refit-") as scratch:
        copy = Path(scratch) / "graph.onnx"
        onnx.save(model, str(copy), save_as_external_data=True, location="graph.data")
        del model
        return reference.run(copy, graph, tensors)
