"""The stages of gpu_check.py that measure torch in their own process: ceilings, passes, training steps, kernels."""

from __future__ import annotations

import contextlib
import functools
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path
from typing import Any

from gpu_common import (
    PROMPTS,
    ROOT,
    STEPS,
    TEACHER_STEPS,
    Check,
    Figures,
    device_ms,
    error,
    free,
    latent,
    teacher_folder,
    wait,
    wall_ms,
)


def machine(check: Check) -> None:
    """The machine, and what ``tiue doctor`` says of it."""
    import torch

    found: Figures = {
        "date": date.today().isoformat(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cores": os.cpu_count(),
    }
    if not check.cpu:
        properties = torch.cuda.get_device_properties(0)
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        found |= {
            "gpu": properties.name,
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "cudnn": torch.backends.cudnn.version(),
            "driver": subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip(),
        }
        with contextlib.suppress(ImportError):
            import triton

            found["triton"] = triton.__version__
    from tiue_cli import __version__

    check.put("machine", value={**found, "tiue": __version__})


def ceilings(check: Check) -> None:
    """The rates that shares refer to: the largest of several matrix products, and a copy within the device's memory."""
    import torch

    side = 512 if check.cpu else 8192
    for dtype in (check.dtype,) if check.cpu else (torch.float16, torch.bfloat16):
        rates = []
        for one in (side // 2, side):
            left, right = (torch.randn(one, one, device=check.device).to(dtype) for _ in range(2))
            rates.append(2 * one**3 / device_ms(check, functools.partial(torch.mm, left, right)) * 1000)
        check.put("ceilings", f"matmul {str(dtype)[6:]} TFLOP/s", value=[round(rate / 1e12, 2) for rate in rates])
        if dtype is check.dtype:
            check.peak = max(rates)
            check.put("ceilings", "matmul_flops_per_s", value=check.peak)
    source = torch.empty(2**24 if check.cpu else 2**30, device=check.device, dtype=torch.uint8).random_()
    target = torch.empty_like(source)
    seconds = device_ms(check, lambda: target.copy_(source)) / 1000
    check.put("ceilings", "copy TB/s", value=round(2 * source.numel() / seconds / 1e12, 3))


def right(check: Check) -> None:
    """Every way to run a pass against plain modules in float32: relative errors of the parts, PSNR of the pictures."""
    import torch

    from tiue_cli.backends.torch_prepared import FastModel
    from tiue_cli.model.autoencoder import ImageDecoder
    from tiue_cli.model.unet import UNetDecoder, UNetEncoder

    cudnn_before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    for vae in (None, "taesd"):
        exact = check.components(vae=vae, dtype=torch.float32)
        generator = torch.Generator("cpu").manual_seed(1)
        side = exact.info.sample_size[0] // (
            1 if check.cpu else 2
        )  # errors are no smaller there, and it is sooner done
        noise = torch.randn(2, exact.info.latent_channels, side, side, generator=generator).to(check.device)
        states = torch.randn(2, exact.info.text_tokens, exact.info.text_width, generator=generator).to(check.device)
        last = int(exact.scheduler_config["num_train_timesteps"]) - 1
        steps = torch.tensor([last - number * (last // STEPS) for number in range(STEPS)], device=check.device)
        with torch.inference_mode():
            features = UNetEncoder(exact.unet)(noise, states, steps[:1])
            predicted = UNetDecoder(exact.unet)(features, steps, states)
            image = ImageDecoder(exact.vae).decode_float(noise)
        del exact
        for dtype in (torch.float32,) if check.cpu else (torch.float16, torch.bfloat16):
            for name, options in variants(check, compiled=False).items():
                if name != "default" and (vae is not None or dtype is torch.bfloat16):
                    continue  # the others differ in the UNet, and were compared in float16
                parts = check.components(vae=vae, dtype=torch.float32)
                for module in (parts.unet, parts.vae, parts.text_encoder):
                    torch.nn.Module.to(module, dtype)
                fast = FastModel(text_encoder=parts.text_encoder, unet=parts.unet, vae=parts.vae, options=options)
                with torch.inference_mode():
                    texts = fast.unet.texts(states.to(dtype))
                    times = fast.unet.times(steps)
                    ours = fast.encode(noise.to(dtype), times[:1], texts)
                    found = {
                        "encoder": error(ours.mid, features.mid),
                        "decoder": error(fast.decode(ours, times, texts), predicted),
                        "vae": error(fast._decode(fast.images.scaled(noise).to(dtype)), image),
                    }
                check.put("right", f"{vae or 'kl'} {str(dtype)[6:]} {name}", value=found)
                del parts, fast
    torch.backends.cudnn.allow_tf32 = cudnn_before


def passes(check: Check) -> None:
    """Prompts to pixels: the authors' plain scheme, and every way to run ours, captured."""
    import torch

    for vae in (None, "taesd"):
        parts = check.components(vae=vae)
        plain_pass(check, parts, vae or "kl")
        for module in (parts.unet, parts.vae):
            torch.nn.Module.to(module, memory_format=torch.channels_last)
        for name, options in variants(check, compiled=False).items():
            if vae is not None and name not in ("default", "cuDNN's search", "one graph"):
                continue  # the UNet is the same, and there is no attention
            for batch in check.batches if name == "default" else check.batches[::2]:
                if check.has(8):
                    timed_pass(check, parts, options, vae=vae or "kl", name=name, batch=batch, steps=STEPS)
            free(check)
        for steps in range(1, STEPS):
            if check.has(6):
                timed_pass(
                    check, parts, default_options(), vae=vae or "kl", name=f"default K={steps}", batch=1, steps=steps
                )
        del parts
        free(check)


def compiled(check: Check) -> None:
    """The same through ``torch.compile`` and then captured; the first call's seconds are the compiler's."""
    import torch

    for vae, batch in ((None, 1), ("taesd", 1), (None, 16), ("taesd", 16)) if not check.cpu else ():
        parts = check.components(vae=vae)
        for module in (parts.unet, parts.vae):
            torch.nn.Module.to(module, memory_format=torch.channels_last)
        for name, options in variants(check, compiled=True).items():
            if check.has(100):
                timed_pass(check, parts, options, vae=vae or "kl", name=name, batch=batch, steps=STEPS)
        del parts
        torch._dynamo.reset()
        free(check)


def teacher(check: Check) -> None:
    """25 guided steps: diffusers' pipeline as it is, and our captured step."""
    import numpy as np
    import torch

    from tiue_cli.backends.torch_prepared import FastModel, TeacherSteps
    from tiue_cli.model.schedule import ddim_steps

    parts = check.components()
    model = check.model(parts)
    sampled = ddim_steps(parts.scheduler_config, TEACHER_STEPS if not check.cpu else 3)
    noise = np.random.default_rng(0).standard_normal((1, *latent(parts)), dtype=np.float32)
    plain = model.teacher
    placed = torch.from_numpy(noise).to(check.device)

    def run_plain() -> Any:
        with torch.inference_mode():
            return plain.sample(PROMPTS[:1], placed, steps=len(sampled))

    check.put("teacher", "eager, diffusers", value={"wall_ms": wall_ms(run_plain, least=3), "steps": len(sampled)})
    for module in (parts.unet, parts.vae):
        torch.nn.Module.to(module, memory_format=torch.channels_last)
    fast = FastModel(text_encoder=parts.text_encoder, unet=parts.unet, vae=parts.vae, options=default_options())
    steps = TeacherSteps(fast, parts.tokenizer)

    def run() -> Any:
        with torch.inference_mode():
            return steps(PROMPTS[:1], noise, sampled, guidance=7.5)

    started = time.perf_counter()
    run()
    first = round(time.perf_counter() - started, 2)
    check.put(
        "teacher", "captured", value={"wall_ms": wall_ms(run, least=4), "first_s": first, "notes": list(fast.notes)}
    )


def distill(check: Check) -> None:
    """Seconds a step and peak memory: the recipe for 24 GB, larger batches, fp16; and a plainly written step."""
    import torch

    folder = teacher_folder(cpu=check.cpu)
    grid: dict[str, Figures] = {
        "sd15-24gb (batch 4, recomputing, bf16)": {
            "batch_size": 4,
            "precision": "bf16",
            "gradient_checkpointing": True,
        },
        "plain (batch 4, bf16)": {"batch_size": 4, "precision": "bf16", "plain": True},
        "batch 4, bf16": {"batch_size": 4, "precision": "bf16"},
        "batch 4, bf16, compiled": {"batch_size": 4, "precision": "bf16", "compile": True},
        "batch 4, recomputing, fp16": {"batch_size": 4, "precision": "fp16", "gradient_checkpointing": True},
        "batch 8, bf16": {"batch_size": 8, "precision": "bf16"},
    }
    if check.cpu:
        grid = {
            "fp32": {"batch_size": 2, "precision": "fp32"},
            "plain": {"batch_size": 2, "precision": "fp32", "plain": True},
        }
    for name, values in grid.items():
        if not check.has(45 if values.get("compile") else 12):
            check.put("distill", name, value="no time left")
            continue
        try:
            check.put("distill", name, value=distilled(check, folder, **values))
        except Exception as failure:  # noqa: BLE001  # the other settings go on
            traceback.print_exc(limit=-3)
            check.put("distill", name, value=f"{type(failure).__name__}: {str(failure)[:300]}")
        from accelerate.state import AcceleratorState

        AcceleratorState._reset_state(reset_partial_state=True)
        torch._dynamo.reset()
        free(check)


def profile(check: Check) -> None:
    """Which kernels the time of a pass goes to, by stage; what a change would have to shrink."""
    import torch

    from tiue_cli.backends.torch_prepared import FastModel

    for vae in (None, "taesd"):
        parts = check.components(vae=vae)
        for module in (parts.unet, parts.vae):
            torch.nn.Module.to(module, memory_format=torch.channels_last)
        fast = FastModel(text_encoder=parts.text_encoder, unet=parts.unet, vae=parts.vae, options=default_options())
        for batch in check.batches[::2]:
            with torch.inference_mode():
                for name, run in launched(check, fast, parts, batch).items():
                    if vae is None or name == "vae":
                        check.put("profile", f"{vae or 'kl'} batch {batch} {name}", value=kernels(check, run))
        del parts, fast
        free(check)


def launched(check: Check, fast: Any, parts: Any, batch: int) -> dict[str, Callable[[], Any]]:
    """The stages of a pass, each to be launched by itself."""
    import torch

    times = fast.unet.times(torch.arange(STEPS, device=check.device))
    noise = torch.randn(batch, *latent(parts), device=check.device, dtype=check.dtype)
    ids = torch.randint(0, 40, (batch, parts.info.text_tokens), device=check.device)
    texts = fast.unet.texts(fast.text(ids))
    features = fast.encode(noise, times[:1], texts)
    return {
        "text": lambda: fast.unet.texts(fast.text(ids)),
        "unet_encoder": lambda: fast.encode(noise, times[:1], texts),
        "unet_decoder": lambda: fast.decode(features, times, texts),
        "vae": lambda: fast.pixels(noise),
    }


def kernels(check: Check, run: Callable[[], Any]) -> Figures:
    """The kernels of a call that take longest."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    run()
    with profiler(activities=[ProfilerActivity.CPU if check.cpu else ProfilerActivity.CUDA], acc_events=True) as found:
        run()
        wait(check)
    rows = [
        (row.key[:110], row.count, row.self_cpu_time_total if check.cpu else row.self_device_time_total)
        for row in found.key_averages()
    ]
    rows.sort(key=lambda row: -row[2])
    return {
        "ms": round(sum(row[2] for row in rows) / 1000, 3),
        "launches": sum(row[1] for row in rows),
        "top": [[key, count, round(spent / 1000, 3)] for key, count, spent in rows[:16]],
    }


def default_options() -> Any:
    """What ``tiue generate`` runs."""
    from tiue_cli.backends.torch_prepared import FastOptions

    return FastOptions()


def variants(check: Check, *, compiled: bool) -> dict[str, Any]:
    """Ways to run a pass, the default first."""
    from tiue_cli.backends.torch_prepared import FastOptions

    if compiled:
        return {
            "compiled": FastOptions(kernels=False, compiled=True),
            "compiled, kernels": FastOptions(compiled=True),
            "compiled, kernels, autotuned": FastOptions(compiled=True, compile_mode="max-autotune-no-cudagraphs"),
        }
    return {
        "default": default_options(),
        "K-fold decoder": FastOptions(shared=False),
        "plain upsamplers": FastOptions(merged=False),
        "torch's norms": FastOptions(kernels=False),
        "cuDNN's search": FastOptions(search=True),
        "one graph": FastOptions(single=True),
        "attention by products": FastOptions(products=True),
        "search, one graph, products": FastOptions(search=True, single=True, products=True),
    }


def timed_pass(check: Check, parts: Any, options: Any, *, vae: str, name: str, batch: int, steps: int) -> None:
    """Wall time, stages by events, first call and share of the peak of one way to run a pass."""
    import numpy as np
    import torch

    from tiue_cli.backends.torch_prepared import FastModel, StudentPass
    from tiue_cli.bench.measure.clock import clock_for
    from tiue_cli.bench.measure.flops import StageFlops
    from tiue_cli.bench.subjects.models import combine_for

    student = check.model(parts).student
    combine = combine_for(student, steps)
    counted = StageFlops(parts, parts.info.sample_size)
    noise = np.random.default_rng(0).standard_normal((batch, *latent(parts)), dtype=np.float32)
    prompts = [PROMPTS[row % len(PROMPTS)] for row in range(batch)]
    try:
        fast = FastModel(text_encoder=parts.text_encoder, unet=parts.unet, vae=parts.vae, options=options)
        run = StudentPass(fast, parts.tokenizer, encoder_timestep=student.manifest.encoder_timestep)
        with torch.inference_mode():
            started = time.perf_counter()
            run(prompts, noise, combine)
            first_s = time.perf_counter() - started
            wall = wall_ms(lambda: run(prompts, noise, combine), least=10)
            clock = clock_for(check.device)
            taken: dict[str, list[float]] = {}
            for _ in range(7):
                run(prompts, noise, combine, clock=clock)
                for stage, spent in clock.take_ms().items():
                    taken.setdefault(stage, []).append(spent)
        stage_ms = {stage: round(statistics.median(values), 3) for stage, values in taken.items()}
        kind = "plain" if not options.shared else "merged" if options.merged else "shared"
        flops = {
            "text": counted.text(batch),
            "unet_encoder": counted.unet_encoder(batch),
            "unet_decoder": counted.unet_decoder(batch, steps, kind),
            "vae": counted.vae(batch),
        }
        row: Figures = {"wall_ms": wall, "first_s": round(first_s, 2), "stage_ms": stage_ms}
        if check.peak is not None:
            total = sum(stage_ms.values())
            row["floor_ms"] = {stage: round(1000 * count / check.peak, 3) for stage, count in flops.items()}
            row["share_of_peak"] = round(sum(flops.values()) / (wall / 1000) / check.peak, 3)
            row["device_share_of_peak"] = round(sum(flops.values()) / (total / 1000) / check.peak, 3)
        if not check.cpu:
            row["peak_GiB"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
        check.put("pass", f"{vae} batch {batch} {name}", value={**row, "notes": list(fast.notes)})
    except Exception as failure:  # the other ways go on
        if "CUDA error" in str(failure):
            raise
        traceback.print_exc(limit=-3)
        check.put("pass", f"{vae} batch {batch} {name}", value=f"{type(failure).__name__}: {str(failure)[:300]}")


def plain_pass(check: Check, parts: Any, vae: str) -> None:
    """The authors' scheme as they wrote it: a K-fold batch through diffusers' modules, launched one by one."""
    import numpy as np
    import torch

    from tiue_cli.bench.subjects.models import combine_for
    from tiue_cli.model.autoencoder import ImageDecoder
    from tiue_cli.model.text import encode_prompts
    from tiue_cli.model.unet import UNetDecoder, UNetEncoder

    student = check.model(parts).student
    combine = combine_for(student, STEPS)
    encoder, decoder, images = UNetEncoder(parts.unet), UNetDecoder(parts.unet), ImageDecoder(parts.vae)
    for batch in check.batches:
        noise = np.random.default_rng(0).standard_normal((batch, *latent(parts)), dtype=np.float32)
        prompts = [PROMPTS[row % len(PROMPTS)] for row in range(batch)]

        def run(noise: Any = noise, prompts: list[str] = prompts) -> Any:
            with torch.inference_mode():
                placed = torch.from_numpy(noise).to(check.device)
                states = encode_prompts(parts.tokenizer, parts.text_encoder, prompts).to(parts.unet.dtype)
                features = encoder(placed.to(parts.unet.dtype), states, student.manifest.encoder_timestep)
                timesteps = torch.tensor(combine.timesteps, device=check.device)
                return images.decode(combine(placed, decoder(features, timesteps, states)))

        check.put("pass", f"{vae} batch {batch} authors' scheme, eager", value={"wall_ms": wall_ms(run, least=5)})
    free(check)


def distilled(check: Check, folder: str, *, plain: bool = False, **values: Any) -> Figures:
    """A few steps of one setting."""
    import torch

    sys.path.insert(0, str(ROOT / "benchmarks"))
    from tiue_cli.distill.loop import Distillation
    from tiue_cli.distill.resolve import Layer, resolve_config

    with tempfile.TemporaryDirectory() as name:
        prompts = Path(name) / "prompts.txt"
        prompts.write_text("\n".join(f"a {color} {thing}" for color in ("red", "blue") for thing in ("star", "fish")))
        settings = {
            "teacher": folder, "prompts": str(prompts), "cache": f"{name}/cache", "warm_start": {"steps": 0},
            "student": {"steps": STEPS, "spacing": "leading"}, "validation": {"every": 0}, "max_steps": 10,
            "ema": 0.9999, **values,
        }  # fmt: skip
        with plainly_written() if plain else contextlib.nullcontext():
            if plain:
                settings |= {"text_cache": False, "student": {"steps": STEPS, "spacing": "leading", "decoder": "plain"}}
            run = Distillation(resolve_config([Layer("gpu_check", settings)]).config, Path(name) / "run")
            trainer = run.prepare()
            if plain:
                for unet in (trainer.networks.student, trainer.networks.score.unet):
                    unet.to(memory_format=torch.contiguous_format)
            if not check.cpu:
                torch.cuda.reset_peak_memory_stats()
            walls = []
            for _ in range(3 if check.cpu else 7):
                wait(check)
                started = time.perf_counter()
                if plain:
                    run._texts.empty = run._texts._encode([""]).to(trainer.accelerator.device)
                figures = trainer.step()
                wait(check)
                walls.append(time.perf_counter() - started)
        return {
            "s_per_step": round(statistics.median(walls[2:]), 4),
            "first_s": round(walls[0], 2),
            "peak_GiB": None if check.cpu else round(torch.cuda.max_memory_allocated() / 2**30, 2),
            "vsd": figures.get("vsd"),
            "skipped_steps": trainer.state.skipped_steps,
        }


@contextlib.contextmanager
def plainly_written() -> Iterator[None]:
    """Within the block a distillation step is what distill_speed.py calls plain."""
    from distill_speed import separate_calls

    from tiue_cli.distill import loop, trainer
    from tiue_cli.distill.networks import ScoreModel

    before: Any = (loop.ScoreModel, trainer.guided_prediction)
    loop.ScoreModel = functools.partial(ScoreModel, merged=False, merged_upsampler=False)  # type: ignore[assignment, misc]
    trainer.guided_prediction = separate_calls  # type: ignore[assignment]
    try:
        yield
    finally:
        loop.ScoreModel, trainer.guided_prediction = before
