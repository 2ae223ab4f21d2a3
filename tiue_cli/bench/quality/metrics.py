"""Distances between sets of images by their features: Fréchet, kernel, precision, recall, density, coverage, diversity.

Features are float32 (N, F), one row an image (``bench.quality.features``). Sums run in float64 over blocks of rows, so
memory is the features' plus a constant. The order of the rows does not matter, but for which of them the kernel
distance draws into its subsets.

A figure that the images do not allow is refused (``frechet_distance`` on fewer images than features), never guessed.
"""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Self

import numpy as np
from numpy.typing import NDArray

from tiue_cli.base.moments import gaussian_distance
from tiue_cli.errors import QualityError

Features = NDArray[np.float32]

NEIGHBOURS = 5
"""k of precision, recall, density and coverage (Naeem et al. 2020)."""
BLOCK = 1024
KID_SUBSETS, KID_SUBSET_SIZE = 100, 1000
"""Bińkowski et al. 2018; a smaller set of images gives smaller subsets."""


# --- sets ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Moments:
    """Mean (F,) and unbiased covariance (F, F), float64, of ``count`` images; None where a file does not say."""

    count: int | None
    mean: NDArray[np.float64]
    covariance: NDArray[np.float64]
    name: str = "the reference statistics"

    @property
    def width(self) -> int:
        """Features an image, F."""
        return len(self.mean)

    @property
    def is_constant(self) -> bool:
        """Whether all images have the same features."""
        return not self.covariance.any()

    @classmethod
    def of(cls, features: Features) -> Self:
        """Of two rows or more, in two passes: the mean first, because squares of uncentred features cancel badly."""
        mean = sum(block.sum(axis=0) for block in _blocks(features)) / len(features)
        products = sum((block - mean).T @ (block - mean) for block in _blocks(features))
        return cls(len(features), np.asarray(mean), np.asarray(products / (len(features) - 1)))


class FeatureSet:
    """Features of one set of images, checked; what several comparisons need of them is computed once.

    ``name`` says in errors whose images they are. Raises QualityError where features are not finite, or too few.
    """

    def __init__(self, features: Features, *, name: str) -> None:
        self.features = np.ascontiguousarray(features, dtype=np.float32)
        self.name = name
        self._radii: dict[int, NDArray[np.float64]] = {}
        _check(self.features, name)

    def __len__(self) -> int:
        return len(self.features)

    @property
    def width(self) -> int:
        """Features an image, F."""
        return int(self.features.shape[1])

    @cached_property
    def moments(self) -> Moments:
        """Mean and covariance."""
        return Moments.of(self.features)

    @cached_property
    def center(self) -> NDArray[np.float64]:
        """Median (F,) of each feature: a few images far from all others do not move it."""
        # Some columns at a time: numpy.median works on a copy of what it is given.
        columns = range(0, self.features.shape[1], 64)
        return np.concatenate([np.median(self.features[:, i : i + 64], axis=0) for i in columns]).astype(np.float64)

    @cached_property
    def is_constant(self) -> bool:
        """Whether all images have the same features, up to an extractor's rounding: grey, empty or copies of one."""
        tolerance = 1e-5 * np.abs(self.center).max()
        return all(bool((np.abs(block - self.center) <= tolerance).all()) for block in _blocks(self.features))

    def radii(self, k: int = NEIGHBOURS) -> NDArray[np.float64]:
        """Distance (N,) of each image to its k-th nearest other image of the set. Raises QualityError for N ≤ k."""
        if len(self) <= k:
            raise QualityError(
                f"{self.name}: {len(self)} images, and each needs {k} neighbours", hint=f"take {k + 1} images or more"
            )
        if k not in self._radii:
            self._radii[k] = _neighbour_distances(self, k)
        return self._radii[k]


def _check(features: Features, name: str) -> None:
    if features.ndim != 2 or features.shape[1] == 0:
        raise QualityError(f"{name}: features of shape {features.shape}, not (N, F)", hint="check the extractor")
    if len(features) < 2:
        raise QualityError(
            f"{name}: a distance needs at least 2 images, and there {'is 1' if len(features) else 'are none'}",
            hint="take more images",
        )
    for start, block in zip(itertools.count(0, BLOCK), _blocks(features), strict=False):
        bad = np.flatnonzero(~np.isfinite(block).all(axis=1))
        if len(bad):
            raise QualityError(
                f"{name}: the features of image {start + int(bad[0])} are not finite numbers",
                hint="look at that image; half precision may have overflowed in the model or the extractor",
            )


# --- metrics -------------------------------------------------------------------------------------------------------


