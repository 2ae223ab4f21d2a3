"""Claims about the distances between sets; oracles are the authors' prdc, closed forms, and loops over pairs."""

from __future__ import annotations

import contextlib
import io
import itertools
import tracemalloc

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm

from tiue_cli.bench.quality import metrics
from tiue_cli.bench.quality.metrics import FeatureSet, Moments
from tiue_cli.errors import QualityError

# A machine with a GPU may lack them, and its tests must be collected all the same.
pytest.importorskip("torchmetrics")
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import poly_mmd

compute_prdc = pytest.importorskip("prdc", reason="prdc is not installed (pip install tiue[dev])").compute_prdc


def normal(count: int, width: int, *, seed: int, shift: float = 0.0, scale: float = 1.0) -> np.ndarray:
    values = np.random.Generator(np.random.Philox(key=seed)).standard_normal((count, width))
    return (shift + scale * values).astype(np.float32)


def as_set(features: np.ndarray, name: str = "set") -> FeatureSet:
    return FeatureSet(features, name=name)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks even for small sets, and a last one that is not full."""
    monkeypatch.setattr(metrics, "BLOCK", 37)


# --- Fréchet distance ----------------------------------------------------------------------------------------------


def test_moments_equal_numpys_even_far_from_zero() -> None:
    features = normal(200, 7, seed=1, shift=1e4)
    moments = Moments.of(features)
    np.testing.assert_allclose(moments.mean, features.astype(np.float64).mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(moments.covariance, np.cov(features.astype(np.float64).T), rtol=1e-9)


def cross(mean: np.ndarray, deviation: np.ndarray) -> np.ndarray:
    """Points of exactly this mean and these deviations along the axes: two an axis, on either side."""
    width = len(mean)
    reach = deviation * np.sqrt((2 * width - 1) / 2)
    return (mean + np.concatenate([np.diag(reach), -np.diag(reach)])).astype(np.float32)


@pytest.mark.parametrize("count", [100, None])
def test_frechet_distance_equals_the_closed_form_of_axis_aligned_gaussians(count: int | None) -> None:
    """Σ_i (μ_i - ν_i)² + (σ_i - τ_i)², also where one axis is flat in both, and where N is not known."""
    mean, other = np.array([1.0, -2.0, 512.0]), np.array([0.5, 1.0, 512.0])
    deviation, wider = np.array([1.0, 0.3, 0.0]), np.array([2.0, 0.1, 0.0])
    found = metrics.frechet_distance(as_set(cross(mean, deviation)), Moments(count, other, np.diag(wider**2)))
    assert found == pytest.approx(((mean - other) ** 2).sum() + ((deviation - wider) ** 2).sum(), rel=1e-6)


def test_frechet_distance_equals_scipys_matrix_root() -> None:
    mixing = normal(12, 12, seed=2)
    first, second = normal(400, 12, seed=3) @ mixing, 0.7 * normal(300, 12, seed=4, shift=0.2) @ mixing.T
    a, b = np.cov(first.T.astype(np.float64)), np.cov(second.T.astype(np.float64))
    gap = first.mean(axis=0, dtype=np.float64) - second.mean(axis=0, dtype=np.float64)
    expected = gap @ gap + np.trace(a + b - 2 * sqrtm(a @ b).real)
    assert metrics.frechet_distance(as_set(first), Moments.of(second)) == pytest.approx(expected, rel=1e-8)


def test_distances_are_those_of_torchmetrics() -> None:
    """Which earlier reports were measured with."""
    first, second = normal(90, 6, seed=15), normal(90, 6, seed=16, shift=0.3, scale=1.4)
    fid = FrechetInceptionDistance(Given(6)).set_dtype(torch.float64)
    for features, real in ((first, False), (second, True)):
        fid.update(torch.from_numpy(features.astype(np.float64)), real=real)
    found, _ = metrics.compare_sets(as_set(first), as_set(second))
    assert found["fid"] == pytest.approx(float(fid.compute()), rel=1e-9)
    sides = (torch.from_numpy(features.astype(np.float64)) for features in (second, first))
    assert found["kid"] == pytest.approx(float(poly_mmd(*sides)), rel=1e-9)


class Given(torch.nn.Identity):
    """An extractor for torchmetrics whose input is features already."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features


def test_frechet_distance_of_a_set_to_itself_is_zero_also_with_dead_features() -> None:
    features = normal(100, 6, seed=5, shift=30)
    features[:, 2:4] = 0
    assert metrics.frechet_distance(as_set(features), Moments.of(features)) == pytest.approx(0, abs=1e-6)


def test_frechet_distance_far_from_zero_is_that_of_the_moved_sets() -> None:
    first, second = normal(100, 6, seed=5), normal(100, 6, seed=6, shift=0.3)
    # A power of two and few digits: moving rounds nothing.
    first, second = np.round(first * 64) / 64, np.round(second * 64) / 64
    near = metrics.frechet_distance(as_set(first), Moments.of(second))
    assert metrics.frechet_distance(as_set(first + 8192), Moments.of(second + 8192)) == pytest.approx(near, rel=1e-9)


