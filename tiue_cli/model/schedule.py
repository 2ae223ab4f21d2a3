"""Timesteps, alphas, and K solver steps as one weighted sum.

Deterministic DDIM (Song et al. 2021, arXiv 2010.02502, eq. 12 with eta = 0) is linear in the noise and in the
K predictions, so the loop over timesteps collapses into ``latents = a·noise + Σ b_i·prediction_i``. The weights are
derived here from the scheduler's own config, in float64, and applied in float32 (their signs alternate and their sum
cancels: half precision would lose digits). ``abar`` is the cumulative product of the alphas, DDIM's alpha.

A config is read as diffusers' ``DDIMScheduler`` reads it, whichever solver it names: DDIM, DDPM, PNDM, Euler … differ
in how they step, not in the schedule that the UNet was trained on. Solver-only fields (``skip_prk_steps``,
``use_karras_sigmas`` …) are therefore ignored. NumPy only: an exported student needs this module without torch.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, TypeVar

import numpy as np
import numpy.typing as npt

from tiue_cli.errors import SchedulerError, UsageError

if TYPE_CHECKING:
    import torch

    Array = TypeVar("Array", npt.NDArray[Any], torch.Tensor)
else:
    Array = TypeVar("Array")

Float64 = npt.NDArray[np.float64]

SPACINGS: Final = ("leading", "trailing")
STEPS: Final = 4
"""Decoder timesteps of the paper and of the authors' released students."""
RELEASED_SPACING: Final = "leading"
"""Of those, which say nothing about themselves."""

# Solvers over the discrete variance-preserving schedule. What is missing here (flow matching, EDM, …) has another one.
_SOLVERS: Final = frozenset(
    {
        "DDIMParallelScheduler",
        "DDIMScheduler",
        "DDPMParallelScheduler",
        "DDPMScheduler",
        "DEISMultistepScheduler",
        "DPMSolverMultistepScheduler",
        "DPMSolverSDEScheduler",
        "DPMSolverSinglestepScheduler",
        "EulerAncestralDiscreteScheduler",
        "EulerDiscreteScheduler",
        "HeunDiscreteScheduler",
        "KDPM2AncestralDiscreteScheduler",
        "KDPM2DiscreteScheduler",
        "LCMScheduler",
        "LMSDiscreteScheduler",
        "PNDMScheduler",
        "SASolverScheduler",
        "TCDScheduler",
        "UniPCMultistepScheduler",
    }
)
# diffusers: `clip_sample` is True in these where the config does not say; the other solvers never clip.
_CLIPS_BY_DEFAULT: Final = frozenset(
    {"DDIMParallelScheduler", "DDIMScheduler", "DDPMParallelScheduler", "DDPMScheduler"}
)
_DDIM_DEFAULTS: Final[dict[str, Any]] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "trained_betas": None,
    "set_alpha_to_one": True,
    "steps_offset": 0,
    "prediction_type": "epsilon",
    "timestep_spacing": "leading",
    "rescale_betas_zero_snr": False,
}


