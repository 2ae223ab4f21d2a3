"""What a user would pick instead on a CPU, on the same weights, threads and graphs, in one run.

    python benchmarks/peers_cpu.py papercut --batch 1,16 --out benchmarks/results/peers_cpu_papercut
    python benchmarks/peers_cpu.py sd15 --vae taesd --size 512 --int8 --out benchmarks/results/peers_cpu_sd15

The peers are engines with the arithmetic of a one-step model of any other method (one plain UNet pass: what FastSD CPU
runs through OpenVINO) and of the teacher (25 guided steps): diffusers' own pipeline in torch, and the plain UNet as one
graph in ONNX Runtime and in OpenVINO. Text encoder and autoencoder are tiue's graphs in both, so that a ratio is the
method's and not an exporter's. tiue itself runs in torch, compiled, in ONNX Runtime and in OpenVINO, in each precision
that this CPU computes natively; what it lacks is said and left out.

Entrants are opened one after another and take turns in every round: what slows the machine down meets all of them. Time
is wall time of a whole batch, prompts to pixels, after a run that nobody counts; beside it the process's own CPU time.
The ceiling is arithmetic: with K = 4 the shared decoder costs about 2.3 plain passes, text and autoencoder are equal.
With `--stages` the median time of each graph as well: what an autoencoder costs is the row to compare, `--vae taesd`
against none.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from torch import Tensor, nn
from torch.nn import functional

from tiue_cli.backends.exported import ExportBackend
from tiue_cli.backends.onnx_backend import OnnxBackend
from tiue_cli.backends.openvino_backend import OpenvinoBackend
from tiue_cli.backends.openvino_device import native_precisions, open_core
from tiue_cli.backends.stages import listening
from tiue_cli.base.machine import machine_info
from tiue_cli.bench.subjects.models import LoadedModel, load_model, random_model
from tiue_cli.export.config import ExportConfig
from tiue_cli.export.onnx.export import export_student
from tiue_cli.export.onnx.trace import Port, Trace, export_graph
from tiue_cli.export.tolerance import psnr_db
from tiue_cli.files.exports import GraphSpec, read_export_manifest
from tiue_cli.model.hub import EMBEDDED
from tiue_cli.model.noise import draw_noise
from tiue_cli.model.schedule import ddim_steps
from tiue_cli.model.shared import SharedUNetDecoder, with_same_weights
from tiue_cli.model.student import save_student
from tiue_cli.model.text import encode_prompts
from tiue_cli.model.unet import UNetEncoder

TEACHER_STEPS: Final = 25
PROMPTS: Final = ("a red heart at night", "a blue house above a yellow star", "a green tree", "a fish under the sea")
Draw = Callable[[Sequence[str], np.ndarray], np.ndarray]


@dataclass
class Entrant:
    """One thing that is timed: ``open`` makes it ready; ``same_as`` names the entrant whose pictures it must draw."""

    name: str
    open: Callable[[], contextlib.AbstractContextManager[Draw]]
    same_as: str | None = None
    required_db: float = 30.0
    batches: tuple[int, ...] | None = None
    """None: all."""
    seconds: dict[int, list[float]] = field(default_factory=dict)
    cpu_seconds: dict[int, list[float]] = field(default_factory=dict)
    stages: dict[int, dict[str, list[float]]] = field(default_factory=dict)
    pictures: dict[int, np.ndarray] = field(default_factory=dict)
    worst_db: dict[int, float] = field(default_factory=dict)
    """Of a batch's pictures against those of ``same_as``."""


# --- graphs --------------------------------------------------------------------------------------------------------


class PlainUpsample(nn.Module):
    """diffusers' ``Upsample2D`` without what it does differently from 64 rows on, which cannot be traced."""

    def __init__(self, upsampler: Any) -> None:
        super().__init__()
        self.conv = upsampler.conv

    def forward(self, hidden: Tensor, output_size: Any = None) -> Any:
        """(rows, C, h, w) → (rows, C, *output_size), or twice the size."""
        size = [2 * side for side in hidden.shape[-2:]] if output_size is None else output_size
        return self.conv(functional.interpolate(hidden, size=size, mode="nearest"))


class PlainPass(nn.Module):
    """The whole UNet at one timestep for all rows: a step of a sampler, or all of another method's one step."""

    def __init__(self, unet: Any) -> None:
        super().__init__()
        self.unet = with_same_weights(unet)
        for block in self.unet.up_blocks:
            if block.upsamplers is not None:
                block.upsamplers = nn.ModuleList(PlainUpsample(upsampler) for upsampler in block.upsamplers)

    def forward(self, noise: Tensor, text_states: Tensor, timestep: Tensor) -> Any:
        """(B, C, h, w), (B, L, D) and (1,) int64 → the prediction (B, C, h, w)."""
        return self.unet(noise, timestep, encoder_hidden_states=text_states, return_dict=False)[0]


