"""How good pictures are: each subject's images against a reference, and against their prompts.

    plan ─▶ for each subject: draw (shared by processes, resumed) ─▶ features ─▶ figures of each repetition ─▶ records

The reference is read before anything is drawn, so that what is wrong with it costs no hours. On papercut the attribute
checker's shares stand beside, and renders measured against renders: the ceiling, in the same figures and the same N.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tiue_cli.base.events import Emit, Note, Progress
from tiue_cli.bench.quality.clip_features import ClipExtractor
from tiue_cli.bench.quality.drawing import Drawing, Processes, QualitySubject, slug
from tiue_cli.bench.quality.extractors import PapercutChecker, Sharpness, open_extractor
from tiue_cli.bench.quality.features import Extractor, Resizing
from tiue_cli.bench.quality.metrics import NEIGHBOURS, FeatureSet, clip_score, compare_sets, diversity, mean_figures
from tiue_cli.bench.quality.plan import COMPARABLE_IMAGES, QualityConfig, QualityPlan, plan_quality
from tiue_cli.bench.quality.references import CEILING_SEED, Reference, open_reference, rendered_chunks
from tiue_cli.bench.report.schema import QualityProtocol, QualityRecord
from tiue_cli.bench.report.view import REFERENCE
from tiue_cli.bench.subjects.subject import Draw, Subject
from tiue_cli.errors import UsageError
from tiue_cli.papercut.evaluation import prompt_following_of_features
from tiue_cli.papercut.scenes import SIZE

_FEATURES, _CLIP, _CHECKER, _SHARPNESS = "features", "clip", "checker", "sharpness"
"""Names under which features are kept."""
_SEEDS_A_REPETITION = 2**30
_IDENTITY = {
    "model", "model_sha256", "kind", "backend", "steps", "guidance", "precision", "device", "merged_upsampler",
    "random_weights",
}  # fmt: skip


@dataclass(frozen=True)
class QualityResult:
    """How it was measured, and a record for each subject, in their order."""

    protocol: QualityProtocol
    records: tuple[QualityRecord, ...]


class QualityMeasurement:
    """One measurement: ``prepare`` looks at what will be compared, ``measure_all`` draws and measures it.

    Raises UsageError for what does not fit together, QualityError for images, references and features that cannot be
    measured.
    """

    def __init__(
        self, config: QualityConfig, *, processes: Processes | None = None, emit: Emit = lambda event: None
    ) -> None:
        """Open what reads images; ``emit`` gets notes and progress."""
        processes = Processes() if processes is None else processes
        self._config, self._processes, self._emit = config, processes, emit
        self._plan = plan_quality(config)
        self._resizing = Resizing(config.resize)
        self._extractors = _open_extractors(config, self._plan)
        self._main = self._extractors[_FEATURES]
        clip = self._extractors.get(_CLIP, self._main)
        # What was given as --clip must read text; an extractor that does is used as well.
        self._clip = clip if isinstance(clip, ClipExtractor) and (clip.reads_text or clip is not self._main) else None
        self._checker = next((name for name, one in self._extractors.items() if isinstance(one, PapercutChecker)), None)
        self._size: tuple[int, int] | None = None
        self._reference: Reference | None = None
        self._texts: NDArray[np.float32] | None = None
        self._left_out: dict[str, str] = {}
        self._records: list[QualityRecord] = []

    def prepare(self, subjects: Sequence[QualitySubject]) -> None:
        """Look at what will be compared and read the reference, so that a fault in either costs no hours of drawing."""
        if not subjects:
            raise _nobody()
        for subject in subjects:
            self._check_size(subject)
        if self._processes.is_main:
            self._open_reference(subjects[0].size)

    def measure_all(self, subjects: Iterable[QualitySubject]) -> QualityResult | None:
        """The protocol and a record of each subject; None in all but the main process.

        ``subjects`` are taken one by one, so that they can be loaded one by one; all processes must get the same.
        """
        for subject in subjects:
            self._measure(subject)
        if not self._processes.is_main:
            return None
        if self._reference is None:
            raise _nobody()
        return QualityResult(self._protocol(self._reference), tuple(self._records))

    # --- inside ---

    def _measure(self, subject: QualitySubject) -> None:
        """Draw a subject's images and, in the main process, add its record."""
        if subject.key in {record.subject for record in self._records}:
            raise UsageError(f"{subject.key} is named twice", hint="name each subject once")
        self._check_size(subject)
        if self._processes.is_main and self._reference is None:
            self._open_reference(subject.size)
        drawings = [self._drawing(subject, repetition) for repetition in range(len(self._config.seeds))]
        share = sum(drawing.remaining(self._processes) for drawing in drawings)
        total = sum(map(len, drawings)) if self._processes.count == 1 else share
        done = total - share
        for drawing in drawings:
            for count in drawing.draw(self._processes):
                done += count
                self._emit(Progress("quality", done, total, subject.key))
        self._processes.wait()
        if self._processes.is_main:
            for drawing in drawings:
                drawing.write_index()
            features = [{name: drawing.features(name) for name in self._extractors} for drawing in drawings]
            self._add(subject.key, [self._figures(subject.key, one) for one in features], drawings)

    def _check_size(self, subject: QualitySubject) -> None:
        of_papercut = isinstance(self._main, PapercutChecker) or self._config.reference is None
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
            extractor=self._main,
            resizing=self._resizing,
            size=size,
            progress=lambda done, total: self._emit(Progress("reference", done, total)),
        )
        for text in (*self._plan.notes, *reference.notes):
            self._emit(Note(text))
        if self._clip is not None:
            self._texts = self._clip.texts(self._plan.prompts)
        if self._config.reference is None and self._plan.specs is not None:
            self._add(REFERENCE, [self._ceiling(number) for number in range(len(self._config.seeds))], [])

    def _drawing(self, subject: QualitySubject, repetition: int) -> Drawing:
        config = self._config
        keep = config.keep_images
        return Drawing(
            subject,
            self._plan.rows(repetition),
            self._extractors,
            resizing=self._resizing,
            batch=config.batch,
            cache=config.cache,
            keep=None if keep is None else keep / slug(subject.key) / str(config.seeds[repetition]),
        )

    # --- figures ---

    def _ceiling(self, repetition: int) -> dict[str, float]:
        """Renders of a plan's rows, from seeds of their own, measured as if a model had drawn them."""
        assert self._plan.specs is not None
        specs = [self._plan.specs[number] for number in self._plan.order]
        parts: dict[str, list[NDArray[np.float32]]] = {name: [] for name in self._extractors}
        for _, images in rendered_chunks(specs, CEILING_SEED + repetition * _SEEDS_A_REPETITION):
            for name, extractor in self._extractors.items():
                parts[name].append(extractor(self._resizing(images)))
        return self._figures(REFERENCE, {name: np.concatenate(part) for name, part in parts.items()})

    def _figures(self, key: str, features: Mapping[str, NDArray[np.float32]]) -> dict[str, float]:
        """Figures of one repetition from the features of its rows, by name of the extractor."""
        assert self._reference is not None
        count, specs = self._plan.images, self._plan.specs
        ours = features[_FEATURES]
        figures, left_out = compare_sets(FeatureSet(ours[:count], name=key), self._reference.features)
        self._left_out |= left_out
        places, groups = self._plan.diversity_groups()
        spread = diversity(ours[places], groups) if places else None
        if spread is not None:
            figures["diversity"] = spread
        figures["sharpness"] = float(features[_SHARPNESS][:count].mean())
        if self._texts is not None:
            figures["clip_score"] = clip_score(features.get(_CLIP, ours)[:count], self._texts)
        if specs is not None and self._checker is not None:
            following = prompt_following_of_features(features[self._checker][:count] * PapercutChecker.scale, specs)
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
        plan, main, clip = self._plan, self._main, self._clip
        against = _against_comparing(plan.images, reference, main)
        reasons = dict.fromkeys(self._left_out.values())
        named = {reason: [name for name, why in self._left_out.items() if why == reason] for reason in reasons}
        left_out = [f"{', '.join(names)} left out: {reason}" for reason, names in named.items()]
        return QualityProtocol(
            prompts=plan.source,
            prompts_sha256=plan.sha256,
            images=plan.images,
            seeds=plan.seeds,
            reference=reference.description,
            reference_images=reference.images,
            reference_sha256=reference.sha256,
            extractor=main.name,
            extractor_sha256=main.sha256,
            features=main.width,
            resize=f"images: {self._resizing.describe()}; for the extractor: {main.resize}",
            k=NEIGHBOURS,
            diversity=f"{plan.extra + 1} images of each of {len(plan.diverse)} prompts" if plan.extra else None,
            clip=None if clip is None else clip.name,
            clip_sha256=None if clip is None else clip.sha256,
            comparable=not against,
            notes=(*against, *left_out, *plan.notes, *reference.notes),
        )


