"""The Fréchet distance of two Gaussians; NumPy only."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def gaussian_distance(
    mean: NDArray[np.float64],
    covariance: NDArray[np.float64],
    other_mean: NDArray[np.float64],
    other_covariance: NDArray[np.float64],
) -> float:
    """|μ₁ - μ₂|² + tr(Σ₁ + Σ₂ - 2 (Σ₁Σ₂)^½) of means (F,) and covariances (F, F); Heusel et al. 2017, eq. 6."""
    gap = mean - other_mean
    # Equal sets come out at ±1e-10.
    return max(0.0, float(gap @ gap + _covariance_distance(covariance, other_covariance)))


def _covariance_distance(ours: NDArray[np.float64], theirs: NDArray[np.float64]) -> float:
    """tr(Σ₁ + Σ₂ - 2 (Σ₁Σ₂)^½)."""
    # Σ₁^½ Σ₂ Σ₁^½ has the eigenvalues of Σ₁Σ₂ and is symmetric: features that never change (a Σ of lower rank) do no
    # harm, where the root of the product itself (scipy.linalg.sqrtm, as in EDM2) loses half of its digits.
    values, vectors = np.linalg.eigh(ours)
    root = vectors * np.sqrt(values.clip(0)) @ vectors.T
    shared = np.sqrt(np.linalg.eigvalsh(root @ theirs @ root).clip(0)).sum()
    return float(np.trace(ours) + np.trace(theirs) - 2 * shared)
