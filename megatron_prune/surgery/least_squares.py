"""Ridge regression from second moments, in float64.

``argmin_W  sum of w·||t - W x||² + λ·||W - W₀||²`` has the solution ``W = (T + λ W₀)(A + λ I)⁻¹`` with ``A = Σ w·x xᵀ``,
``T = Σ w·t xᵀ`` (Hoerl & Kennard 1970, shrunk towards W₀ instead of 0). λ is a share of the mean of A's diagonal, so that
it means the same at every scale and every number of tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor


def ridge(moment: Tensor, target: Tensor, start: Tensor, strength: float) -> Tensor:
    """The matrix that maps x to t best.

    Args:
        moment: A, float64 [in, in].
        target: T, float64 [out, in].
        start: W₀ [out, in].
        strength: λ as a share of A's mean diagonal.

    Returns:
        float64 [out, in].
    """
    start = start.to(moment)
    scale = moment.diagonal().mean().clamp(min=torch.finfo(moment.dtype).tiny)
    damped = moment.clone()
    damped.diagonal().add_(strength * scale)
    factor, broken = torch.linalg.cholesky_ex(damped)
    rest = target - start @ moment
    if broken.item():  # rank-deficient within rounding: features that are always zero, fewer tokens than features
        return start + rest @ torch.linalg.pinv(damped, hermitian=True)
    return start + torch.cholesky_solve(rest.T, factor).T


GRID = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
"""Strengths that :func:`fitted` tries."""


def fitted(folds: list[tuple[Tensor, Tensor]], start: Tensor, strength: float | None = None) -> tuple[Tensor, float]:
    """Ridge over all folds, with the strength that predicts each fold best from the others where none is given.

    Args:
        folds: A and T of each, as for :func:`ridge`.
        strength: as for :func:`ridge`; ``None`` goes downhill on :data:`GRID` from 1.

    Returns:
        W, float64 [out, in], and the strength.
    """
    moment, target = (sum(parts) for parts in zip(*folds))
    if strength is None:
        errors: dict[int, float] = {}

        def error(place: int) -> float:
            if not 0 <= place < len(GRID):
                return torch.inf
            if place not in errors:
                errors[place] = sum(_error(moment, target, fold, start, GRID[place]) for fold in folds)
            return errors[place]

        place = GRID.index(1.0)
        step = -1 if error(place - 1) < error(place) else 1
        while error(place + step) < error(place):
            place += step
        strength = GRID[place]
    return ridge(moment, target, start, strength), strength


def _error(moment: Tensor, target: Tensor, fold: tuple[Tensor, Tensor], start: Tensor, strength: float) -> float:
    """Squared error on a fold, but for a constant, of what is fitted to all others."""
    held, wanted = fold
    weight = ridge(moment - held, target - wanted, start, strength)
    return ((weight @ held - 2.0 * wanted) * weight).sum().item()


def scale(folds: list[tuple[Tensor, Tensor]], matrix: Tensor) -> float:
    """The number c for which ``c · matrix`` maps x to t best over all folds."""
    moment, target = (sum(parts) for parts in zip(*folds))
    energy = ((matrix @ moment) * matrix).sum()
    return ((target * matrix).sum() / energy).item() if energy > 0 else 1.0