def _nobody() -> UsageError:
    return UsageError("there is no subject whose quality could be measured", hint="name a trained model")


def quality_subjects(
    subjects: Iterable[Subject], *, size: tuple[int, int], latent_shape: tuple[int, int, int]
) -> list[QualitySubject]:
    """Those of a bench whose pictures are their own (teachers, students at each K, peers), cached by weights and way.

    Left out is what draws another one's pictures in another way (parity is its check), and what is not trained.
    """
    return [
        QualitySubject(
            key=subject.key,
            identity=subject.record.model_dump_json(include=_IDENTITY),
            size=size,
            latent_shape=latent_shape,
            generate=_pictures_of(subject),
        )
        for subject in subjects
        if subject.record.kind in ("teacher", "student", "peer")
        and subject.reference is None
        and not (subject.record.untrained and subject.record.kind == "student")
    ]


def _pictures_of(subject: Subject) -> Draw:
    return lambda prompts, noise: subject.run(prompts, noise).images


def _open_extractors(config: QualityConfig, plan: QualityPlan) -> dict[str, Extractor]:
    """What reads images, by the name under which its features are kept."""
    papercut = plan.specs is not None
    main = open_extractor(config.extractor, papercut=papercut)
    extractors: dict[str, Extractor] = {_FEATURES: main, _SHARPNESS: Sharpness()}
    if config.clip is not None:
        extractors[_CLIP] = ClipExtractor(config.clip)
    # Another extractor on papercut's own reference: the checker still reads what the captions ask for.
    if papercut and config.reference is None and not isinstance(main, PapercutChecker):
        extractors[_CHECKER] = PapercutChecker()
    return extractors


def _against_comparing(images: int, reference: Reference, extractor: Extractor) -> list[str]:
    """Why figures may not stand beside published ones."""
    against = []
    if images < COMPARABLE_IMAGES:
        against.append(f"{images} images, fewer than {COMPARABLE_IMAGES:,}: not comparable with published figures")
    if 0 < reference.images < COMPARABLE_IMAGES:
        against.append(f"{reference.images} references, fewer than {COMPARABLE_IMAGES:,}: the same")
    if isinstance(extractor, PapercutChecker):
        against.append("papercut's own features and scenes: figures compare among models of papercut alone")
    return against
