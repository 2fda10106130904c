"""What the tests of objectives share: a value and its gradient held against a formula in float64 NumPy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

Array = NDArray[np.float64]
Formula = Callable[[dict[str, Array]], float]
STEP = 1e-5
WITHIN = 1e-5
ROUNDING = 1e-10  # of a difference of two values near 1, over two steps


def normal(*shape: int, seed: int = 0, scale: float = 1.0) -> Array:
    return np.random.default_rng(seed).normal(0, scale, shape)


def tensors(arrays: dict[str, Array] | None, gradient: bool = False) -> dict[str, Tensor]:
    return {name: torch.tensor(a, dtype=torch.float64).requires_grad_(gradient) for name, a in (arrays or {}).items()}


def fitted(
    objective: nn.Module, student: dict[str, Array], teacher: dict[str, Array] | None = None, images: int = 0
) -> Any:
    """The objective with its adapters made, in float64."""
    torch.manual_seed(0)
    if images:
        objective.begin(None, None, images)  # type: ignore[operator]
    objective.fit(tensors(student), tensors(teacher))  # type: ignore[operator]
    return objective.double()


def weight(module: Any) -> Array:
    """A linear map [out, in] or a kernel [out, in, h, w]."""
    found: Array = module.weight.detach().numpy().copy()
    return found


def holds(
    objective: nn.Module,
    formula: Formula,
    student: dict[str, Array],
    teacher: dict[str, Array] | None = None,
    batch: dict[str, Any] | None = None,
    *,
    equal: Sequence[int] = (),
    seed: int = 0,
) -> dict[str, Array]:
    """Value and gradient agree with the formula and its central differences; gives the gradient.

    Few inputs are moved one by one, many along random directions. Rows `equal` are moved together, as those of equal
    images are: apart from each other they would not be the same case.
    """
    given = tensors(student, gradient=True)
    torch.manual_seed(seed)
    value = objective(given, tensors(teacher), batch or {}).mean()
    value.backward()
    assert value.item() == pytest.approx(formula(student), rel=WITHIN, abs=1e-12)
    gradients = {n: np.zeros(x.shape) if x.grad is None else x.grad.numpy() for n, x in given.items()}
    for name, gradient in gradients.items():
        directions = _directions(student[name].shape, equal)
        expected = np.array([_slope(formula, student, name, direction) for direction in directions])
        found = np.array([(gradient * direction).sum() for direction in directions])
        allowed = WITHIN * float(np.abs(expected).max()) + ROUNDING * max(1.0, abs(value.item()))
        np.testing.assert_allclose(found, expected, rtol=0, atol=allowed, err_msg=f"gradient of {name}")
    return gradients


def _directions(shape: tuple[int, ...], equal: Sequence[int]) -> list[Array]:
    size = int(np.prod(shape))
    if size <= 128 and not equal:
        return list(np.eye(size).reshape(size, *shape))
    made = [normal(*shape, seed=s) for s in range(6)]
    for direction in made:
        direction[list(equal)] = direction[list(equal[:1])]
    return made


def _slope(formula: Formula, student: dict[str, Array], name: str, direction: Array) -> float:
    ahead, behind = (formula({**student, name: student[name] + sign * STEP * direction}) for sign in (1, -1))
    return (ahead - behind) / (2 * STEP)


def softmax(x: Array) -> Array:
    powers = np.exp(x - x.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


def divergence(p: Array, q: Array) -> Array:
    """KL(p || q) of each row."""
    return (p * np.log(p / q)).sum(axis=1)


def rows_to_unit(x: Array) -> Array:
    return x / np.sqrt((x**2).sum(axis=1, keepdims=True))


def averaging(inputs: int, outputs: int) -> Array:
    """[outputs, inputs]: means over cells that cover the line, overlapping where it does not divide evenly."""
    made = np.zeros((outputs, inputs))
    for i in range(outputs):
        start, end = i * inputs // outputs, -((i + 1) * inputs // -outputs)
        made[i, start:end] = 1 / (end - start)
    return made


def repeating(inputs: int, outputs: int) -> Array:
    """[outputs, inputs]: each takes the input that its left edge lies in."""
    return np.eye(inputs)[[i * inputs // outputs for i in range(outputs)]]


def interpolating(inputs: int, outputs: int) -> Array:
    """[outputs, inputs]: linear interpolation between pixel centres, with the border repeated."""
    made = np.zeros((outputs, inputs))
    for row in range(outputs):
        position = min(max((row + 0.5) * inputs / outputs - 0.5, 0), inputs - 1)
        low = int(position)
        high = min(low + 1, inputs - 1)
        made[row, low] += 1 - (position - low)
        made[row, high] += position - low
    return made


def resized(x: Array, size: tuple[int, ...], by: Callable[[int, int], Array]) -> Array:
    """Maps [N, C, H, W] -> [N, C, *size]."""
    return np.einsum("ih,jw,nchw->ncij", by(x.shape[2], size[0]), by(x.shape[3], size[1]), x)


def pooled_to_smaller(a: Array, b: Array) -> tuple[Array, Array]:
    size = min(a.shape[2], b.shape[2]), min(a.shape[3], b.shape[3])
    return resized(a, size, averaging), resized(b, size, averaging)


def embedded(x: Array) -> Array:
    """[N, D] of vectors, maps [N, D, H, W] or sequences [N, T, D]."""
    return {2: lambda: x, 3: lambda: x.mean(axis=1), 4: lambda: x.mean(axis=(2, 3))}[x.ndim]()
