"""The TensorRT runner on TensorRT 8.6, for GPU machines that have no newer one: the same module, the same CUDA graphs.

    python benchmarks/trt86_check.py prepare EXPORT OUT     here: graphs for its parser, and what they must compute
    python3.9 benchmarks/trt86_check.py run OUT             there, with tiue's sources on PYTHONPATH: NumPy, Polygraphy,
                                                            TensorRT 8.6 and nothing else

TensorRT 8.6 is not what tiue builds for: it reads operator sets up to 17 and knows no strongly typed networks. So this
checks the runner (buffers, profiles, CUDA graphs, copies) and the graphs' arithmetic, not tiue's own builder. The
export must have operator set 18 and a fixed size: tiue export STUDENT --opset 18 --precision fp16 --size 512.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
import types
from pathlib import Path
from typing import Any

import numpy as np

GRAPHS = ("text_encoder", "unet_encoder", "unet_decoder", "vae_decoder")
FACTS, TENSORS, REPORT = "check.json", "reference.npz", "report.json"
BATCHES = ((1, 1, 1), (1, 4, 16))
RUNS, WARM_UP = 30, 3
ALLOWED = {"fp16": 5e-2, "fp32": 1e-3}
REQUIRED_DB = {"fp16": 35.0, "fp32": 60.0}


# --- here: prepare -------------------------------------------------------------------------------------------------


def prepare(export: Path, out: Path) -> None:
    """Write graphs in operator set 17, shapes of two profiles, and ONNX Runtime's tensors for two images."""
    from tiue_cli.backends.onnx_session import Provider
    from tiue_cli.export.trt.parity import PlanCase, Reference
    from tiue_cli.export.trt.profiles import batch_profiles, input_shapes
    from tiue_cli.files.exports import read_export_manifest

    manifest = read_export_manifest(export)
    assert manifest.opset == 18, f"operator set {manifest.opset}: export with --opset 18"
    out.mkdir(parents=True, exist_ok=True)
    size = manifest.default_size
    one_size = manifest.model_copy(update={"sizes": (size,)})
    profiles = batch_profiles(one_size, BATCHES)
    shapes = {}
    for name in GRAPHS:
        graph = manifest.graph(name, size=size)
        older(export / graph.onnx.file, out / f"{name}.onnx")
        shapes[name] = [input_shapes(graph, profile, factor=manifest.latent_factor) for profile in profiles]
    steps = manifest.steps[-1]
    case = PlanCase(0, "reference", 2, steps, size)
    reference = Reference(export, manifest, provider=Provider("cpu"))
    reference.rows = 2
    reference.compute([case])
    np.savez(out / TENSORS, **reference.tensors(case))
    facts = {"name": manifest.name, "precision": manifest.precision, "steps": steps, "size": size, "shapes": shapes}
    (out / FACTS).write_text(json.dumps(facts), encoding="utf-8")
    print(f"next, on the GPU machine: python3.9 benchmarks/trt86_check.py run {out}")


def older(source: Path, target: Path) -> None:
    """Rewrite a graph of operator set 18 in 17, which has everything that tiue's graphs use."""
    import onnx

    model = onnx.load(source)
    known = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    gone = {"Split": ("num_outputs",), "Resize": ("antialias", "keep_aspect_ratio_policy")}
    for node in model.graph.node:
        kept = [attribute for attribute in node.attribute if attribute.name not in gone.get(node.op_type, ())]
        if node.op_type.startswith("Reduce") and node.op_type != "ReduceSum" and len(node.input) == 2:
            # Axes were an attribute before 18.
            kept.append(onnx.helper.make_attribute("axes", [int(axis) for axis in known[node.input[1]]]))
            del node.input[1]
        del node.attribute[:]
        node.attribute.extend(kept)
    del model.opset_import[:]
    model.opset_import.append(onnx.helper.make_opsetid("", 17))
    model.ir_version = 8
    large = sum(value.nbytes for value in known.values()) > 2**30
    onnx.save(model, str(target), save_as_external_data=large, location=f"{target.name}.data")
    onnx.checker.check_model(str(target), full_check=True)