def trace_plain(unet: Any, *, tokens: int, width: int, latent: tuple[int, int]) -> Trace:
    noise = torch.zeros(2, int(unet.config["in_channels"]), *latent)
    shape: tuple[int | str, ...] = ("batch", *noise.shape[1:])
    return Trace(
        name="unet_encoder",  # the format's names are all that a graph may be called
        module=PlainPass(unet),
        arguments=(noise, torch.zeros(2, tokens, width), torch.zeros(1, dtype=torch.int64)),
        inputs=(Port("noise", shape), Port("text_states", ("batch", tokens, width)), Port("timestep", (1,))),
        outputs=(Port("prediction", shape),),
    )


def write_graphs(model: LoadedModel, work: Path, size: tuple[int, int], *, int8: bool) -> dict[str, Path]:
    """Exports of the student at ``size`` by precision, with the plain pass in each; made once, kept in ``work``."""
    student = work / "student"
    if not student.exists():
        save_student(model.student, student)
    folders = {}
    for precision in ("fp32", "int8") if int8 else ("fp32",):
        folders[precision] = folder = work / precision
        if not folder.exists():
            print(f"exporting in {precision}", flush=True)
            (work / "prompts.txt").write_text("\n".join(PROMPTS))
            prompts, images = (EMBEDDED, 64) if model.name == EMBEDDED else (str(work / "prompts.txt"), 8)
            options = {} if precision == "fp32" else {"calibration": prompts, "calibration_images": images}
            export_student(
                ExportConfig(
                    student=str(student), out=folder, precision=precision, sizes=(size,), check=False, **options
                )  # type: ignore[arg-type]
            )
    plain = work / "plain" / "plain.onnx"
    if not plain.exists():
        print("exporting the plain UNet", flush=True)
        manifest = read_export_manifest(folders["fp32"])
        latent = manifest.latent_shape(size)[1:]
        plain.parent.mkdir()
        trace = trace_plain(
            model.components.unet, tokens=manifest.text_tokens, width=manifest.text_width, latent=(latent[0], latent[1])
        )
        spec = export_graph(trace, plain, opset=manifest.opset)
        (plain.parent / "spec.json").write_text(spec.model_dump_json())
    return folders


# --- entrants ------------------------------------------------------------------------------------------------------


def in_sampler(
    kind: type[ExportBackend[Any]],
    export: Path,
    plain: Path,
    steps: Sequence[tuple[int, float, float]],
    guidance: float,
    **options: Any,
) -> contextlib.AbstractContextManager[Draw]:
    """A runtime of exports that runs the plain UNet at each of ``steps`` in place of the two halves."""
    spec = GraphSpec.model_validate_json((plain / "spec.json").read_text())

    class Sampler(kind):  # type: ignore[misc, valid-type]
        def _prepare(self, **shapes: Any) -> None:
            pass  # compiled as it is met: the halves never are

        def _latents(self, prompts: Sequence[str], noise: np.ndarray, steps_: int | None, report: Any) -> np.ndarray:
            latents = noise
            states = self._array(self._run("text_encoder", None, {"input_ids": self._entered(prompts)})["text_states"])
            if guidance > 1:
                empty = self._run("text_encoder", None, {"input_ids": self._entered([""] * len(prompts))})
                states = np.concatenate([states, self._array(empty["text_states"])])
            for timestep, keep, weight in steps:
                rows = np.concatenate([latents, latents]) if guidance > 1 else latents
                inputs = {"noise": rows, "text_states": states, "timestep": np.array([timestep])}
                prediction = self._array(self._call(self._plain, spec, inputs)["prediction"])
                if guidance > 1:
                    told, free = np.split(prediction, 2)
                    prediction = free + guidance * (told - free)
                latents = (keep * latents + weight * prediction).astype(np.float32)
            return latents

        def __enter__(self) -> Any:
            super().__enter__()
            home, self.folder = self.folder, plain
            self._plain = self._open(spec)
            self.folder = home
            return self

    @contextlib.contextmanager
    def opened() -> Iterator[Draw]:
        with Sampler(export, **options) as backend:
            yield backend.generate

    return opened()


