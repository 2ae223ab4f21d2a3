"""What quality is measured on: which prompts, which seeds, and which of the images serve which figure."""

from __future__ import annotations

import hashlib
import itertools
from dataclasses import dataclass
from pathlib import Path

from tiue_cli.errors import UsageError
from tiue_cli.generate.prompts import read_prompts
from tiue_cli.model.noise import check_seed
from tiue_cli.papercut.captions import SceneSpec
from tiue_cli.papercut.evaluation import HELD_OUT_SEED, balanced_specs

COMPARABLE_IMAGES = 5_000
"""Below, the Fréchet distance's bias by N outweighs differences between models."""


@dataclass(frozen=True)
class QualityConfig:
    """What to measure quality on, and how.

    ``prompts`` is a file of one prompt a line (.txt) or JSON lines; None are papercut's held-out captions, half with
    two objects. ``images`` is N, for each subject and repetition: fewer than prompts take the first of them, more begin
    again. ``seeds`` are the first seeds of the repetitions; image i of a repetition has its first seed + i.
    ``reference``, ``extractor`` (None: papercut's own) and ``clip``: see ``open_reference`` and ``open_extractor``.
    ``resize`` crops and resizes drawn and reference images alike to a square of so many pixels. Diversity is over
    ``diversity_images`` images of each of ``diversity_prompts`` prompts; 1 image leaves it out. ``cache`` is a folder
    that all processes share: what is interrupted goes on. ``keep_images`` is a folder for the pictures themselves.

    COCO-2014-30k, as most papers on Stable Diffusion measure it: ``prompts`` with 30,000 captions of val2014, one a
    line; ``images=30_000``; ``resize=256``; ``extractor`` Inception; ``reference`` the folder val2014.
    """

    cache: Path
    prompts: Path | None = None
    images: int = 256
    seeds: tuple[int, ...] = (0,)
    reference: Path | None = None
    extractor: Path | None = None
    clip: Path | None = None
    resize: int | None = None
    diversity_prompts: int = 32
    diversity_images: int = 2
    batch: int = 16
    keep_images: Path | None = None


@dataclass(frozen=True)
class Row:
    """One image to draw."""

    prompt: str
    seed: int


@dataclass(frozen=True)
class QualityPlan:
    """N prompts in the order of the images; ``specs`` where all are papercut captions.

    ``diverse`` are the images, among the N, whose prompts are drawn again: ``extra`` more times each, after the N.
    """

    source: str
    prompts: tuple[str, ...]
    specs: tuple[SceneSpec, ...] | None
    seeds: tuple[int, ...]
    diverse: tuple[int, ...]
    extra: int
    notes: tuple[str, ...] = ()

    @property
    def images(self) -> int:
        """N."""
        return len(self.prompts)

    @property
    def sha256(self) -> str:
        """Of the prompts and their order."""
        return hashlib.sha256("\n".join(self.prompts).encode()).hexdigest()

    @property
    def order(self) -> tuple[int, ...]:
        """For every image of a repetition, the N and the repeated ones, the number of its prompt."""
        again = itertools.chain.from_iterable(itertools.repeat(number, self.extra) for number in self.diverse)
        return (*range(self.images), *again)

    def rows(self, repetition: int) -> list[Row]:
        """Every image of a repetition."""
        first = self.seeds[repetition]
        return [Row(self.prompts[number], first + place) for place, number in enumerate(self.order)]

    def diversity_groups(self) -> tuple[list[int], list[int]]:
        """(places of images in ``rows``, number of each one's prompt) for diversity; empty where it is left out."""
        if self.extra == 0:
            return [], []
        chosen = set(self.diverse)
        places = [place for place, number in enumerate(self.order) if place >= self.images or number in chosen]
        return places, [self.order[place] for place in places]


def plan_quality(config: QualityConfig) -> QualityPlan:
    """Read the prompts and lay out the images. Raises UsageError, PromptError."""
    if config.images < 2:
        raise UsageError(f"images {config.images} is less than 2", hint="give 2 or more")
    if config.resize is not None and not 8 <= config.resize <= 4096:
        raise UsageError(f"--resize {config.resize} is outside 8 to 4096 pixels", hint="256 is usual")
    if config.prompts is None:
        specs = balanced_specs(config.images)
        prompts = [spec.caption for spec in specs]
        source = f"papercut's held-out captions, half with two objects, seed {HELD_OUT_SEED}"
        notes: tuple[str, ...] = ()
    else:
        prompts, notes = _from_file(config.prompts, config.images)
        source = config.prompts.name
    parsed = [SceneSpec.parse(prompt) for prompt in prompts]
    understood = tuple(spec for spec in parsed if spec is not None)
    count = min(config.diversity_prompts, len(prompts))
    plan = QualityPlan(
        source=source,
        prompts=tuple(prompts),
        specs=understood if len(understood) == len(parsed) else None,
        seeds=config.seeds,
        diverse=tuple(number * len(prompts) // count for number in range(count)),
        extra=config.diversity_images - 1,
        notes=notes,
    )
    _check_seeds(plan)
    return plan


def _from_file(path: Path, images: int) -> tuple[list[str], tuple[str, ...]]:
    rows = read_prompts(path)
    for row in rows:
        if (row.seed, row.size, row.steps) != (None, None, None):
            raise UsageError(
                f"{row.where} sets a seed, size or steps, and quality is measured with its own",
                hint="keep the prompts alone",
            )
    prompts = [row.prompt for row in rows]
    if len(prompts) > images:
        return prompts[:images], (f"the first {images} of {len(prompts)} prompts",)
    if len(prompts) < images:
        note = f"{len(prompts)} prompts for {images} images: prompts occur more than once"
        return list(itertools.islice(itertools.cycle(prompts), images)), (note,)
    return prompts, ()


def _check_seeds(plan: QualityPlan) -> None:
    """Repetitions that share noise are no repetitions. Raises UsageError."""
    count = len(plan.order)
    for seed in plan.seeds:
        check_seed(seed)
        check_seed(seed + count - 1)
    for earlier, later in itertools.pairwise(sorted(plan.seeds)):
        if later - earlier < count:
            raise UsageError(
                f"the repetitions of seeds {earlier} and {later} would share noise: each takes {count} seeds",
                hint=f"take first seeds {count} apart: {', '.join(str(i * count) for i in range(len(plan.seeds)))}",
            )