def ddim_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The scheduler config as ``DDIMScheduler`` takes it: every field that matters is explicit, none clips.

    ``DDIMScheduler.from_config(ddim_config(config))`` steps exactly what ``LinearCombine`` sums. A missing
    ``clip_sample`` means what the named class does: DDIM and DDPM clip (refused), the others do not; a config without
    ``_class_name`` is taken for DDIM's. Raises ``SchedulerError`` for whatever is not linear or not this schedule.
    """
    check_types(config)
    class_name = config.get("_class_name") or "DDIMScheduler"
    if class_name not in _SOLVERS:
        raise SchedulerError(
            f"scheduler {class_name} does not step the discrete schedule of Stable Diffusion",
            hint="use a Stable Diffusion 1.x or 2.x model, with e.g. DDIMScheduler or PNDMScheduler",
        )
    _refuse_nonlinear(config, class_name)
    return {
        "_class_name": "DDIMScheduler",
        **{name: config.get(name, default) for name, default in _DDIM_DEFAULTS.items()},
        "clip_sample": False,
        "thresholding": False,
    }


_BOOLEAN: Final = "true or false"
_WHOLE: Final = "a whole number"
_NUMBER: Final = "a number"
_TEXT: Final = "text"
_TYPES: Final[dict[str, str]] = {
    "_class_name": _TEXT,
    "num_train_timesteps": _WHOLE,
    "beta_start": _NUMBER,
    "beta_end": _NUMBER,
    "beta_schedule": _TEXT,
    "set_alpha_to_one": _BOOLEAN,
    "steps_offset": _WHOLE,
    "prediction_type": _TEXT,
    "timestep_spacing": _TEXT,
    "rescale_betas_zero_snr": _BOOLEAN,
    "clip_sample": _BOOLEAN,
    "thresholding": _BOOLEAN,
    "eta": _NUMBER,
}


def check_types(config: Mapping[str, Any]) -> None:
    """Refuse fields of another type than diffusers writes: ``"set_alpha_to_one": "false"`` is true to Python.

    Raises ``SchedulerError`` naming the field.
    """
    for name, wanted in _TYPES.items():
        absent = name not in config or (name == "_class_name" and config[name] is None)
        if not absent and not _is(config[name], wanted):
            raise SchedulerError(
                f"{name} in the scheduler config is {config[name]!r:.60}, not {wanted}",
                hint=f"correct {name} in scheduler_config.json, or restore the file",
            )
    betas = config.get("trained_betas")
    if betas is not None and not (
        isinstance(betas, (Sequence, np.ndarray)) and all(_is(beta, _NUMBER) for beta in betas)
    ):
        raise SchedulerError("trained_betas in the scheduler config is not a list of numbers", hint="restore the file")
    if config.get("num_train_timesteps", 1) < 1:
        raise SchedulerError(
            f"num_train_timesteps in the scheduler config is {config['num_train_timesteps']}", hint="restore the file"
        )


def _is(value: object, wanted: str) -> bool:
    if wanted == _TEXT:
        return isinstance(value, str)
    if wanted == _BOOLEAN:
        return isinstance(value, (bool, np.bool_))
    if isinstance(value, (bool, np.bool_)):  # to Python it is a number
        return False
    if wanted == _WHOLE:
        return isinstance(value, (int, np.integer))
    return isinstance(value, (int, float, np.integer, np.floating)) and math.isfinite(value)


def _refuse_nonlinear(config: Mapping[str, Any], class_name: str) -> None:
    """Raise ``SchedulerError`` where a step of the config is not linear in its prediction, or draws noise."""
    if config.get("clip_sample", class_name in _CLIPS_BY_DEFAULT):
        how = "is true" if "clip_sample" in config else f"is missing and {class_name} clips by default"
        raise SchedulerError(
            f"the scheduler config clips samples (clip_sample {how}); clipping is not linear",
            hint='set "clip_sample": false in scheduler_config.json, as latent models have it',
        )
    if config.get("thresholding", False):
        raise SchedulerError(
            "the scheduler config thresholds samples (thresholding is true); thresholding is not linear",
            hint='set "thresholding": false in scheduler_config.json, as latent models have it',
        )
    prediction_type = config.get("prediction_type", "epsilon")
    if prediction_type not in ("epsilon", "v_prediction"):
        raise SchedulerError(
            f"prediction_type {prediction_type!r} is not supported",
            hint="use a model that predicts epsilon or v_prediction",
        )
    if config.get("eta", 0.0) != 0.0:
        raise SchedulerError(
            f"eta is {config['eta']!r}; only deterministic DDIM (eta 0) collapses into one sum",
            hint="remove eta from scheduler_config.json",
        )


def alphas_cumprod(config: Mapping[str, Any]) -> Float64:
    """The abar of every training timestep, shape (T,), float64, from the config's betas.

    Schedules: ``linear``, ``scaled_linear``, ``squaredcos_cap_v2``, ``trained_betas``; with ``rescale_betas_zero_snr``
    the last one is exactly 0 (Lin et al. 2023, arXiv 2305.08891, algorithm 1). Raises ``SchedulerError`` for others.
    """
    config = ddim_config(config)
    alphas_bar = np.cumprod(1.0 - _betas(config), dtype=np.float64)
    if config["rescale_betas_zero_snr"]:
        roots = np.sqrt(alphas_bar)
        alphas_bar = ((roots - roots[-1]) * roots[0] / (roots[0] - roots[-1])) ** 2
    return alphas_bar


def _betas(config: Mapping[str, Any]) -> Float64:
    count, schedule = int(config["num_train_timesteps"]), config["beta_schedule"]
    start, end = float(config["beta_start"]), float(config["beta_end"])
    if config["trained_betas"] is not None:
        betas = np.asarray(config["trained_betas"], dtype=np.float64)
        if betas.shape != (count,):
            raise SchedulerError(
                f"trained_betas has the shape {betas.shape}, num_train_timesteps is {count}",
                hint="make the two agree in scheduler_config.json",
            )
        return betas
    if schedule == "linear":
        return np.linspace(start, end, count, dtype=np.float64)
    if schedule == "scaled_linear":
        return np.linspace(math.sqrt(start), math.sqrt(end), count, dtype=np.float64) ** 2
    if schedule == "squaredcos_cap_v2":
        bar = np.cos((np.arange(count + 1) / count + 0.008) / 1.008 * (math.pi / 2)) ** 2
        result: Float64 = np.minimum(1.0 - bar[1:] / bar[:-1], 0.999)
        return result
    raise SchedulerError(
        f"beta_schedule {schedule!r} is not supported",
        hint="use a model with linear, scaled_linear, squaredcos_cap_v2 or trained betas",
    )


def decoder_timesteps(
    scheduler_config: Mapping[str, Any], steps: int, *, spacing: str | None = None
) -> tuple[int, ...]:
    """The ``steps`` timesteps, highest first, of diffusers' ``DDIMScheduler.set_timesteps``.

    ``spacing`` is ``leading`` or ``trailing``; None takes the config's own. A single step is always trailing: pure
    noise belongs to the last timestep ([999]), and diffusers' leading spacing would put it at the first ([1]).
    Raises ``UsageError`` for a number of steps that the schedule does not have, ``SchedulerError`` for other spacings.
    """
    config = ddim_config(scheduler_config)
    count = int(config["num_train_timesteps"])
    if not 1 <= steps <= count:
        raise UsageError(f"{steps} decoder timesteps are outside 1–{count}", hint="4 is usual")
    spacing = config["timestep_spacing"] if spacing is None else spacing
    if spacing not in SPACINGS:
        raise SchedulerError(f"timestep spacing {spacing!r} is unknown", hint="choose leading or trailing")
    if spacing == "trailing" or steps == 1:
        timesteps = np.round(np.arange(count, 0, -count / steps)).astype(np.int64) - 1
    else:
        timesteps = np.arange(steps)[::-1] * (count // steps) + int(config["steps_offset"])
    return _checked_timesteps(config, timesteps.tolist())


def _checked_timesteps(config: Mapping[str, Any], timesteps: Sequence[int]) -> tuple[int, ...]:
    """The timesteps as a tuple; raises ``SchedulerError`` unless they fall and lie inside the training schedule."""
    checked = tuple(int(timestep) for timestep in timesteps)
    last = int(config["num_train_timesteps"]) - 1
    falling = all(later < earlier for earlier, later in itertools.pairwise(checked))
    if not checked or not falling or checked[-1] < 0 or checked[0] > last:
        raise SchedulerError(
            f"decoder timesteps {list(checked)} must decrease and lie between 0 and {last}",
            hint="e.g. [999, 749, 499, 249]; fewer steps or a smaller steps_offset also helps",
        )
    return checked


@dataclass(frozen=True)
class LinearCombine:
    """K deterministic DDIM steps as one weighted sum: latents = weights[0]·noise + Σ weights[i]·predictions[i-1].

    ``timesteps`` (K) fall; ``weights`` (K+1) belong to the noise and the K predictions. ``noise_weights`` (K rows of
    K+1) are the same sums for the noise that each v prediction implies; empty where predictions are noise already.
    """

    timesteps: tuple[int, ...]
    weights: tuple[float, ...]
    prediction_type: str
    noise_weights: tuple[tuple[float, ...], ...] = field(default=(), repr=False)

    @classmethod
    def from_scheduler_config(cls, config: Mapping[str, Any], timesteps: Sequence[int]) -> LinearCombine:
        """Unroll DDIM over ``timesteps`` from x_T = noise to the config's final abar, in float64.

        Raises ``SchedulerError`` for a config that is not linear (clipping, thresholding, eta), that predicts samples,
        or that asks an epsilon prediction at abar = 0, where noise says nothing about the image.
        """
        config = ddim_config(config)
        timesteps = _checked_timesteps(config, timesteps)
        prediction_type, alphas_bar = str(config["prediction_type"]), alphas_cumprod(config)
        final = 1.0 if config["set_alpha_to_one"] else float(alphas_bar[0])

        count = len(timesteps)
        x_t = np.eye(count + 1)[0]  # coefficients of (noise, prediction_1 … prediction_K)
        noises = []
        for i, (timestep, target) in enumerate(zip(timesteps, _step_targets(config, timesteps), strict=True)):
            bar, next_bar = float(alphas_bar[timestep]), final if target < 0 else float(alphas_bar[target])
            prediction = np.eye(count + 1)[i + 1]
            x_0, noise = _clean_and_noise(x_t, prediction, bar, timestep=timestep, prediction_type=prediction_type)
            x_t = math.sqrt(next_bar) * x_0 + math.sqrt(1.0 - next_bar) * noise
            noises.append(tuple(noise.tolist()))
        noise_weights = tuple(noises) if prediction_type == "v_prediction" else ()
        return cls(timesteps, tuple(x_t.tolist()), prediction_type, noise_weights)

    def __call__(self, noise: Array, predictions: Array) -> Array:
        """Latents (B, C, h, w) from the noise (B, C, h, w) and the predictions (K, B, C, h, w); NumPy or torch.

        Computed and returned in float32 whatever the inputs' precision (float64 stays float64).
        """
        return _weighted_sum(self.weights, noise, predictions)

    def noise_predictions(self, noise: Array, predictions: Array) -> Array:
        """The noise that each prediction implies along the trajectory, (K, B, C, h, w); epsilon is returned as it is.

        v prediction: ε_i = √abar_i·v_i + √(1 - abar_i)·x_i (Salimans & Ho 2022, arXiv 2202.00512, appendix D), where
        x_i is itself a sum of the noise and the predictions before it.
        """
        if self.prediction_type == "epsilon":
            return predictions
        rows = [_weighted_sum(row, noise, predictions) for row in self.noise_weights]
        if isinstance(noise, np.ndarray):
            return np.stack(rows)
        import torch  # already loaded by whoever made the tensors

        return torch.stack(rows)


def combine_for_run(
    scheduler_config: Mapping[str, Any], trained_timesteps: Sequence[int], *, spacing: str, steps: int | None = None
) -> LinearCombine:
    """The sum for a run of a student with ``steps`` decoder timesteps, at most as many as it was trained with.

    ``spacing`` is the student's own (``leading``, ``trailing`` or ``explicit``). Fewer steps are spaced anew by the
    same rule; an explicit list has no rule, so it runs whole. None runs what was trained. Raises ``UsageError``.
    """
    trained = tuple(trained_timesteps)
    if steps is None or steps == len(trained):
        return LinearCombine.from_scheduler_config(scheduler_config, trained)
    if spacing == "explicit":
        raise UsageError(
            f"this student has its own timesteps {list(trained)}; {steps} steps are not defined for it",
            hint=f"leave --steps out, or give {len(trained)}",
        )
    if not 1 <= steps < len(trained):
        raise UsageError(
            f"this student was trained with {len(trained)} steps and cannot draw with {steps}",
            hint=f"choose 1 to {len(trained)}",
        )
    timesteps = decoder_timesteps(scheduler_config, steps, spacing=spacing)
    return LinearCombine.from_scheduler_config(scheduler_config, timesteps)


def ddim_steps(scheduler_config: Mapping[str, Any], steps: int) -> tuple[tuple[int, float, float], ...]:
    """``steps`` deterministic DDIM steps as (timestep, a, b): x_next = a·x + b·prediction (eq. 12 with eta = 0).

    Spaced as the config says; what diffusers' ``DDIMScheduler`` does one by one. Raises SchedulerError, UsageError.
    """
    config = ddim_config(scheduler_config)
    spacing, count = config["timestep_spacing"], int(config["num_train_timesteps"])
    if steps == 1 and spacing == "leading":
        timesteps: tuple[int, ...] = (int(config["steps_offset"]),)  # DDIMScheduler's, where decoder_timesteps differs
    else:
        timesteps = decoder_timesteps(config, steps)
    alphas_bar = alphas_cumprod(config)
    final = 1.0 if config["set_alpha_to_one"] else float(alphas_bar[0])
    found = []
    for timestep in timesteps:
        target = timestep - count // steps
        bar, next_bar = float(alphas_bar[timestep]), final if target < 0 else float(alphas_bar[target])
        x_t, prediction = np.eye(2)
        kind = str(config["prediction_type"])
        x_0, noise = _clean_and_noise(x_t, prediction, bar, timestep=timestep, prediction_type=kind)
        a, b = math.sqrt(next_bar) * x_0 + math.sqrt(1.0 - next_bar) * noise
        found.append((timestep, float(a), float(b)))
    return tuple(found)


def _step_targets(config: Mapping[str, Any], timesteps: tuple[int, ...]) -> tuple[int, ...]:
    """Where each step ends; negative means the final abar.

    ``DDIMScheduler`` ends a step at t - ⌊T/K⌋, which is the next timestep except where K does not divide T: trailing,
    K = 3, it goes from 666 to 333 and then on from 332. Its own timesteps are stepped as it does, so that the sum
    equals the loop; any other list goes from timestep to timestep.
    """
    count, steps = int(config["num_train_timesteps"]), len(timesteps)
    for spacing in SPACINGS:
        try:
            regular = decoder_timesteps(config, steps, spacing=spacing)
        except SchedulerError:  # an offset that leaves the schedule: not what these timesteps are
            continue
        if timesteps == regular:
            return tuple(timestep - count // steps for timestep in timesteps)
    return (*timesteps[1:], -1)


def _clean_and_noise(
    x_t: Float64, prediction: Float64, bar: float, *, timestep: int, prediction_type: str
) -> tuple[Float64, Float64]:
    """x_0 and ε, as coefficients, from x_t = √abar·x_0 + √(1 - abar)·ε and what was predicted."""
    signal, sigma = math.sqrt(bar), math.sqrt(1.0 - bar)
    if prediction_type == "v_prediction":
        return signal * x_t - sigma * prediction, signal * prediction + sigma * x_t
    if bar == 0.0:
        raise SchedulerError(
            f"epsilon prediction is undefined at timestep {timestep}: abar is 0 there (rescale_betas_zero_snr)",
            hint="use a v_prediction model, or leading timesteps",
        )
    return (x_t - sigma * prediction) / signal, prediction


def _weighted_sum(weights: Sequence[float], noise: Array, predictions: Array) -> Array:
    """weights[0]·noise + Σ weights[i]·predictions[i-1], in float32 at least; no matmul, which may run in TF32."""
    total = weights[0] * _at_least_float32(noise)
    for weight, prediction in zip(weights[1:], predictions, strict=True):
        total = total + weight * _at_least_float32(prediction)
    return total


def _at_least_float32(array: Array) -> Array:
    if array.dtype.itemsize >= 4:
        return array
    return array.astype(np.float32) if isinstance(array, np.ndarray) else array.float()
