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


def compile_export(folder: Path, *, refit: bool = False) -> None:
    """Build every graph for the default profiles and print what came of it; raises what ``build_plan`` raises.

    With ``refit`` the weights of layers stay changeable: the student of the export must be at hand.
    """
    from tiue_cli.export.trt.builder import build_plan
    from tiue_cli.export.trt.profiles import Shapes, batch_profiles, input_shapes
    from tiue_cli.files.exports import read_export_manifest

    manifest = read_export_manifest(folder)
    profiles = batch_profiles(manifest)
    student = None
    if refit:
        from tiue_cli.export.trt.refit import graph_weights, refit_weights
        from tiue_cli.model.lora.exported import ExportedWeights

        student = ExportedWeights(folder, manifest)
    with tempfile.TemporaryDirectory() as scratch:
        for graph in manifest.graphs:
            shapes: list[Shapes] = []
            for profile in profiles:
                inputs = input_shapes(graph, profile, factor=manifest.latent_factor)
                shapes += [inputs] if inputs and inputs not in shapes else []
            plan = Path(scratch) / "plan"
            names: list[str] = []
            if student is not None and graph.name != "vae_decoder":
                found, fixed = refit_weights(graph, graph_weights(folder / graph.onnx.file), student)
                assert not fixed, f"not found in {graph.name}: {fixed}"
                names = [weight.name for weight in found]
            beats: list[float] = []
            built = build_plan(
                folder / graph.onnx.file,
                plan,
                shapes,
                workspace_bytes=2**30,
                refit=names,
                progress=lambda share, detail, beats=beats: beats.append(share),
            )
            line = {
                "graph": graph.onnx.file,
                "profiles": len(shapes),
                "layers": built.layers,
                "refittable": len(names),
                "seconds": round(built.seconds, 1),
                "plan_bytes": plan.stat().st_size,
                "progress": beats[-1] if beats else None,
            }
            sys.stdout.write(json.dumps(line) + "\n")
            sys.stdout.flush()


if __name__ == "__main__":
    provide_tensorrt_rtx()
    compile_export(Path(sys.argv[1]), refit="--refit" in sys.argv[2:])
