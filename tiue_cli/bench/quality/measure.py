"""How good pictures are: each subject's images against a reference, and against their prompts.

    plan ─▶ for each subject: draw (shared by processes, resumed) ─▶ features ─▶ figures of each repetition ─▶ records

The reference is read before anything is drawn, so that what is wrong with it costs no hours. On papercut the attribute
checker's shares stand beside, and renders measured against renders: the ceiling, in the same figures and the same N.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from tiue_cli.base.events import Emit, Note, Progress
from tiue_cli.bench.quality.clip_features import ClipExtractor
from tiue_cli.bench.quality.drawing import Drawing, Processes, QualitySubject, slug
from tiue_cli.bench.quality.extractors import PapercutChecker, Sharpness, open_extractor
from tiue_cli.bench.quality.features import Extractor, Resizing
from tiue_cli.bench.quality.metrics import FeatureSet, clip_score, compare_sets, diversity, mean_figures
from tiue_cli.bench.quality.plan import COMPARABLE_IMAGES, QualityConfig, QualityPlan, plan_quality, spec_rows
from tiue_cli.bench.quality.references import CEILING_SEED, Reference, open_reference, rendered_chunks
from tiue_cli.bench.report.schema import QualityProtocol, QualityRecord
from tiue_cli.bench.subjects.torch_subjects import Subject
from tiue_cli.errors import UsageError
from tiue_cli.papercut.evaluation import prompt_following_of_features
from tiue_cli.papercut.scenes import SIZE

REFERENCE = "reference"
"""Key of the record of papercut's renders: the best that the figures can be."""
_FEATURES, _CLIP, _CHECKER, _SHARPNESS = "features", "clip", "checker", "sharpness"
_SEEDS_A_REPETITION = 2**30
_IDENTITY = {
    "model",
    "model_sha256",
    "kind",
    "backend",
    "steps",
    "guidance",
    "precision",
    "device",
    "merged_upsampler",
    "random_weights",
}


@dataclass(frozen=True)
class QualityResult:
    """How it was measured, and a record for each subject, in their order."""

    protocol: QualityProtocol
    records: tuple[QualityRecord, ...]


def measure_quality(
    config: QualityConfig,
    subjects: Iterable[QualitySubject],
    *,
    emit: Emit = lambda event: None,
    processes: Processes | None = None,
) -> QualityResult | None:
    """Measure each subject; returns the result, or None in all but the main process. ``emit`` gets notes and progress.

    ``subjects`` are taken one by one, so that they can be loaded one by one; all processes must get the same. Raises
    UsageError for what does not fit together, QualityError for images, references and features that cannot be measured.
    """
    measurement = _Measurement(config, Processes() if processes is None else processes, emit)
    for subject in subjects:
        measurement.measure(subject)
    return measurement.result()


@dataclass
class _Tools:
    """What reads images, by the name under which its features are kept."""

    extractor: Extractor
    clip: ClipExtractor | None
    all: dict[str, Extractor] = field(default_factory=dict)