@pytest.mark.parametrize("few_is", ["images", "reference"])
def test_frechet_distance_of_fewer_images_than_features_is_refused_with_the_number(few_is: str) -> None:
    few, many = normal(8, 8, seed=1), normal(90, 8, seed=2)
    images, reference = (few, many) if few_is == "images" else (many, few)
    with pytest.raises(QualityError, match=r"8 images are too few .* 8 features") as raised:
        metrics.frechet_distance(as_set(images), Moments.of(reference))
    assert "9 images or more" in (raised.value.hint or "")


# --- kernel distance -----------------------------------------------------------------------------------------------


def loop_mmd(x: np.ndarray, y: np.ndarray) -> float:
    """The unbiased estimator written out over pairs."""
    width = x.shape[1]

    def kernel(a: np.ndarray, b: np.ndarray) -> float:
        return float((a.astype(np.float64) @ b.astype(np.float64) / width + 1) ** 3)

    same = [np.mean([kernel(a, b) for a, b in itertools.permutations(side, 2)]) for side in (x, y)]
    return float(sum(same) - 2 * np.mean([kernel(a, b) for a in x for b in y]))


def test_kernel_distance_of_whole_sets_equals_the_unbiased_estimator() -> None:
    x, y = normal(20, 5, seed=6), normal(20, 5, seed=7, shift=0.4)
    assert metrics.kernel_distance(as_set(x), as_set(y)) == pytest.approx(loop_mmd(x, y), rel=1e-10)


def test_kernel_distance_over_subsets_is_near_the_whole_and_the_same_every_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(metrics, "KID_SUBSET_SIZE", 30)
    x, y = normal(60, 5, seed=6), normal(60, 5, seed=7, shift=0.6)
    found = metrics.kernel_distance(as_set(x), as_set(y))
    assert found == metrics.kernel_distance(as_set(x), as_set(y))
    assert found == pytest.approx(loop_mmd(x, y), rel=0.1)


# --- precision, recall, density, coverage --------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 5])
@pytest.mark.parametrize(("shift", "scale"), [(0.0, 1.0), (0.3, 0.6), (0.0, 2.0), (5.0, 1.0)])
def test_manifold_metrics_equal_the_authors_prdc(k: int, shift: float, scale: float) -> None:
    real, fake = normal(150, 6, seed=8, shift=100), normal(120, 6, seed=9, shift=100 + shift, scale=scale)
    found = metrics.precision_recall_density_coverage(as_set(fake), as_set(real), k=k)
    with contextlib.redirect_stdout(io.StringIO()):
        expected = compute_prdc(
            real_features=real.astype(np.float64), fake_features=fake.astype(np.float64), nearest_k=k
        )
    assert found == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("far", [0.0, 1e6], ids=["ordinary images", "an outlier"])
def test_the_order_of_the_images_does_not_matter(far: float) -> None:
    """Also with one image far from all others, at whichever place: 1e6 deviations, as a broken extractor may give."""
    real, fake = normal(120, 6, seed=17), normal(110, 6, seed=18)
    real[0] += far
    first = metrics.precision_recall_density_coverage(as_set(fake), as_set(real))
    distance = metrics.frechet_distance(as_set(fake), Moments.of(real))
    for seed in range(3):
        random = np.random.default_rng(seed)
        ours, theirs = as_set(random.permutation(fake)), as_set(random.permutation(real))
        assert metrics.precision_recall_density_coverage(ours, theirs) == first
        assert metrics.frechet_distance(ours, theirs.moments) == pytest.approx(distance, rel=1e-6)
    with contextlib.redirect_stdout(io.StringIO()):
        expected = compute_prdc(
            real_features=real.astype(np.float64), fake_features=fake.astype(np.float64), nearest_k=metrics.NEIGHBOURS
        )
    assert first == pytest.approx(expected, abs=1e-12)
    assert first["recall"] > 0.8


def test_manifold_metrics_do_not_depend_on_the_block(monkeypatch: pytest.MonkeyPatch) -> None:
    real, fake = as_set(normal(100, 4, seed=10)), as_set(normal(90, 4, seed=11, scale=0.8))
    small = metrics.precision_recall_density_coverage(fake, real)
    monkeypatch.setattr(metrics, "BLOCK", 1000)
    whole = metrics.precision_recall_density_coverage(as_set(fake.features), as_set(real.features))
    assert small == whole


def test_one_good_picture_repeated_is_precise_and_recalls_nothing() -> None:
    real = normal(100, 4, seed=12)
    found = metrics.precision_recall_density_coverage(as_set(np.repeat(real[:1] + 0.01, 50, axis=0)), as_set(real))
    assert found["precision"] == 1 and found["recall"] == 0 and 0 < found["coverage"] < 0.2