# --- there: build, compare, time (Python 3.9) ----------------------------------------------------------------------


def run(out: Path, *, loose: bool = False) -> int:
    """Build every plan, compare it, run all in a row, time that, and write a report; returns the exit status."""
    from tiue_cli.backends.cuda import open_stream
    from tiue_cli.backends.trt_plan import open_plan, working_memory
    from tiue_cli.backends.trt_runner import PlanChain

    facts = json.loads((out / FACTS).read_text(encoding="utf-8"))
    tensors = dict(np.load(out / TENSORS))
    report: dict[str, Any] = {"tensorrt": newer_names().__version__, "python": sys.version.split()[0]}
    report.update({key: facts[key] for key in ("name", "precision", "steps", "size")})
    report["plans"], report["failed"] = {}, []
    plans = []
    with open_stream() as stream:
        for name in GRAPHS:
            started = time.perf_counter()
            data = build(out / f"{name}.onnx", facts["shapes"][name], half=facts["precision"] == "fp16", loose=loose)
            seconds = time.perf_counter() - started
            plan = open_plan(name, data)
            plan = plan._replace(engine=Engine86(plan.engine))
            plans.append(plan)
            errors = {}
            for profile, batch in enumerate((1, 16)):
                with PlanChain([(plan, profile)], stream, graphs=False) as chain:
                    errors[str(batch)] = plan_errors(chain, plan, tensors, batch)
            report["plans"][name] = {
                "build_s": round(seconds, 1),
                "size_bytes": len(data),
                "working_memory_bytes": working_memory(plan),
                "relative_error": errors,
            }
            print(name, report["plans"][name], flush=True)
            worst = max(value for each in errors.values() for value in each.values())
            if not worst <= ALLOWED[facts["precision"]]:
                report["failed"].append(f"{name}: relative error {worst:.1e}")
        report["images"] = {}
        for profile, batch in ((0, 1), (1, 1), (1, 4), (1, 16)):
            with PlanChain([(plan, profile) for plan in plans], stream) as chain:
                found = chain_figures(chain, tensors, batch)
            report["images"][f"profile {profile}, {batch} images"] = found
            print(profile, batch, found, flush=True)
            if found["psnr_db"] < REQUIRED_DB[facts["precision"]] or found["captures"] != 1:
                report["failed"].append(f"images at profile {profile}, batch {batch}: {found}")
    (out / REPORT).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(f"report: {out / REPORT}; failed: {report['failed'] or 'nothing'}")
    return 1 if report["failed"] else 0


def newer_names() -> Any:
    """TensorRT 8.6 with the one enumeration of later versions that the runner names; the module."""
    from tiue_cli.backends.trt_messages import import_tensorrt

    trt = import_tensorrt()
    if not hasattr(trt, "ExecutionContextAllocationStrategy"):
        trt.ExecutionContextAllocationStrategy = types.SimpleNamespace(USER_MANAGED="user managed")
    return trt