class _Measurement:
    """One measurement in the making."""

    def __init__(self, config: QualityConfig, processes: Processes, emit: Emit) -> None:
        self._config, self._processes, self._emit = config, processes, emit
        self._plan = plan_quality(config)
        self._resizing = Resizing(config.resize, config.resize_filter)
        self._tools = _open_tools(config, self._plan)
        self._size: tuple[int, int] | None = None
        self._reference: Reference | None = None
        self._texts: NDArray[np.float32] | None = None
        self._left_out: dict[str, str] = {}
        self._records: list[QualityRecord] = []

    def measure(self, subject: QualitySubject) -> None:
        """Draw a subject's images and, in the main process, add its record."""
        if subject.key in {record.subject for record in self._records}:
            raise UsageError(f"{subject.key} is named twice", hint="name each subject once")
        self._check_size(subject)
        if self._processes.is_main and self._reference is None:
            self._open_reference(subject.size)
        drawings = [self._drawing(subject, repetition) for repetition in range(len(self._config.seeds))]
        total = sum(len(drawing) for drawing in drawings)
        share = sum(drawing.remaining(self._processes) for drawing in drawings)
        done = total - share if self._processes.count == 1 else 0
        total = total if self._processes.count == 1 else share
        for drawing in drawings:
            for count in drawing.draw(self._processes):
                done += count
                self._emit(Progress("quality", done, total, subject.key))
        self._processes.wait()
        if self._processes.is_main:
            for drawing in drawings:
                drawing.write_index()
            figures = [self._figures(subject.key, drawing) for drawing in drawings]
            self._add(subject.key, figures, drawings)

    def result(self) -> QualityResult | None:
        """The protocol and all records; None in all but the main process."""
        if not self._processes.is_main:
            return None
        if self._reference is None:
            raise UsageError("there is no subject whose quality could be measured", hint="name a trained model")
        return QualityResult(self._protocol(self._reference), tuple(self._records))

    # --- before drawing ---

    def _check_size(self, subject: QualitySubject) -> None:
        of_papercut = isinstance(self._tools.extractor, PapercutChecker) or self._config.reference is None
        if of_papercut and self._plan.specs is not None and subject.size != (SIZE, SIZE):
            raise UsageError(
                f"{subject.key} draws {subject.size[0]}x{subject.size[1]}, and papercut's scenes are {SIZE}x{SIZE}",
                hint="give --prompts, --reference and --extractor that fit the model",
            )
        if self._size is not None and self._size != subject.size and self._resizing.side is None:
            raise UsageError(
                f"{subject.key} draws {subject.size[0]}x{subject.size[1]}, the subjects before it"
                f" {self._size[0]}x{self._size[1]}",
                hint="have all resized alike, for example --resize 256",
            )
        self._size = subject.size

    def _open_reference(self, size: tuple[int, int]) -> None:
        self._reference = reference = open_reference(
            self._config.reference,
            specs=self._plan.specs,
            extractor=self._tools.extractor,
            resizing=self._resizing,
            size=size,
            progress=lambda done, total: self._emit(Progress("reference", done, total)),
        )
        for text in (*self._plan.notes, *reference.notes):
            self._emit(Note(text))
        if self._tools.clip is not None:
            self._texts = self._tools.clip.texts(self._plan.prompts)
        if self._config.reference is None and self._plan.specs is not None:
            self._add(REFERENCE, [self._ceiling(number) for number in range(len(self._config.seeds))], [])

    def _drawing(self, subject: QualitySubject, repetition: int) -> Drawing:
        config = self._config
        keep = config.keep_images
        return Drawing(
            subject,
            self._plan.rows(repetition),
            self._tools.all,
            resizing=self._resizing,
            batch=config.batch,
            cache=config.cache,
            keep=None if keep is None else keep / slug(subject.key) / str(config.seeds[repetition]),
        )

    # --- figures ---

    def _figures(self, key: str, drawing: Drawing) -> dict[str, float]:
        return self._figures_of(key, {name: drawing.features(name) for name in self._tools.all})

    def _ceiling(self, repetition: int) -> dict[str, float]:
        """Renders of a plan's rows, from seeds of their own, measured as if a model had drawn them."""
        parts: dict[str, list[NDArray[np.float32]]] = {name: [] for name in self._tools.all}
        for _, images in rendered_chunks(spec_rows(self._plan), CEILING_SEED + repetition * _SEEDS_A_REPETITION):
            for name, extractor in self._tools.all.items():
                parts[name].append(extractor(self._resizing(images)))
        return self._figures_of(REFERENCE, {name: np.concatenate(part) for name, part in parts.items()})

    def _figures_of(self, key: str, features: Mapping[str, NDArray[np.float32]]) -> dict[str, float]:
        """Figures of one repetition from the features of its rows, by name of the extractor."""
        assert self._reference is not None
        count = self._plan.images
        ours = features[_FEATURES]
        figures, left_out = compare_sets(FeatureSet(ours[:count], name=key), self._reference.features, k=self._config.k)
        self._left_out |= left_out
        places, groups = self._plan.diversity_groups()
        spread = diversity(ours[places], groups) if places else None
        if spread is not None:
            figures["diversity"] = spread
        figures["sharpness"] = float(features[_SHARPNESS][:count].mean())
        if self._texts is not None:
            figures["clip_score"] = clip_score(features.get(_CLIP, ours)[:count], self._texts)
        if self._plan.specs is not None and _checker_name(self._tools) is not None:
            read = features[_checker_name(self._tools) or _FEATURES][:count] * PapercutChecker.scale
            following = prompt_following_of_features(read, self._plan.specs)
            figures |= {f"checker_{name}": value for name, value in following.items()}
        return figures

    def _add(self, key: str, figures: Sequence[Mapping[str, float]], drawings: Sequence[Drawing]) -> None:
        mean = mean_figures(figures)
        images = sum(drawing.timed[0] for drawing in drawings)
        seconds = sum(drawing.timed[1] for drawing in drawings)
        keep = self._config.keep_images
        self._records.append(
            QualityRecord(
                subject=key,
                metrics=mean,
                repetitions={name: tuple(one[name] for one in figures) for name in mean},
                images_per_s=images / seconds if images and self._processes.count == 1 else None,
                kept_in=None if keep is None or not drawings else str(keep / slug(key)),
            )
        )

    def _protocol(self, reference: Reference) -> QualityProtocol:
        config, plan, tools = self._config, self._plan, self._tools
        comparable, why_not = _comparable(plan.images, reference, tools.extractor)
        left_out = [f"{', '.join(names)} left out: {reason}" for reason, names in _by_reason(self._left_out).items()]
        again = len(plan.diverse)
        return QualityProtocol(
            prompts=plan.source,
            prompts_sha256=plan.sha256,
            images=plan.images,
            seeds=plan.seeds,
            reference=reference.description,
            reference_images=reference.images,
            reference_sha256=reference.sha256,
            extractor=tools.extractor.name,
            extractor_sha256=tools.extractor.sha256,
            features=tools.extractor.width,
            resize=f"images: {self._resizing.describe()}; for the extractor: {tools.extractor.resize}",
            k=config.k,
            diversity=f"{plan.extra + 1} images of each of {again} prompts" if plan.extra else None,
            clip=None if tools.clip is None else tools.clip.name,
            clip_sha256=None if tools.clip is None else tools.clip.sha256,
            comparable=comparable,
            notes=(*why_not, *left_out, *plan.notes, *reference.notes),
        )


