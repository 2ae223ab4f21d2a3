"""Compile an export folder ahead of time with TensorRT-RTX, on a machine without a GPU.

    python compile_rtx.py FOLDER [--refit]

It is the builder's real front end and most of its optimiser, on exactly the code that builds TensorRT plans, with the
default profiles. A pass is strong evidence that TensorRT takes the graphs; what it cannot show is that they are right.
Prints one JSON object a graph. Needs the extra: python -m pip install -e '.[rtx-check]'.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import tempfile
import types
from pathlib import Path


def provide_tensorrt_rtx() -> None:
    """Make ``import tensorrt_rtx`` work: the bindings come as tensorrt_rtx_bindings, their libraries apart."""
    os.environ["POLYGRAPHY_USE_TENSORRT_RTX"] = "1"
    # In this order: importing the first one loads the libraries that the second one is linked against.
    _, bindings = (importlib.import_module(name) for name in ("tensorrt_rtx_libs", "tensorrt_rtx_bindings"))
    module = types.ModuleType("tensorrt_rtx")
    module.__dict__.update({name: value for name, value in vars(bindings).items() if name != "__name__"})
    sys.modules["tensorrt_rtx"] = module


def mark_weights(folder: Path) -> None:
    """Parse every graph and mark what ``--refit`` keeps changeable; print how many weights TensorRT knows by name.

    That is as far as a CPU goes: TensorRT-RTX 1.7 asks for a driver to build what can be refitted (its Myelin fails in
    graph_jit.cpp, whichever of REFIT, REFIT_IDENTICAL and REFIT_INDIVIDUAL is set), and to open any plan (CUDA error
    35), so that its Refitter is out of reach. The student of the export must be at hand.
    """
    from polygraphy.backend.trt import NetworkFromOnnxPath

    from tiue_cli.backends.trt_messages import collect_messages
    from tiue_cli.export.trt.refit import graph_weights, refit_weights
    from tiue_cli.files.exports import read_export_manifest
    from tiue_cli.model.lora.exported import ExportedWeights

    collect_messages()  # stdout is for the lines below
    manifest = read_export_manifest(folder)
    student = ExportedWeights(folder, manifest)
    for graph in manifest.graphs:
        if graph.name == "vae_decoder":
            continue
        found, fixed = refit_weights(graph, graph_weights(folder / graph.onnx.file), student)
        network = NetworkFromOnnxPath(str(folder / graph.onnx.file), strongly_typed=True)()[1]
        unknown = [weight.name for weight in found if not network.mark_weights_refittable(weight.name)]
        line = {"graph": graph.onnx.file, "weights": len(found), "fixed": fixed, "unknown": unknown}
        sys.stdout.write(json.dumps(line) + "\n")
        sys.stdout.flush()


def compile_export(folder: Path) -> None:
    """Build every graph for the default profiles and print what came of it; raises what ``build_plan`` raises."""
    from tiue_cli.export.trt.builder import build_plan
    from tiue_cli.export.trt.profiles import Shapes, batch_profiles, input_shapes
    from tiue_cli.files.exports import read_export_manifest

    manifest = read_export_manifest(folder)
    profiles = batch_profiles(manifest)
    with tempfile.TemporaryDirectory() as scratch:
        for graph in manifest.graphs:
            shapes: list[Shapes] = []
            for profile in profiles:
                inputs = input_shapes(graph, profile, factor=manifest.latent_factor)
                shapes += [inputs] if inputs and inputs not in shapes else []
            plan = Path(scratch) / "plan"
            beats: list[float] = []
            built = build_plan(
                folder / graph.onnx.file,
                plan,
                shapes,
                workspace_bytes=2**30,
                progress=lambda share, detail, beats=beats: beats.append(share),
            )
            line = {
                "graph": graph.onnx.file,
                "profiles": len(shapes),
                "layers": built.layers,
                "seconds": round(built.seconds, 1),
                "plan_bytes": plan.stat().st_size,
                "progress": beats[-1] if beats else None,
            }
            sys.stdout.write(json.dumps(line) + "\n")
            sys.stdout.flush()


if __name__ == "__main__":
    provide_tensorrt_rtx()
    (mark_weights if "--refit" in sys.argv[2:] else compile_export)(Path(sys.argv[1]))