def frechet_distance(images: FeatureSet, reference: Moments) -> float:
    """Squared Fréchet distance of two Gaussians, |μ₁ - μ₂|² + tr(Σ₁ + Σ₂ - 2 (Σ₁Σ₂)^½); Heusel et al. 2017, eq. 6.

    It is biased upwards for few images, so figures of different N do not compare. Raises QualityError where a set has
    no more images than features: its covariance is singular then, and the figure says more about N than the images.
    """
    width = reference.width
    _check_widths(images, reference)
    for name, count in ((images.name, len(images)), ("the reference", reference.count)):
        if count is not None and count <= width:
            raise QualityError(
                f"{name}: {count} images are too few for the Fréchet distance of {width} features",
                hint=f"take {width + 1} images or more",
            )
    ours = images.moments
    return gaussian_distance(ours.mean, ours.covariance, reference.mean, reference.covariance)


def kernel_distance(images: FeatureSet, reference: FeatureSet, *, seed: int = 0) -> float:
    """KID: unbiased squared MMD under (xᵀy/F + 1)³, mean over subsets; Bińkowski et al. 2018, eq. 4 and section 3.

    100 random subsets of 1,000 images a side, or of the smaller set's number; one, where that is both sets whole. It
    can come out slightly below zero, as an unbiased estimate of zero must.
    """
    _check_widths(images, reference)
    size = min(KID_SUBSET_SIZE, len(images), len(reference))
    subsets = 1 if size == len(images) == len(reference) else KID_SUBSETS
    random = np.random.Generator(np.random.Philox(key=seed))
    estimates = []
    for _ in range(subsets):
        ours, theirs = (_subset(side.features, size, random) for side in (images, reference))
        estimates.append(_unbiased_mmd(ours, theirs))
    return float(np.mean(estimates))


def _subset(features: Features, size: int, random: np.random.Generator) -> NDArray[np.float64]:
    return features[np.sort(random.choice(len(features), size, replace=False))].astype(np.float64)


def _unbiased_mmd(x: NDArray[np.float64], y: NDArray[np.float64]) -> float:
    """Eq. 4 for two sets of one size: means over pairs, those of an image with itself left out within a set."""
    count, width = x.shape
    within = sum(kernel.sum() - np.trace(kernel) for kernel in ((a @ a.T / width + 1) ** 3 for a in (x, y)))
    return float(within / (count * (count - 1)) - 2 * ((x @ y.T / width + 1) ** 3).mean())


def precision_recall_density_coverage(
    images: FeatureSet, reference: FeatureSet, *, k: int = NEIGHBOURS
) -> dict[str, float]:
    """How far two sets of features cover each other, by balls to the k-th neighbour within a set.

    precision, recall: share of images inside a reference's ball, and the reverse (Kynkäänniemi et al. 2019, eq. 1, 2).
    density: balls of references over each image, / k; coverage: share of references whose ball holds an image (Naeem
    et al. 2020, eq. 3 to 5). Inside is strictly nearer than the radius, as in the authors' ``prdc``. Raises
    QualityError where a set has no more than k images, or most of the reference's images are copies of each other.
    """
    _check_widths(images, reference)
    real_radii, fake_radii = reference.radii(k), images.radii(k)
    copies = int((real_radii == 0).sum())
    if 2 * copies >= len(reference):
        raise QualityError(
            f"{reference.name}: {copies} of {len(reference)} images have {k} others with the same features",
            hint="give references that are different pictures",
        )
    balls_over = np.zeros(len(images), np.int64)  # references whose ball holds the image
    recalled = np.zeros(len(reference), bool)
    nearest = np.full(len(reference), np.inf)
    for rows, columns, distances in _distance_blocks(reference, images):
        balls_over[columns] += (distances < real_radii[rows, None]).sum(axis=0)
        recalled[rows] |= (distances < fake_radii[None, columns]).any(axis=1)
        nearest[rows] = np.minimum(nearest[rows], distances.min(axis=1))
    return {
        "precision": float((balls_over > 0).mean()),
        "recall": float(recalled.mean()),
        "density": float(balls_over.mean() / k),
        "coverage": float((nearest < real_radii).mean()),
    }


def diversity(features: Features, groups: Sequence[Hashable]) -> float | None:
    """How different images of one prompt are: mean over prompts of the mean distance between two of its images.

    D = (1/P) Σ_p 2 / (M_p (M_p - 1)) Σ_{i<j} |f_pi - f_pj|₂ over prompts with M_p ≥ 2 images; ``groups`` names each
    row's prompt. Zero: one picture a prompt. None where no prompt has two images.
    """
    members: dict[Hashable, list[int]] = {}
    for row, group in enumerate(groups):
        members.setdefault(group, []).append(row)
    means = [_mean_distance(features[rows]) for rows in members.values() if len(rows) > 1]
    return float(np.mean(means)) if means else None


def _mean_distance(features: Features) -> float:
    total = 0.0
    for row in range(len(features) - 1):
        total += float(np.linalg.norm(features[row + 1 :].astype(np.float64) - features[row], axis=1).sum())
    return total / (len(features) * (len(features) - 1) / 2)