def quality_subject(subject: Subject, *, size: tuple[int, int], latent_shape: tuple[int, int, int]) -> QualitySubject:
    """A bench's subject as one whose quality is measured; cached by its weights' hash and the way it is run."""
    record = subject.record
    identity = record.model_dump_json(include=_IDENTITY)
    return QualitySubject(
        key=subject.key,
        identity=identity,
        size=size,
        latent_shape=latent_shape,
        generate=lambda prompts, noise: subject.run(prompts, noise).images,
    )


def quality_subjects(
    subjects: Iterable[Subject], *, size: tuple[int, int], latent_shape: tuple[int, int, int]
) -> list[QualitySubject]:
    """Those of a bench whose pictures are their own: teachers, students at each K, peers.

    Left out is what draws another one's pictures in another way (parity is its check), and what is not trained.
    """
    return [
        quality_subject(subject, size=size, latent_shape=latent_shape)
        for subject in subjects
        if subject.record.kind in ("teacher", "student", "peer")
        and subject.reference is None
        and not (subject.record.untrained and subject.record.kind == "student")
    ]


def _open_tools(config: QualityConfig, plan: QualityPlan) -> _Tools:
    papercut = plan.specs is not None
    extractor = open_extractor(config.extractor, papercut=papercut)
    clip = extractor if isinstance(extractor, ClipExtractor) and extractor.reads_text else None
    tools = _Tools(extractor, clip, {_FEATURES: extractor, _SHARPNESS: Sharpness()})
    if config.clip is not None:
        tools.clip = tools.all[_CLIP] = ClipExtractor(config.clip)
    # Another extractor on papercut's own reference: the checker still reads what the captions ask for.
    if papercut and config.reference is None and not isinstance(extractor, PapercutChecker):
        tools.all[_CHECKER] = PapercutChecker()
    return tools


def _checker_name(tools: _Tools) -> str | None:
    if isinstance(tools.extractor, PapercutChecker):
        return _FEATURES
    return _CHECKER if _CHECKER in tools.all else None


def _comparable(images: int, reference: Reference, extractor: Extractor) -> tuple[bool, list[str]]:
    """Whether figures may stand beside published ones, and what speaks against it."""
    against = []
    if images < COMPARABLE_IMAGES:
        against.append(f"{images} images, fewer than {COMPARABLE_IMAGES:,}: not comparable with published figures")
    if 0 < reference.images < COMPARABLE_IMAGES:
        against.append(f"{reference.images} references, fewer than {COMPARABLE_IMAGES:,}: the same")
    if isinstance(extractor, PapercutChecker):
        against.append("papercut's own features and scenes: figures compare among models of papercut alone")
    return not against, against


def _by_reason(left_out: Mapping[str, str]) -> dict[str, list[str]]:
    reasons: dict[str, list[str]] = {}
    for name, reason in left_out.items():
        reasons.setdefault(reason, []).append(name)
    return reasons
