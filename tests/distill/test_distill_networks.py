"""The networks and the step against plain diffusers and hand-made LoRA."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pydantic
import pytest
import torch
from diffusers.models import UNet2DConditionModel
from helpers import seeded_noise, tiny_unet

from tiue_cli.distill.config import LoraSettings, VsdSettings
from tiue_cli.distill.data.pairs import solve
from tiue_cli.distill.estimate import estimate_run, lora_parameter_count
from tiue_cli.distill.networks import ScoreModel, StudentGenerator, guided_prediction, lora_targets
from tiue_cli.distill.peak_memory import LiveMemory
from tiue_cli.distill.student_trainer import make_optimizer, rate_factor
from tiue_cli.errors import TiueError, UsageError
from tiue_cli.model.schedule import alphas_cumprod
from tiue_cli.model.teacher import load_teacher
from tiue_cli.model.unet import UNetDecoder, UNetEncoder

TEXT = (7, 32)


def with_random_lora(unet: UNet2DConditionModel, settings: LoraSettings, *, merge: bool) -> ScoreModel:
    """A LoRA teacher that has moved away from its teacher."""
    score = ScoreModel(unet, settings, seed=0, merged=merge)
    with torch.no_grad():
        for index, parameter in enumerate(score.adapter_parameters().values()):
            parameter.copy_(0.05 * seeded_noise(tuple(parameter.shape), seed=index))
    return score


def merged(unet: UNet2DConditionModel, score: ScoreModel, settings: LoraSettings) -> UNet2DConditionModel:
    """The oracle: W + alpha/rank·B·A written into a copy of the teacher, without peft."""
    copied = copy.deepcopy(unet)
    adapters = score.adapter_parameters()
    with torch.no_grad():
        for name, a in adapters.items():
            if ".lora_A." in name:
                b = adapters[name.replace(".lora_A.", ".lora_B.")]
                layer = copied.get_submodule(name.split(".lora_A.")[0])
                product = b.flatten(1) @ a.flatten(1)
                layer.weight += settings.alpha / settings.rank * product.reshape(layer.weight.shape)
    return copied


def inputs(count: int = 2) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x_t = seeded_noise((count, 4, 8, 8))
    return x_t, torch.tensor([100, 800])[:count], seeded_noise((count, *TEXT), seed=1)


def test_new_lora_teacher_is_the_teacher() -> None:
    unet = tiny_unet()
    expected = unet(*inputs(), return_dict=False)[0]
    torch.testing.assert_close(ScoreModel(unet, LoraSettings(rank=2), seed=0)(*inputs()), expected)


@pytest.mark.parametrize("merge", [True, False])
def test_lora_teacher_adds_the_product_of_its_adapters_and_switches_off(merge: bool) -> None:
    unet, settings = tiny_unet(), LoraSettings(rank=2, alpha=3.0, targets="all")
    plain = copy.deepcopy(unet)
    score = with_random_lora(unet, settings, merge=merge)
    torch.testing.assert_close(
        score(*inputs()), merged(plain, score, settings)(*inputs(), return_dict=False)[0], rtol=1e-4, atol=1e-5
    )
    with score.adapters_off():
        torch.testing.assert_close(score(*inputs()), plain(*inputs(), return_dict=False)[0])
    assert not torch.allclose(score(*inputs()), plain(*inputs(), return_dict=False)[0])


def test_adapters_have_the_same_gradients_merged_and_beside_their_layers() -> None:
    found = []
    for merge in (True, False):
        score = with_random_lora(tiny_unet(), LoraSettings(rank=2, targets="all"), merge=merge)
        with score.adapters_off():
            score(*inputs())
        score(*inputs()).square().mean().backward()
        found.append({name: value.grad for name, value in score.adapter_parameters().items()})
    for name, gradient in found[0].items():
        torch.testing.assert_close(gradient, found[1][name], rtol=1e-3, atol=1e-6)


def test_only_adapters_can_be_trained() -> None:
    score = ScoreModel(tiny_unet(), LoraSettings(rank=2), seed=0)
    wanted = {id(value) for value in score.adapter_parameters().values()}
    assert {id(value) for value in score.parameters() if value.requires_grad} == wanted
    with score.adapters_off():
        pass
    assert {id(value) for value in score.parameters() if value.requires_grad} == wanted


def test_merged_adapters_leave_the_network_as_it_was() -> None:
    """peft's layers are out of it again; names, order and first values of the adapters are peft's."""
    settings, plain = LoraSettings(rank=2, targets="all"), tiny_unet()
    merged, beside = (ScoreModel(tiny_unet(), settings, seed=3, merged=merge) for merge in (True, False))
    assert {name: type(layer) for name, layer in merged.unet.named_modules() if "upsamplers" not in name} == {
        name: type(layer) for name, layer in plain.named_modules() if "upsamplers" not in name
    }
    state = merged.unet.state_dict()
    assert all(torch.equal(state[name], value) for name, value in plain.state_dict().items())
    mine, pefts = merged.adapter_parameters(), beside.adapter_parameters()
    assert list(mine) == list(pefts) and all(torch.equal(mine[name], pefts[name]) for name in mine)


def test_lora_weights_depend_on_the_seed_alone() -> None:
    torch.manual_seed(5)
    first = ScoreModel(tiny_unet(), LoraSettings(rank=2), seed=0).adapter_parameters()
    torch.manual_seed(6)
    second = ScoreModel(tiny_unet(), LoraSettings(rank=2), seed=0).adapter_parameters()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_targets_are_found_by_kind_and_name() -> None:
    unet = tiny_unet()
    pairs = lora_targets(unet, "attention-qv")
    assert {name.rsplit(".", 1)[-1] for name in pairs} == {"to_q", "to_v"}
    assert set(pairs) < set(lora_targets(unet, "attention")) < set(lora_targets(unet, "linear"))
    assert set(lora_targets(unet, "linear")) < set(lora_targets(unet, "all"))
    assert lora_targets(unet, ("to_q", "to_v")) == pairs
    with pytest.raises(UsageError, match="to_z"):
        lora_targets(unet, ("to_q", "to_z"))


def test_adapter_count_is_what_peft_makes() -> None:
    for targets in ("attention", "linear", "all"):
        settings = LoraSettings(rank=3, targets=targets)  # type: ignore[arg-type]
        expected = lora_parameter_count(tiny_unet(), settings)
        made = ScoreModel(tiny_unet(), settings, seed=0).adapter_parameters()
        assert sum(value.numel() for value in made.values()) == expected


def test_guided_pair_in_one_batch_equals_two_calls() -> None:
    unet = tiny_unet()
    score = ScoreModel(copy.deepcopy(unet), LoraSettings(rank=2), seed=0)
    x_t, timesteps, states = inputs()
    empty = seeded_noise((1, *TEXT), seed=9)
    conditional = unet(x_t, timesteps, states, return_dict=False)[0]
    unconditional = unet(x_t, timesteps, empty.expand(2, -1, -1), return_dict=False)[0]
    for guidance in (1.0, 4.5):
        found = guided_prediction(score, x_t, timesteps, text_states=states, empty_states=empty, guidance=guidance)
        expected = unconditional + guidance * (conditional - unconditional)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    rows = torch.tensor([1.0, 4.5])[:, None, None, None]
    found = guided_prediction(score, x_t, timesteps, text_states=states, empty_states=empty, guidance=rows)
    torch.testing.assert_close(found, torch.stack([conditional[0], expected[1]]), rtol=1e-4, atol=1e-5)


def test_guidance_within_an_interval_of_timesteps() -> None:
    timesteps = torch.tensor([99, 100, 500, 501])
    settings = VsdSettings(guidance=3.0, guidance_timesteps=(100, 500))
    guidance = settings.guidance_at(timesteps)
    assert isinstance(guidance, torch.Tensor) and guidance.flatten().tolist() == [1.0, 3.0, 3.0, 1.0]
    assert VsdSettings(guidance=3.0).guidance_at(timesteps) == 3.0
    for wrong in ({"guidance_timesteps": (500, 100)}, {"guidance": 1.0, "guidance_timesteps": (100, 500)}):
        with pytest.raises(pydantic.ValidationError, match="guidance_timesteps"):
            VsdSettings.model_validate(wrong)


def test_student_is_the_unet_with_features_of_its_first_timestep() -> None:
    """K = 1: encoder and decoder at one timestep are the plain UNet."""
    unet = tiny_unet()
    noise, _, states = inputs()
    expected = unet(noise, 999, states, return_dict=False)[0]
    for decoder in ("shared", "plain"):
        student = StudentGenerator(unet, [999], decoder=decoder)
        torch.testing.assert_close(student(noise, states)[0], expected, rtol=1e-4, atol=1e-5)


def test_the_encoder_may_have_a_timestep_of_its_own() -> None:
    unet = tiny_unet()
    noise, _, states = inputs()
    timesteps = torch.tensor([999, 500])
    for own in (None, 999, 17):
        features = UNetEncoder(unet)(noise, states, 999 if own is None else own)
        expected = UNetDecoder(unet)(features, timesteps, states)
        student = StudentGenerator(unet, timesteps.tolist(), encoder_timestep=own)
        torch.testing.assert_close(student(noise, states), expected, rtol=1e-4, atol=1e-5)


def test_gradients_of_the_shared_decoder_are_those_of_the_plain_one() -> None:
    noise, _, states = inputs()
    gradients = []
    for decoder in ("shared", "plain"):
        unet = tiny_unet().double()
        StudentGenerator(unet, [999, 500, 10], decoder=decoder)(
            noise.double(), states.double()
        ).square().sum().backward()
        gradients.append({name: value.grad for name, value in unet.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-8, atol=1e-10)


def test_ddim_pairs_are_what_the_teacher_draws(v_teacher_folder: Path) -> None:
    teacher = load_teacher(v_teacher_folder)
    noise, prompts = seeded_noise((2, 4, 8, 8)), ["a red star", "a tree"]
    found = solve(
        ScoreModel(copy.deepcopy(teacher.unet), LoraSettings(rank=2), seed=0),
        noise,
        scheduler_config=teacher.scheduler_config,
        text_states=teacher.encode_prompts(prompts),
        empty_states=teacher.encode_prompts([""]),
        steps=5,
        guidance=3.0,
        solver="ddim",
    )
    torch.testing.assert_close(found, teacher.latents(prompts, noise, steps=5, guidance=3.0), rtol=1e-3, atol=1e-4)


class GaussianScore(torch.nn.Module):
    """The exact v prediction where every image is mean + deviation·N(0, 1)."""

    def __init__(self, config: dict[str, Any], mean: float, deviation: float) -> None:
        super().__init__()
        self.abar, self.mean, self.deviation = torch.from_numpy(alphas_cumprod(config)), mean, deviation

    def forward(self, x_t: torch.Tensor, timesteps: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        abar = self.abar[timesteps].reshape(-1, 1, 1, 1)
        noise = (1 - abar).sqrt() * (x_t - abar.sqrt() * self.mean) / (abar * self.deviation**2 + 1 - abar)
        return (noise - (1 - abar).sqrt() * x_t) / abar.sqrt()


def test_both_solvers_solve_the_same_equation() -> None:
    """For Gaussians the probability-flow ODE has a closed form: quantiles go to quantiles."""
    from tiue_cli.model.sd_configs import SD15_SCHEDULER

    config = {**SD15_SCHEDULER, "prediction_type": "v_prediction"}
    model, noise = GaussianScore(config, 0.3, 0.5), seeded_noise((2, 4, 2, 2), dtype=torch.float64)
    abar = alphas_cumprod(config)[-1]
    start = np.sqrt(abar * 0.25 + 1 - abar)
    expected = 0.3 + 0.5 * (noise - np.sqrt(abar) * 0.3) / start
    states = torch.zeros(2, *TEXT)
    for solver, steps, tolerance in (("ddim", 500, 0.02), ("unipc", 8, 0.06), ("unipc", 20, 0.02)):
        found = solve(
            model, noise, scheduler_config=config, text_states=states, empty_states=states[:1], steps=steps,
            guidance=1.0, solver=solver,  # type: ignore[arg-type]
        )  # fmt: skip
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_vsd_gradient_of_a_step_by_hand(
    prediction_type: str,
    make_config: Callable[..., Any],
    v_teacher_folder: Path,
    tiny_teacher_folder: Path,
) -> None:
    """From the drawn timesteps and noise on, everything again with plain diffusers and merged weights."""
    from tiue_cli.distill.data.order import Stream, generator, normal
    from tiue_cli.distill.loop import Distillation

    folder = v_teacher_folder if prediction_type == "v_prediction" else tiny_teacher_folder
    config = make_config(teacher=folder, warm_start__steps=0, vsd__guidance=3.0, vsd__lora_guidance=2.0)
    run = Distillation(config, folder / "never written")
    trainer = run.prepare()
    teacher = load_teacher(folder)
    with torch.no_grad():
        for index, parameter in enumerate(trainer.networks.score.adapter_parameters().values()):
            parameter.copy_(0.05 * seeded_noise(tuple(parameter.shape), seed=index))
    lora = merged(teacher.unet, trainer.networks.score, config.lora)
    x_0, states = seeded_noise((2, 4, 8, 8), seed=3), teacher.encode_prompts(["a tree", "a red star"])

    random = generator(config.seed, Stream.SCORE)
    timesteps = torch.from_numpy(random.integers(20, 981, size=2))
    noise = normal(random, x_0.shape)
    abar = torch.from_numpy(alphas_cumprod(teacher.scheduler_config))[timesteps].float().reshape(2, 1, 1, 1)
    x_t = abar.sqrt() * x_0 + (1 - abar).sqrt() * noise

    def noise_of(unet: UNet2DConditionModel, guidance: float) -> torch.Tensor:
        empty = teacher.encode_prompts(["", ""])
        with torch.no_grad():
            with_text, without = (unet(x_t, timesteps, given, return_dict=False)[0] for given in (states, empty))
        prediction = without + guidance * (with_text - without)
        return prediction if prediction_type == "epsilon" else abar.sqrt() * prediction + (1 - abar).sqrt() * x_t

    expected = (1 - abar) * (noise_of(teacher.unet, 3.0) - noise_of(lora, 2.0))
    found = trainer._vsd_gradient(x_0, states, 0)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_estimate_knows_the_parts(make_config: Callable[..., Any]) -> None:
    small, large = (estimate_run(make_config(batch_size=size), prompts=5, half=False) for size in (1, 4))
    unet = sum(value.numel() for value in tiny_unet(levels=2).parameters())
    assert small.parameters["student's UNet"] == unet
    assert small.memory_bytes["student, Adam"] == 8 * unet
    grown = [sizes.memory_bytes["gradients and activations, at their most"] for sizes in (small, large)]
    assert 1.5 < grown[1] / grown[0] < 4  # gradients do not grow with the batch
    assert small.steps == {"warm start": 2, "distillation": 2}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"student__timesteps": [100, 500]}, "must decrease"),
        ({"student__timesteps": [500, 100], "student__spacing": "trailing"}, "both given"),
        ({"size": [30, 32]}, "multiples of 4"),
    ],
)
def test_dry_run_refuses_what_the_run_would_refuse(
    make_config: Callable[..., Any], changes: dict[str, Any], says: str
) -> None:
    with pytest.raises(TiueError, match=says):
        estimate_run(make_config(**changes), prompts=5, half=False)


def test_dry_run_refuses_a_student_as_a_teacher(make_config: Callable[..., Any], tiny_student_folder: Path) -> None:
    with pytest.raises(TiueError, match="not a teacher"):
        estimate_run(make_config(teacher=tiny_student_folder), prompts=5, half=False)


def test_learning_rate_rises_and_decays() -> None:
    linear = [rate_factor(step, 10, warmup_steps=0, decay="linear") for step in (0, 5, 10)]
    assert linear == pytest.approx([1.0, 0.5, 0.0])
    assert [rate_factor(step, 10, warmup_steps=3, decay="constant") for step in range(5)] == pytest.approx(
        [0.25, 0.5, 0.75, 1.0, 1.0]
    )
    assert rate_factor(5, 10, warmup_steps=0, decay="cosine") == pytest.approx(0.5)


def test_eight_bit_adam_without_its_library_names_the_command() -> None:
    from tiue_cli.distill.config import OptimizerSettings
    from tiue_cli.errors import MissingDependencyError

    with pytest.raises(MissingDependencyError) as caught:
        make_optimizer([torch.nn.Parameter(torch.zeros(1))], OptimizerSettings(name="adamw8bit"))
    assert "pip install" in str(caught.value.hint)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's malloc is Linux's")
def test_memory_that_is_kept_is_not_faulted_in_again() -> None:
    script = """
