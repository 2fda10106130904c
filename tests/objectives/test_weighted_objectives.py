"""Objectives as a recipe lists them: weights, heads, names of parts, and what is wrong with a list."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from edgekd.errors import EdgekdError, RecipeError, UsageError
from edgekd.learner import parse_objectives
from edgekd.objectives import Objectives
from edgekd.objectives.feature import Hint

torch.manual_seed(0)
S, T = torch.randn(4, 5), torch.randn(4, 5)
AUX, AUX_T = torch.randn(4, 5), torch.randn(4, 5)
BATCH = {"label": torch.tensor([0, 4, -1, 2])}


def weighted(*entries: Any) -> Objectives:
    return Objectives(parse_objectives(entries))


def kl(student: torch.Tensor, teacher: torch.Tensor, tau: float) -> float:
    q, p = (F.softmax(x.double() / tau, 1) for x in (student, teacher))
    return float((p * (p / q).log()).sum() / len(q) * tau**2)


def test_the_loss_is_the_weighted_sum_and_its_parts_are_shown_without_weights() -> None:
    objectives = weighted({"use": "ce", "weight": 0.25}, {"use": "kl", "weight": 3, "tau": 2.0}, "mse-logits")
    found = objectives({"logits": S}, {"logits": T}, BATCH)
    ce = float(F.cross_entropy(S[[0, 1, 3]].double(), BATCH["label"][[0, 1, 3]]))
    mse = float((S.double() - T.double()).square().mean())
    assert list(found) == ["loss", "ce", "kl", "mse-logits"]
    assert found["ce"].item() == pytest.approx(ce, rel=1e-5)
    assert found["kl"].item() == pytest.approx(kl(S, T, 2.0), rel=1e-5)
    assert found["mse-logits"].item() == pytest.approx(mse, rel=1e-5)
    assert found["loss"].item() == pytest.approx(0.25 * ce + 3 * kl(S, T, 2.0) + mse, rel=1e-5)


def test_only_the_loss_carries_a_gradient() -> None:
    student = S.clone().requires_grad_()
    found = weighted("ce", {"use": "kl", "weight": 0})({"logits": student}, {"logits": T}, BATCH)
    assert found["loss"].requires_grad
    assert not found["ce"].requires_grad
    found["loss"].backward()
    alone = S.clone().requires_grad_()
    weighted("ce")({"logits": alone}, {}, BATCH)["loss"].backward()
    assert torch.equal(student.grad, alone.grad)  # type: ignore[arg-type]


def test_two_of_a_kind_have_names_of_their_own() -> None:
    objectives = weighted({"use": "kl", "tau": 1.0}, "ce", {"use": "kl", "tau": 8.0})
    found = objectives({"logits": S}, {"logits": T}, BATCH)
    assert list(found) == ["loss", "kl-0", "ce", "kl-2"]
    assert found["kl-0"].item() == pytest.approx(kl(S, T, 1.0), rel=1e-5)
    assert found["kl-2"].item() == pytest.approx(kl(S, T, 8.0), rel=1e-5)


def test_on_chooses_the_head_of_both() -> None:
    objectives = weighted({"use": "kl", "tau": 2.0, "on": "aux"}, {"use": "ce"})
    student, teacher = {"logits": S, "aux": AUX}, {"logits": T, "aux": AUX_T}
    found = objectives(student, teacher, BATCH)
    assert found["kl"].item() == pytest.approx(kl(AUX, AUX_T, 2.0), rel=1e-5)
    assert found["ce"].item() == weighted("ce")({"logits": S}, {}, BATCH)["ce"].item()


def test_a_teacher_without_the_head_teaches_it_by_its_logits() -> None:
    found = weighted({"use": "kl", "tau": 2.0, "on": "aux"})({"logits": S, "aux": AUX}, {"logits": T}, BATCH)
    assert found["kl"].item() == pytest.approx(kl(AUX, T, 2.0), rel=1e-5)


def test_a_head_that_the_student_lacks_is_an_error() -> None:
    with pytest.raises(UsageError) as raised:
        weighted("ce", {"use": "kl", "on": "auxx"}).fit({"logits": S, "aux": AUX}, {"logits": T})
    problem = raised.value.problem
    assert problem.where == "objectives[1].on"
    assert "no head 'auxx'" in problem.what
    assert problem.hint == "did you mean 'aux'?"


def test_what_objectives_ask_for() -> None:
    assert not weighted("ce", {"use": "label-smoothing", "amount": 0.1}).needs_teacher
    both = weighted(
        "ce", {"use": "hint", "student": "a", "teacher": "x"}, {"use": "hint", "student": "a", "teacher": "y"}
    )
    assert both.needs_teacher
    assert both.taps("student") == ["a"]
    assert both.taps("teacher") == ["x", "y"]
    assert isinstance(both.modules_list[1], Hint)


@pytest.mark.parametrize(
    ("entries", "where", "what"),
    [
        (["ce", {"use": "kl", "tau": -1}], "objectives[1].tau", "greater than 0, got -1"),
        ([{"use": "kl", "temperature": 4.0}], "objectives[0].temperature", "unknown key"),
        ([{"use": "kl", "weight": -0.5}], "objectives[0].weight", "greater than or equal to 0"),
        ([{"use": "hint", "student": "layer1"}], "objectives[0].teacher", "missing"),
        ([{"use": "label-smoothing", "amount": 1.0}], "objectives[0].amount", "less than 1"),
        (["kll"], "objectives[0]", "no objectives called 'kll'"),
        ([{"weight": 1.0}], "objectives[0].use", "missing"),
    ],
)
def test_wrong_entries_are_placed(entries: list[Any], where: str, what: str) -> None:
    with pytest.raises(EdgekdError) as raised:
        weighted(*entries)
    assert [p.where for p in raised.value.problems] == [where]
    assert what in raised.value.problems[0].what


def test_all_wrong_entries_are_told_at_once() -> None:
    with pytest.raises(RecipeError) as raised:
        parse_objectives([{"use": "ce", "weight": "much"}, "ce", {"use": "kl", "weight": -1}])
    assert [p.where for p in raised.value.problems] == ["objectives[0].weight", "objectives[2].weight"]
