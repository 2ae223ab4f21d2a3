"""What the command line asks of ``tiue distill``, and the config that it comes to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tiue_cli.distill.config import Layer, ResolvedConfig, parse_overrides, resolve_config
from tiue_cli.distill.recipes import config_layer
from tiue_cli.distill.run_folder import stored_config
from tiue_cli.errors import UsageError
from tiue_cli.model.hub import EMBEDDED, EMBEDDED_GUIDANCE, EMBEDDED_TEACHER


@dataclass(frozen=True)
class DistillRequest:
    """The options as they were given; None and empty are "not given"."""

    out: Path
    teacher: str | None = None
    prompts: str | None = None
    config: str | None = None
    overrides: Sequence[str] = ()
    max_steps: int | None = None
    warm_start: int | None = None
    resume: bool = False

    def resolve(self) -> ResolvedConfig:
        """Merge the stored config (with ``resume``) or the teacher's own, ``config``, ``overrides`` and options.

        Raises UsageError.
        """
        layers = []
        if self.resume:
            layers.append(Layer("the run", stored_config(self.out).model_dump(mode="json")))
        if self.config is not None:
            layers.append(config_layer(self.config))
        layers.append(Layer("--set", parse_overrides(self.overrides)))
        for option, values in self._options().items():
            layers.append(Layer(option, values))
        if not self.resume and self.prompts is None and not _sets_prompts(layers):
            raise UsageError("there are no prompts to train on", hint="give --prompts FILE")
        if not self.resume:
            layers.insert(0, Layer("the teacher", _teachers_own(layers)))
        return resolve_config(layers)

    def arguments(self) -> list[str]:
        """The same request as words of a command line."""
        words = ["--out", str(self.out)]
        for option, value in (("--teacher", self.teacher), ("--prompts", self.prompts), ("--config", self.config)):
            if value is not None:
                words += [option, value]
        for override in self.overrides:
            words += ["--set", override]
        for option, number in (("--max-steps", self.max_steps), ("--warm-start", self.warm_start)):
            if number is not None:
                words += [option, str(number)]
        return [*words, "--resume"] if self.resume else words

    def _options(self) -> dict[str, Mapping[str, Any]]:
        options: dict[str, Mapping[str, Any]] = {}
        if self.teacher is not None:
            options["--teacher"] = {"teacher": self.teacher}
        if self.prompts is not None:
            options["--prompts"] = {"prompts": self.prompts}
        if self.max_steps is not None:
            options["--max-steps"] = {"max_steps": self.max_steps}
        if self.warm_start is not None:
            options["--warm-start"] = {"warm_start": {"steps": self.warm_start}}
        return options


def _teachers_own(layers: Sequence[Layer]) -> dict[str, Any]:
    """Settings that a teacher wants otherwise than Stable Diffusion, whose are the defaults of the config."""
    teachers = [layer.values["teacher"] for layer in layers if "teacher" in layer.values]
    if not teachers or teachers[-1] not in (EMBEDDED, EMBEDDED_TEACHER):
        return {}
    return {
        "warm_start.guidance": EMBEDDED_GUIDANCE,
        "vsd.guidance": EMBEDDED_GUIDANCE,
        "validation.teacher_guidance": EMBEDDED_GUIDANCE,
    }


def _sets_prompts(layers: Sequence[Layer]) -> bool:
    return any("prompts" in layer.values for layer in layers)
