"""The starting noise: a function of the seed and the shape, and of nothing else."""

from __future__ import annotations

import numpy as np
import pytest

from tiue_cli.errors import OutOfMemoryError, UsageError
from tiue_cli.model.noise import MAX_SEED, draw_noise

SHAPE = (4, 8, 6)


def test_seed_zero_is_a_seed() -> None:
    zero_and_one = draw_noise([0, 1], SHAPE)
    assert np.array_equal(zero_and_one[:1], draw_noise([0], SHAPE))
    assert not np.array_equal(zero_and_one[0], zero_and_one[1])


def test_noise_is_the_same_wherever_the_image_lies_in_a_batch() -> None:
    together = draw_noise([7, 8, 9, 10], SHAPE)
    assert np.array_equal(together[2], draw_noise([9], SHAPE)[0])
    assert np.array_equal(draw_noise([10, 7], SHAPE), together[[3, 0]])


def test_noise_is_standard_normal_and_independent_between_neighbouring_seeds() -> None:
    noise = draw_noise(range(64), (4, 32, 32)).reshape(64, -1).astype(np.float64)
    count = noise.size
    # Five standard errors of each estimate: mean, variance, fourth moment, and the correlation of neighbours.
    assert abs(noise.mean()) < 5 / np.sqrt(count)
    assert abs(noise.var() - 1) < 5 * np.sqrt(2 / count)
    assert abs((noise**4).mean() - 3) < 5 * np.sqrt(96 / count)
    neighbours = (noise[1:] * noise[:-1]).mean(axis=1)
    assert np.abs(neighbours).max() < 5 / np.sqrt(noise.shape[1])


@pytest.mark.parametrize("side", [2**20, 2**40])
def test_noise_that_no_memory_holds_is_said(side: int) -> None:
    with pytest.raises(OutOfMemoryError, match="noise of 4 images"):
        draw_noise([0, 1, 2, 3], (4, side, side))


def test_noise_does_not_change_between_versions() -> None:
    # Frozen: a record's seed must mean the same picture tomorrow.
    expected = [
        [0.05991104, 0.01555963, -1.16443849, -0.13264713],
        [1.09168911, 0.45582670, 0.70178974, 0.28494337],
        [0.95186639, -1.01478279, 1.19808888, -0.21736814],
    ]
    assert np.allclose(draw_noise([0, 1, MAX_SEED], (1, 1, 4)).reshape(3, 4), expected, rtol=0, atol=1e-6)


def test_noise_leaves_the_global_generator_alone() -> None:
    np.random.seed(3)  # noqa: NPY002 - the legacy generator is what must not be touched
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    draw_noise([0], SHAPE)
    assert np.array_equal(before, np.random.get_state()[1])  # noqa: NPY002


def test_key_is_the_seed_itself() -> None:
    # An implementation of our own of Philox4x64-10 (Salmon et al. 2011, section 3.3) gives the generator's raw stream.
    for seed in (0, 1, MAX_SEED):
        raw = np.random.Philox(key=seed).random_raw(4)
        assert [int(word) for word in raw] == philox4x64(counter=[1, 0, 0, 0], key=[seed, 0])


@pytest.mark.parametrize("seed", [-1, MAX_SEED + 1])
def test_seed_out_of_range_is_refused(seed: int) -> None:
    with pytest.raises(UsageError, match="out of range"):
        draw_noise([seed], SHAPE)


def philox4x64(*, counter: list[int], key: list[int]) -> list[int]:
    mask = 2**64 - 1
    x, k = list(counter), list(key)
    for _ in range(10):
        first, second = 0xD2E7470EE14C6C93 * x[0], 0xCA5A826395121157 * x[2]
        x = [(second >> 64) ^ x[1] ^ k[0], second & mask, (first >> 64) ^ x[3] ^ k[1], first & mask]
        k = [(k[0] + 0x9E3779B97F4A7C15) & mask, (k[1] + 0xBB67AE8584CAA73B) & mask]
    return x
