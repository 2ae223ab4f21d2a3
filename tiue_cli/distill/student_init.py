"""The student before its first step, and the words about it after the last."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tiue_cli.distill.config import DistillConfig, to_yaml
from tiue_cli.distill.data.prompts import TrainingPrompts
from tiue_cli.errors import ModelFolderError
from tiue_cli.model.hub import EMBEDDED, EMBEDDED_TEACHER
from tiue_cli.model.schedule import LinearCombine
from tiue_cli.model.student import StudentModel, load_student, student_from_teacher


def teacher_source(config: DistillConfig) -> str:
    """What to load as the teacher; the embedded model's plain name means its student elsewhere."""
    return EMBEDDED_TEACHER if config.teacher == EMBEDDED else config.teacher


def load_untrained(config: DistillConfig) -> StudentModel:
    """The teacher's parts with the manifest of the student to be, on the CPU in float32. Raises TiueError."""
    settings = config.student
    return student_from_teacher(
        teacher_source(config), steps=settings.steps, spacing=settings.spacing, timesteps=settings.timesteps
    )


def load_initial_weights(student: StudentModel, source: str) -> None:
    """Put the UNet weights of another student into ``student``. ModelFolderError where they are of another kind."""
    other = load_student(source)
    mine, theirs = student.manifest.prediction_type, other.manifest.prediction_type
    if mine != theirs:
        raise ModelFolderError(
            f"student.init {source} predicts {theirs}, and the teacher {mine}",
            hint="start from a student of this teacher, or leave student.init out",
        )
    weights = other.unet.state_dict()
    wanted = {name: value.shape for name, value in student.unet.state_dict().items()}
    if {name: value.shape for name, value in weights.items()} != wanted:
        raise ModelFolderError(
            f"student.init {source} has another UNet than the teacher",
            hint="start from a student of this teacher, or leave student.init out",
        )
    student.unet.load_state_dict(weights)


def prefixes_of(scheduler_config: Mapping[str, Any], timesteps: Sequence[int]) -> tuple[LinearCombine, ...]:
    """The weighted sums over the first 1 … K-1 of the decoder timesteps."""
    return tuple(
        LinearCombine.from_scheduler_config(scheduler_config, timesteps[:count]) for count in range(1, len(timesteps))
    )


def card_section(config: DistillConfig, prompts: TrainingPrompts) -> str:
    """How the student was made, for the end of its model card."""
    return (
        "\n## Training\n\n"
        f"`tiue distill` on {len(prompts.prompts):,} prompts and no images, with these settings:\n\n"
        f"```yaml\n{to_yaml(config)}```\n"
    )
