"""Every objective as in training with mixed precision: float32 features, adapters under bfloat16 autocast."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from formulas import normal
from torch import Tensor

from edgekd.learner import parse_objectives
from edgekd.objectives import Objectives
from edgekd.registry import names

STUDENT = {"logits": (6, 10), "s1": (6, 4, 8, 8), "s2": (6, 8, 4, 4), "projector": (6, 8, 4, 4), "s3": (6, 5, 12)}
TEACHER = {"logits": (6, 10), "t1": (6, 4, 8, 8), "t2": (6, 8, 4, 4), "t3": (6, 5, 16)}
ONE = {"student": "s2", "teacher": "t2"}
SEVERAL = {"student": ["s1", "s2"], "teacher": ["t1", "t2"]}
CASES: dict[str, dict[str, Any]] = {
    "ce": {},
    "label-smoothing": {},
    "kl": {"standardize": True},
    "mse-logits": {},
    "mse-probs": {},
    "dkd": {},
    "dist": {},
    "hint": ONE,
    "hidden": {"student": ["s3"], "teacher": ["t3"]},
    "attention": SEVERAL,
    "review": SEVERAL,
    "classifier-reuse": {"teacher": "t2"},
    "fsp": SEVERAL,
    "rkd": ONE,
    "similarity": ONE,
    "pkt": ONE,
    "crd": ONE,
    "seed": ONE,
    "byot": {"student": ["s1", "s2"]},
}


def outputs(shapes: dict[str, tuple[int, ...]], seed: int, scale: float, gradient: bool) -> dict[str, Tensor]:
    made = {name: torch.tensor(normal(*shape, seed=seed, scale=scale)).float() for name, shape in shapes.items()}
    return {name: x.requires_grad_(gradient) for name, x in made.items()}


def test_no_objective_is_left_out() -> None:
    # bn-sparsity looks at the student's weights and at no feature; it has a test of its own.
    assert set(CASES) | {"bn-sparsity"} == set(names("objectives"))


@pytest.mark.parametrize("scale", [1.0, 30.0])
@pytest.mark.parametrize("use", CASES)
def test_value_and_gradient_are_finite_and_near_those_of_full_precision(use: str, scale: float) -> None:
    batch = {"label": torch.tensor([0, 3, -1, 9, 3, 0]), "index": torch.tensor([5, 2, 9, 0, 7, 1])}
    student, teacher = outputs(STUDENT, 0, scale, True), outputs(TEACHER, 1, scale, False)
    objectives = Objectives(parse_objectives([{"use": use, **CASES[use]}]))
    torch.manual_seed(0)
    for module in objectives.modules_list:
        if use == "crd":
            module.begin(None, None, 32)  # type: ignore[operator]
    objectives.fit(student, teacher)
    objectives.eval()  # memories and statistics stay, so that both see the same

    found = {}
    for precision in ("bf16", "fp32"):
        for x in student.values():
            x.grad = None
        torch.manual_seed(1)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            loss = objectives(student, teacher, batch)["loss"]
        assert loss.dtype == torch.float32
        loss.backward()
        slopes = torch.cat([x.grad.flatten() for x in student.values() if x.grad is not None])
        assert torch.isfinite(loss)
        assert torch.isfinite(slopes).all()
        assert slopes.abs().max() > 0
        found[precision] = loss.item(), slopes
    assert found["bf16"][0] == pytest.approx(found["fp32"][0], rel=0.05, abs=1e-4)
    apart = (found["bf16"][1] - found["fp32"][1]).norm() / found["fp32"][1].norm()
    assert apart < 0.15


@pytest.mark.parametrize("use", CASES)
def test_one_image_in_training_is_finite(use: str) -> None:
    """The last batch of a training set may have one image."""
    batch = {"label": torch.tensor([3]), "index": torch.tensor([5])}
    student, teacher = outputs(STUDENT, 0, 1.0, True), outputs(TEACHER, 1, 1.0, False)
    objectives = Objectives(parse_objectives([{"use": use, **CASES[use]}]))
    for module in objectives.modules_list:
        if use == "crd":
            module.begin(None, None, 32)  # type: ignore[operator]
    objectives.fit(student, teacher)
    one = {name: x[:1].detach().requires_grad_() for name, x in student.items()}
    with torch.autocast("cpu", torch.bfloat16):
        loss = objectives.train()(one, {name: x[:1] for name, x in teacher.items()}, batch)["loss"]
    loss.backward()
    assert torch.isfinite(loss)
    assert all(torch.isfinite(x.grad).all() for x in one.values() if x.grad is not None)