def exported(kind: type[ExportBackend[Any]], export: Path, **options: Any) -> contextlib.AbstractContextManager[Draw]:
    @contextlib.contextmanager
    def opened() -> Iterator[Draw]:
        with kind(export, **options) as backend:
            yield backend.generate

    return opened()


@contextlib.contextmanager
def tiue_in_torch(model: LoadedModel, *, compiled: bool) -> Iterator[Draw]:
    from tiue_cli.model.autoencoder import ImageDecoder

    student, combine = model.student, model.combine(max(model.steps))
    encoder: Any = UNetEncoder(student.unet)
    decoder: Any = SharedUNetDecoder(student.unet)
    if compiled:
        encoder, decoder = torch.compile(encoder), torch.compile(decoder)
    images = ImageDecoder(student.vae)

    @torch.inference_mode()
    def draw(prompts: Sequence[str], noise: np.ndarray) -> np.ndarray:
        states = encode_prompts(student.tokenizer, student.text_encoder, list(prompts))
        start = torch.from_numpy(noise)
        features = encoder(start, states, student.manifest.encoder_timestep)
        return images.decode(combine(start, decoder(features, torch.tensor(combine.timesteps), states)))

    yield draw
    torch._dynamo.reset()


@contextlib.contextmanager
def diffusers_pipeline(model: LoadedModel, *, steps: int, guidance: float) -> Iterator[Draw]:
    parts = model.components
    pipeline = StableDiffusionPipeline(
        tokenizer=parts.tokenizer,
        text_encoder=parts.text_encoder,
        unet=parts.unet,
        vae=parts.vae,
        scheduler=DDIMScheduler.from_config(parts.scheduler_config),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)

    def draw(prompts: Sequence[str], noise: np.ndarray) -> np.ndarray:
        result = pipeline(
            list(prompts),
            latents=torch.from_numpy(noise),
            num_inference_steps=steps,
            guidance_scale=guidance,
            output_type="np",
        )
        return np.asarray((result.images * 255).round(), dtype=np.uint8)

    yield draw


def entrants(
    model: LoadedModel, folders: Mapping[str, Path], plain: Path, *, threads: int, teacher: bool
) -> list[Entrant]:
    scheduler, guidance = model.components.scheduler_config, model.guidance(None)
    combine = model.combine(1)
    one = [(combine.timesteps[0], *combine.weights)]
    many = ddim_steps(scheduler, TEACHER_STEPS)
    native = native_precisions(open_core(cache=None), "CPU")
    found = [
        Entrant("tiue, torch", lambda: tiue_in_torch(model, compiled=False)),
        Entrant("tiue, torch.compile", lambda: tiue_in_torch(model, compiled=True), same_as="tiue, torch"),
        Entrant("one pass, diffusers in torch", lambda: diffusers_pipeline(model, steps=1, guidance=1.0)),
    ]
    if teacher:
        name = f"{TEACHER_STEPS} guided steps, diffusers in torch"
        found.append(
            Entrant(name, lambda: diffusers_pipeline(model, steps=TEACHER_STEPS, guidance=guidance), batches=(1,))
        )
    engines: list[tuple[str, type[ExportBackend[Any]], dict[str, Any]]] = [
        ("ONNX Runtime", OnnxBackend, {"provider": "cpu", "threads": threads}),
        ("OpenVINO fp32", OpenvinoBackend, {"device": "cpu", "precision": "fp32", "threads": threads}),
    ]
    if "bf16" in native:
        engines.append(("OpenVINO bf16", OpenvinoBackend, {"device": "cpu", "precision": "bf16", "threads": threads}))
    for engine, kind, options in engines:
        for precision, folder in folders.items():
            required = 25.0 if precision == "int8" or engine.endswith("bf16") else 50.0
            found.append(
                Entrant(
                    f"tiue, {engine}" + (" on int8 graphs" if precision == "int8" else ""),
                    lambda kind=kind, folder=folder, options=options: exported(  # type: ignore[misc]
                        kind, folder, **_fitting(options, folder)
                    ),
                    same_as="tiue, torch",
                    required_db=required,
                )
            )
        runs = [(f"one pass, {engine}", one, 1.0, None)]
        if teacher:
            runs.append((f"{TEACHER_STEPS} guided steps, {engine}", many, guidance, (1,)))
        for name, steps, scale, batches in runs:
            found.append(
                Entrant(
                    name,
                    lambda kind=kind, steps=steps, scale=scale, options=options: in_sampler(  # type: ignore[misc]
                        kind, folders["fp32"], plain, steps, scale, **options
                    ),
                    batches=batches,
                )
            )
    first = next(entrant for entrant in found if entrant.name == "one pass, ONNX Runtime")
    for entrant in found:
        if entrant.name.startswith("one pass, OpenVINO"):
            entrant.same_as, entrant.required_db = first.name, 25.0 if entrant.name.endswith("bf16") else 50.0
    return found