class Engine86:
    """An engine of TensorRT 8.6 by the names that the runner calls, which are those of 10.8 and later."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def create_execution_context(self, strategy: Any) -> Any:
        """A context whose working memory the runner gives; None where there is none to be had."""
        context = self._engine.create_execution_context_without_device_memory()
        return None if context is None else Context86(context)

    def get_device_memory_size_for_profile_v2(self, profile: int) -> int:
        """Of the largest profile: 8.6 does not tell them apart."""
        return int(self._engine.device_memory_size)


class Context86:
    """An execution context of TensorRT 8.6 by the newer names."""

    def __init__(self, context: Any) -> None:
        self._context = context

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)

    def set_device_memory(self, address: int, nbytes: int) -> None:
        """Lend it working memory."""
        self._context.device_memory = address


def build(onnx: Path, shapes: list[Any], *, half: bool, loose: bool) -> bytes:
    """A serialised plan from a weakly typed network; float32 parts of a float16 graph stay so unless ``loose``."""
    from polygraphy.backend.trt import CreateConfig, EngineBytesFromNetwork, NetworkFromOnnxPath, Profile

    from tiue_cli.backends.trt_messages import import_tensorrt

    trt = import_tensorrt()
    profiles = []
    for inputs in shapes:
        profile = Profile()
        for name, (low, opt, high) in inputs.items():
            profile.add(name, min=tuple(low), opt=tuple(opt), max=tuple(high))
        profiles.append(profile)
    # Its own kernel instead of a plugin, whose library is not part of a small installation.
    parsed = NetworkFromOnnxPath(str(onnx), flags=[trt.OnnxParserFlag.NATIVE_INSTANCENORM])()
    if half and not loose:
        keep_types(trt, parsed[1])
    config = CreateConfig(
        profiles=profiles,
        fp16=half,
        precision_constraints=None if loose or not half else "obey",
        tactic_sources=[],  # neither cuBLAS nor cuDNN is needed then
        profiling_verbosity=trt.ProfilingVerbosity.LAYER_NAMES_ONLY,
    )
    return bytes(EngineBytesFromNetwork(parsed, config=config)())


def keep_types(trt: Any, network: Any) -> None:
    """Ask for float32 wherever the graph has it: the FP16 flag allows half precision everywhere else."""
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        outputs = [layer.get_output(number) for number in range(layer.num_outputs)]
        if any(output.dtype == trt.DataType.FLOAT for output in outputs) and layer.type != trt.LayerType.CONSTANT:
            layer.precision = trt.DataType.FLOAT


def tiled(tensors: dict[str, np.ndarray], name: str, batch: int) -> np.ndarray:
    """A tensor for ``batch`` images: the reference's two, repeated."""
    value = tensors[name]
    return value if name in ("timesteps", "weights") else value[np.arange(batch) % 2]


def plan_errors(chain: Any, plan: Any, tensors: dict[str, np.ndarray], batch: int) -> dict[str, float]:
    """Norm of the difference over the norm, for each output of one plan on the reference's inputs."""
    outputs = plan.names(inputs=False)
    found = chain.run({name: tiled(tensors, name, batch) for name in chain.inputs}, outputs)
    errors = {}
    for name in outputs:
        expected = tiled(tensors, name, batch).astype(np.float64)
        difference = np.linalg.norm(found[name].astype(np.float64) - expected)
        errors[name] = float(difference / np.linalg.norm(expected))
    return errors


def chain_figures(chain: Any, tensors: dict[str, np.ndarray], batch: int) -> dict[str, Any]:
    """PSNR of the worst image over plain and captured runs, and the time of a run, copies included."""
    inputs = {name: tiled(tensors, name, batch) for name in chain.inputs}
    expected = tiled(tensors, "images", batch).astype(np.float64)
    psnr = 100.0
    for _ in range(WARM_UP):
        images = chain.run(inputs, ["latents", "images"])["images"].astype(np.float64)
        squares = np.mean((images - expected) ** 2, axis=(1, 2, 3))
        psnr = min(psnr, float(np.min(10 * np.log10(255**2 / np.maximum(squares, 1e-5)))))
    times = []
    for _ in range(RUNS):
        started = time.perf_counter()
        chain.run(inputs, ["latents", "images"])
        times.append(1000 * (time.perf_counter() - started))
    return {
        "psnr_db": round(psnr, 2),
        "median_ms": round(statistics.median(times), 3),
        "min_ms": round(min(times), 3),
        "captures": chain.captures,
        "graph_runs": chain.graph_runs,
        "graph_problem": chain.graph_problem,
    }


def main(arguments: Any = None) -> int:
    """Read the command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    first = commands.add_parser("prepare")
    first.add_argument("export", type=Path)
    first.add_argument("out", type=Path)
    second = commands.add_parser("run")
    second.add_argument("out", type=Path)
    second.add_argument("--loose", action="store_true", help="let TensorRT choose float16 where the graph has float32")
    options = parser.parse_args(arguments)
    if options.command == "prepare":
        prepare(options.export, options.out)
        return 0
    return run(options.out, loose=options.loose)


if __name__ == "__main__":
    raise SystemExit(main())