def clip_score(images: Features, texts: Features) -> float:
    """100 · max(mean cosine of image and prompt, 0), embeddings (N, F) of a CLIP model; Hessel et al. 2021.

    The mean before the maximum, and the factor 100, as in torchmetrics and most tables. Raises QualityError for
    embeddings that are zero or not finite.
    """
    if images.shape != texts.shape:
        raise QualityError(f"{images.shape} image and {texts.shape} text embeddings", hint="one prompt an image")
    left, right = images.astype(np.float64), texts.astype(np.float64)
    lengths = np.linalg.norm(left, axis=1) * np.linalg.norm(right, axis=1)
    if not np.isfinite(lengths).all() or (lengths == 0).any():
        raise QualityError("a CLIP embedding is zero or not finite", hint="check the CLIP model's weights")
    return 100 * max(0.0, float(((left * right).sum(axis=1) / lengths).mean()))


def compare_sets(
    images: FeatureSet, reference: FeatureSet | Moments, *, k: int = NEIGHBOURS
) -> tuple[dict[str, float], dict[str, str]]:
    """All set metrics that N allows, and why each of the others is left out.

    fid needs more images than features in both sets; kid, precision, recall, density and coverage need the reference's
    features, not its moments alone. Raises QualityError where the reference cannot be a reference (constant images),
    and what the metrics raise.
    """
    if reference.is_constant:
        raise QualityError(
            f"{reference.name}: all images look the same to the extractor (grey, empty, or copies of one)",
            hint="give references that are different pictures",
        )
    moments = reference if isinstance(reference, Moments) else reference.moments
    figures: dict[str, float] = {}
    left_out: dict[str, str] = {}
    fewest = len(images) if moments.count is None else min(len(images), moments.count)
    if fewest > images.width:
        figures["fid"] = frechet_distance(images, moments)
    else:
        left_out["fid"] = f"{fewest} images, and {images.width} features need {images.width + 1} or more"
    if isinstance(reference, Moments):
        left_out |= dict.fromkeys(_OF_FEATURES, "the reference is a mean and a covariance, without features")
        return figures, left_out
    figures["kid"] = kernel_distance(images, reference)
    if fewest > k:
        figures |= precision_recall_density_coverage(images, reference, k=k)
    else:
        left_out |= dict.fromkeys(_OF_FEATURES[1:], f"{fewest} images, and {k} neighbours need {k + 1} or more")
    return figures, left_out


_OF_FEATURES = ("kid", "precision", "recall", "density", "coverage")


def mean_figures(repetitions: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Mean of each figure that every repetition has."""
    names = [name for name in repetitions[0] if all(name in figures for figures in repetitions)]
    return {name: float(np.mean([figures[name] for figures in repetitions])) for name in names}


def _check_widths(images: FeatureSet, reference: FeatureSet | Moments) -> None:
    if images.width != reference.width:
        raise QualityError(
            f"{images.name} has {images.width} features an image and the reference {reference.width}",
            hint="take both from the same extractor",
        )


# --- blocks --------------------------------------------------------------------------------------------------------


def _blocks(features: Features) -> Iterator[NDArray[np.float64]]:
    for start in range(0, len(features), BLOCK):
        yield features[start : start + BLOCK].astype(np.float64)


def _distance_blocks(left: FeatureSet, right: FeatureSet) -> Iterator[tuple[slice, slice, NDArray[np.float64]]]:
    """(rows, columns, Euclidean distances) for each pair of blocks; rows that differ by rounding alone are at 0."""
    # Moved to a common centre: |x|² + |y|² - 2xᵀy loses what the two have in common. The median, as a centre far off
    # (an image unlike all others) would make every length large, and near images copies of each other.
    for top, block in zip(itertools.count(0, BLOCK), _blocks(left.features), strict=False):
        rows, block = slice(top, top + len(block)), block - left.center
        for first, others in zip(itertools.count(0, BLOCK), _blocks(right.features), strict=False):
            others = others - left.center
            lengths = (block**2).sum(axis=1)[:, None] + (others**2).sum(axis=1)[None]
            squares = lengths - 2 * block @ others.T
            # Rounding, an extractor's most of all (by 3e-6 of the length), leaves copies apart.
            squares[squares <= 1e-11 * lengths] = 0
            yield rows, slice(first, first + len(others)), np.sqrt(squares)


def _neighbour_distances(images: FeatureSet, k: int) -> NDArray[np.float64]:
    """Distance (N,) to the k-th nearest other row."""
    radii = np.empty(len(images))
    nearest = np.empty((0, 0))
    for rows, columns, distances in _distance_blocks(images, images):
        if columns.start == 0:
            nearest = np.full((len(distances), k), np.inf)
        if columns == rows:
            np.fill_diagonal(distances, np.inf)
        nearest = np.partition(np.concatenate([nearest, distances], axis=1), k - 1, axis=1)[:, :k]
        radii[rows] = nearest.max(axis=1)
    return radii