def _fitting(options: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Of 8-bit graphs OpenVINO is asked for what their floats compute in; fp32 is its own choice."""
    made = dict(options)
    if made.get("precision") == "fp32" and read_export_manifest(folder).precision == "int8":
        made["precision"] = "int8"
    return made


# --- measuring -----------------------------------------------------------------------------------------------------


def measure(found: Sequence[Entrant], args: argparse.Namespace, latent: tuple[int, int, int]) -> None:
    """Rounds in which all take turns; each is opened for its turn, or with ``--hold`` once for all."""
    with contextlib.ExitStack() as held:
        ready: dict[str, Draw] = {}
        for round_ in range(args.rounds):
            for entrant in found:
                with contextlib.ExitStack() as turn:
                    if entrant.name not in ready:
                        draw = (held if args.hold else turn).enter_context(entrant.open())
                        if args.hold:
                            ready[entrant.name] = draw
                    else:
                        draw = ready[entrant.name]
                    for batch in args.batch:
                        if entrant.batches is None or batch in entrant.batches:
                            _turn(entrant, draw, batch, latent, args)
            print(f"round {round_ + 1} of {args.rounds}", flush=True)


def _turn(entrant: Entrant, draw: Draw, batch: int, latent: tuple[int, int, int], args: argparse.Namespace) -> None:
    prompts = [PROMPTS[index % len(PROMPTS)] for index in range(batch)]
    noise = draw_noise(range(batch), latent)
    pictures = draw(prompts, noise)  # compiles and warms up, uncounted
    entrant.pictures.setdefault(batch, pictures)
    times, cpu = entrant.seconds.setdefault(batch, []), entrant.cpu_seconds.setdefault(batch, [])
    stages = entrant.stages.setdefault(batch, {})
    ends = time.perf_counter() + args.seconds
    while True:
        spent: dict[str, float] = {}
        begun, begun_cpu = time.perf_counter(), time.process_time()
        with listening(functools.partial(_add, spent)):
            draw(prompts, noise)
        times.append(time.perf_counter() - begun)
        cpu.append(time.process_time() - begun_cpu)
        for name, seconds in spent.items():
            stages.setdefault(name, []).append(seconds)
        if time.perf_counter() >= ends:
            return


def _add(spent: dict[str, float], name: str, seconds: float) -> None:
    spent[name] = spent.get(name, 0.0) + seconds


def check(found: Sequence[Entrant]) -> list[str]:
    """Say how near each entrant's pictures are to those that they must equal; returns who draws something else."""
    by_name = {entrant.name: entrant for entrant in found}
    others = []
    for entrant in found:
        if entrant.same_as is None:
            continue
        for batch, pictures in entrant.pictures.items():
            worst = min(map(psnr_db, pictures, by_name[entrant.same_as].pictures[batch]))
            print(f"{entrant.name}, batch {batch}: {worst:.1f} dB from {entrant.same_as}")
            entrant.worst_db[batch] = round(float(worst), 1)
            if worst < entrant.required_db:
                what = f"{entrant.name}, batch {batch}, draws something else"
                others.append(f"{what}: {worst:.1f} dB, {entrant.required_db:.0f} needed")
    return others


def report(found: Sequence[Entrant], args: argparse.Namespace, size: tuple[int, int]) -> dict[str, Any]:
    baseline = args.baseline
    rows = []
    for batch in args.batch:
        base = next((e for e in found if e.name == baseline), found[0])
        for entrant in found:
            if batch not in entrant.seconds:
                continue
            times = entrant.seconds[batch]
            median = statistics.median(times)
            quartiles = statistics.quantiles(times, n=4) if len(times) > 1 else [median] * 3
            rows.append(
                {
                    "entrant": entrant.name,
                    "batch": batch,
                    "runs": len(times),
                    "median_s": round(median, 5),
                    "quartiles_s": [round(quartiles[0], 5), round(quartiles[2], 5)],
                    "median_cpu_s": round(statistics.median(entrant.cpu_seconds[batch]), 5),
                    "images_per_s": round(batch / median, 3),
                    "times_baseline": round(median / statistics.median(base.seconds[batch]), 3),
                    "worst_db": entrant.worst_db.get(batch),
                    "stages_s": {
                        name: round(statistics.median(values), 5) for name, values in entrant.stages[batch].items()
                    },
                }
            )
    return {
        "model": args.model,
        "vae": args.vae,
        "size": list(size),
        "threads": args.threads,
        "baseline": baseline,
        "rounds": args.rounds,
        "seconds_a_turn": args.seconds,
        "machine": machine_info().cpu,
        "native_precisions": list(native_precisions(open_core(cache=None), "CPU")),
        "rows": rows,
    }


def as_markdown(found: Mapping[str, Any], *, stages: bool) -> str:
    lines = [
        f"# {found['model']}, {found['size'][0]} × {found['size'][1]}, autoencoder {found['vae'] or 'its own'}",
        "",
        f"{found['machine']}, {found['threads']} threads; native are {', '.join(found['native_precisions'])}.",
        "",
        "| batch | what | ms a batch | quartiles | CPU ms | images/s | times the baseline |"
        + (" text | encoder | decoder | VAE |" if stages else ""),
        "|---|---|---|---|---|---|---|" + ("---|---|---|---|" if stages else ""),
    ]
    for row in found["rows"]:
        low, high = (1e3 * value for value in row["quartiles_s"])
        cells = [row["batch"], row["entrant"], f"{1e3 * row['median_s']:.1f}", f"{low:.1f}–{high:.1f}"]
        cells += [f"{1e3 * row['median_cpu_s']:.1f}", f"{row['images_per_s']:.3g}", f"{row['times_baseline']:.2f}"]
        if stages:
            names = ("text_encoder", "unet_encoder", "unet_decoder", "vae_decoder")
            cells += [f"{1e3 * row['stages_s'][name]:.1f}" if name in row["stages_s"] else "" for name in names]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join([*lines, *(f"\n**{sentence}**" for sentence in found["draw something else"]), ""])


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument(
        "model", choices=["papercut", "sd15", "sd21"], help="papercut's weights, or a shape's random ones"
    )
    options.add_argument("--vae", choices=["taesd"], default=None)
    options.add_argument("--size", type=int, default=None)
    options.add_argument("--batch", type=lambda text: [int(word) for word in text.split(",")], default=[1])
    options.add_argument(
        "--int8", action="store_true", help="8-bit graphs too (calibrated with 8 pictures, papercut's with 64)"
    )
    options.add_argument("--no-teacher", action="store_true", help="leave out the 25 guided steps")
    options.add_argument("--only", default=None, help="words that an entrant's name must have one of, with commas")
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--seconds", type=float, default=2.0, help="of a turn, one run at least")
    options.add_argument("--threads", type=int, default=torch.get_num_threads())
    options.add_argument("--hold", action="store_true", help="keep all open: more memory, and no opening between turns")
    options.add_argument("--stages", action="store_true", help="the times of the graphs in the table as well")
    options.add_argument("--baseline", default="tiue, ONNX Runtime")
    options.add_argument("--work", type=Path, default=None, help="keep the graphs here; without it they are made anew")
    options.add_argument("--out", type=Path, default=None, help="write OUT.json and OUT.md")
    args = options.parse_args()
    torch.set_num_threads(args.threads)
    torch.set_grad_enabled(False)
    random = args.model != EMBEDDED
    model = (
        random_model(args.model, device="cpu", precision="fp32", seed=0, vae=args.vae)
        if random
        else load_model(EMBEDDED, EMBEDDED, device="cpu", precision="fp32", vae=args.vae)
    )
    size = model.image_size if args.size is None else (args.size, args.size)
    work = args.work or Path(tempfile.mkdtemp(prefix="peers-cpu-"))
    work.mkdir(parents=True, exist_ok=True)
    try:
        folders = write_graphs(model, work, size, int8=args.int8)
        found = entrants(model, folders, work / "plain", threads=args.threads, teacher=not args.no_teacher)
        if args.only is not None:
            wanted = [*args.only.split(","), "tiue, torch"]
            found = [e for e in found if any(word in e.name for word in wanted) or e.name == args.baseline]
        measure(found, args, model.latent_shape(size))
        others = check(found)
    finally:
        if args.work is None:
            shutil.rmtree(work, ignore_errors=True)
    made = report(found, args, size) | {"draw something else": others}
    text = as_markdown(made, stages=args.stages)
    print(text)
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.with_suffix(".json").write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
        args.out.with_suffix(".md").write_text(text, encoding="utf-8")
    if others:
        raise SystemExit("\n".join(others))


if __name__ == "__main__":
    main()