import resource, torch
from tiue_cli.base.allocator import keep_freed_memory

def faults(rounds=10, size=12 * 2**20):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(rounds):
        torch.empty(size).fill_(1.0)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults()
fresh = faults()
print(fresh, keep_freed_memory(), faults() and faults())
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, encoding="utf-8", check=True)
    fresh, kept, again = done.stdout.split()
    if kept == "False":
        pytest.skip("this C library has no mallopt")
    assert int(again) < int(fresh) / 4


def test_the_lora_teacher_recomputes_with_the_same_gradients_and_less_memory() -> None:
    found = {}
    for recomputing in (False, True):
        score = ScoreModel(tiny_unet(), LoraSettings(rank=2, alpha=2), seed=0, merged=False)
        for value in score.adapter_parameters().values():  # half of them begin as zeros, and would hide the others
            torch.nn.init.normal_(value, generator=torch.Generator().manual_seed(value.numel()))
        if recomputing:
            score.recompute()
        config = score.unet.config
        noise = seeded_noise((2, config.in_channels, 8, 8), seed=1)
        states = seeded_noise((2, 5, config.cross_attention_dim), seed=2)
        call = lambda: score(noise, torch.tensor([900, 100]), states)  # noqa: B023, E731
        with LiveMemory() as memory:
            prediction = call()
            kept = memory.live
        del prediction
        gradients = torch.autograd.grad(call().square().mean(), list(score.adapter_parameters().values()))
        found[recomputing] = kept, gradients
    assert found[True][0] < found[False][0] / 2
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-9) for a, b in zip(found[True][1], found[False][1], strict=True))
