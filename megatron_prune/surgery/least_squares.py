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

    Beside what is given it takes one matrix of A's size, its Cholesky factor, and two of W's.

    Args:
        moment: A, float64 [in, in].
        target: T, float64 [out, in].
        start: W₀ [out, in].
        strength: λ as a share of A's mean diagonal.

    Returns:
        float64 [out, in], where A is.
    """
    start, target = start.to(moment), target.to(moment)
    damping = strength * moment.diagonal().mean().clamp(min=torch.finfo(moment.dtype).tiny)
    rest = (start @ moment).neg_().add_(target)
    factor, broken = _factor(moment, damping)
    if broken:  # rank-deficient within rounding: features that are always zero, fewer tokens than features
        del factor
        return rest @ torch.linalg.pinv(_damped(moment, damping), hermitian=True) + start
    columns = rest.mT
    torch.linalg.solve_triangular(factor, columns, upper=False, out=columns)
    torch.linalg.solve_triangular(factor.mT, columns, upper=True, out=columns)
    return rest.add_(start)


def _damped(moment: Tensor, damping: Tensor) -> Tensor:
    """A + λ I, by columns in memory, as LAPACK reads it."""
    damped = moment.mT.clone(memory_format=torch.contiguous_format).mT
    damped.diagonal().add_(damping)
    return damped


def _factor(moment: Tensor, damping: Tensor) -> tuple[Tensor, bool]:
    """The Cholesky factor of A + λ I, made in its place, and whether there is none."""
    factor = _damped(moment, damping)
    broken = torch.empty((), dtype=torch.int32, device=factor.device)
    torch.linalg.cholesky_ex(factor, out=(factor, broken))
    return factor, bool(broken.item())


GRID = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
"""Strengths that :func:`fitted` tries."""


def fitted(
    folds: list[tuple[Tensor, Tensor]], start: Tensor, strength: float | None = None, device: torch.device | None = None
) -> tuple[Tensor, float]:
    """Ridge over all folds, with the strength that predicts each fold best from the others where none is given.

    Args:
        folds: A and T of each, as for :func:`ridge`.
        strength: as for :func:`ridge`; ``None`` goes downhill on :data:`GRID` from 1.
        device: where to solve, one problem at a time; the folds stay where they are (``None``: there).

    Returns:
        W, float64 [out, in], on that device, and the strength.
    """
    device = device or folds[0][0].device
    if strength is None:
        errors: dict[int, float] = {}

        def error(place: int) -> float:
            if not 0 <= place < len(GRID):
                return torch.inf
            if place not in errors:
                errors[place] = sum(_error(folds, held, start, GRID[place], device) for held in range(len(folds)))
            return errors[place]

        place = GRID.index(1.0)
        step = -1 if error(place - 1) < error(place) else 1
        while error(place + step) < error(place):
            place += step
        strength = GRID[place]
    return ridge(*_together(folds, device), start, strength), strength


def _error(folds: list[tuple[Tensor, Tensor]], held: int, start: Tensor, strength: float, device: torch.device) -> float:
    """Squared error on a fold, but for a constant, of what is fitted to all others."""
    weight = ridge(*_together([*folds[:held], *folds[held + 1 :]], device), start, strength)
    moment, target = folds[held]
    error = weight @ moment.to(device)
    return error.sub_(target.to(device), alpha=2.0).mul_(weight).sum().item()


def _together(folds: list[tuple[Tensor, Tensor]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Sums of A and of T; those of one fold alone are not copied."""
    first, *others = folds
    if not others:
        return first[0].to(device), first[1].to(device)
    moment, target = (part.to(device, copy=True) for part in first)
    for more, wanted in others:
        moment += more.to(device)
        target += wanted.to(device)
    return moment, target


def scale(folds: list[tuple[Tensor, Tensor]], matrix: Tensor) -> float:
    """The number c for which ``c · matrix`` maps x to t best over all folds."""
    moment, target = (sum(parts) for parts in zip(*folds))
    energy = ((matrix @ moment) * matrix).sum()
    return ((target * matrix).sum() / energy).item() if energy > 0 else 1.0