def test_references_that_are_copies_are_refused_and_a_few_copies_are_not() -> None:
    real, fake = normal(60, 4, seed=13, shift=50), as_set(normal(60, 4, seed=14, shift=50))
    real[:7] = real[0]
    metrics.precision_recall_density_coverage(fake, as_set(real))
    real[:30] = real[0]
    with pytest.raises(QualityError, match="30 of 60 images have 5 others"):
        metrics.precision_recall_density_coverage(fake, as_set(real))


def test_no_more_images_than_neighbours_are_refused() -> None:
    with pytest.raises(QualityError, match="5 images") as raised:
        metrics.precision_recall_density_coverage(as_set(normal(5, 3, seed=1)), as_set(normal(50, 3, seed=2)))
    assert "6 images" in (raised.value.hint or "")


def test_memory_does_not_grow_with_the_square_of_the_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "BLOCK", 64)
    real, fake = as_set(normal(3000, 4, seed=1)), as_set(normal(3000, 4, seed=2))
    tracemalloc.start()
    metrics.precision_recall_density_coverage(fake, real)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes < 2 * 2**20 < 3000**2 * 8 / 30


# --- diversity, CLIP score -----------------------------------------------------------------------------------------


def test_diversity_is_the_mean_over_prompts_of_the_mean_distance_of_pairs() -> None:
    features = np.array([[0, 0], [3, 4], [1, 1], [1, 1], [1, 3], [9, 9]], np.float32)
    groups = ["a", "a", "b", "b", "b", "alone"]
    assert metrics.diversity(features, groups) == pytest.approx((5 + (0 + 2 + 2) / 3) / 2)
    assert metrics.diversity(features, range(6)) is None


def test_clip_score_is_a_hundred_times_the_mean_cosine_and_never_below_zero() -> None:
    images = np.array([[2, 0], [0, 3]], np.float32)
    assert metrics.clip_score(images, np.array([[1, 0], [1, 1]], np.float32)) == pytest.approx(50 * (1 + 0.5**0.5))
    assert metrics.clip_score(images, -images) == 0
    with pytest.raises(QualityError, match="zero or not finite"):
        metrics.clip_score(images, np.zeros((2, 2), np.float32))


# --- what cannot be measured ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_features_that_are_not_finite_name_the_set_and_the_image(value: float) -> None:
    features = normal(90, 3, seed=1)
    features[71, 1] = value
    with pytest.raises(QualityError, match="student: the features of image 71"):
        as_set(features, "student")


@pytest.mark.parametrize("shape", [(1, 3), (0, 3), (4, 0), (4,)])
def test_what_is_no_set_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(QualityError):
        as_set(np.ones(shape, np.float32))


def test_all_metrics_come_when_the_images_allow_them() -> None:
    figures, left_out = metrics.compare_sets(as_set(normal(40, 4, seed=1)), as_set(normal(50, 4, seed=2)))
    assert set(figures) == {"fid", "kid", "precision", "recall", "density", "coverage"} and left_out == {}
    assert all(np.isfinite(value) for value in figures.values())


def test_what_few_images_do_not_allow_is_left_out_with_the_reason() -> None:
    figures, left_out = metrics.compare_sets(as_set(normal(9, 9, seed=1)), as_set(normal(50, 9, seed=2)))
    assert "fid" not in figures and "10 or more" in left_out["fid"] and "recall" in figures
    figures, left_out = metrics.compare_sets(as_set(normal(5, 9, seed=1)), as_set(normal(50, 9, seed=2)))
    assert set(figures) == {"kid"} and "6 or more" in left_out["recall"]


def test_statistics_without_features_give_the_frechet_distance_alone() -> None:
    images, reference = as_set(normal(40, 4, seed=1)), normal(50, 4, seed=2)
    figures, left_out = metrics.compare_sets(images, Moments.of(reference))
    assert figures == {"fid": metrics.compare_sets(images, as_set(reference))[0]["fid"]}
    assert set(left_out) == {"kid", "precision", "recall", "density", "coverage"}


def test_constant_references_are_refused_and_constant_images_are_measured() -> None:
    grey, varied = np.ones((60, 4), np.float32), normal(60, 4, seed=1)
    with pytest.raises(QualityError, match="look the same"):
        metrics.compare_sets(as_set(varied), as_set(grey))
    with pytest.raises(QualityError, match="look the same"):
        metrics.compare_sets(as_set(varied), Moments(60, np.ones(4), np.zeros((4, 4))))
    figures, _ = metrics.compare_sets(as_set(grey), as_set(varied))
    assert figures["recall"] == 0 and all(np.isfinite(value) for value in figures.values())


def test_sets_of_different_width_are_refused() -> None:
    narrow, wide = as_set(normal(40, 4, seed=1)), as_set(normal(40, 5, seed=1))
    for function in (metrics.kernel_distance, metrics.precision_recall_density_coverage, metrics.compare_sets):
        with pytest.raises(QualityError, match="features"):
            function(narrow, wide)
