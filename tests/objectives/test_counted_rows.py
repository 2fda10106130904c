"""Which rows of a batch an objective looks at: rows that are taught, rows of other data sets, adversarial images."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from formulas import Array, divergence, normal, softmax
from torch import Tensor

from edgekd.learner import parse_objectives
from edgekd.objectives import Objectives

S, T, AUX = normal(6, 4, scale=2.0), normal(6, 4, seed=1, scale=2.0), normal(6, 3, seed=2)
LABEL = torch.tensor([0, 2, -1, -1, 3, -1])
TAUGHT = torch.tensor([True, True, False, True, True, False])


def weighted(*entries: Any) -> Objectives:
    return Objectives(parse_objectives(entries))


def live() -> dict[str, Tensor]:
    return {"logits": torch.tensor(S).requires_grad_(), "aux": torch.tensor(AUX).requires_grad_()}


def kl(s: Array, t: Array) -> Array:
    return 4.0 * divergence(softmax(t / 2), softmax(s / 2))


def cross_entropy(x: Array, label: Any, rows: list[int]) -> float:
    return float(np.mean([-np.log(softmax(x[i : i + 1])[0, label[i]]) for i in rows]))


KL = {"use": "kl", "tau": 2.0, "weight": 3.0}


def test_rows_that_are_not_taught_add_nothing_to_a_mean_over_all() -> None:
    student = live()
    found = weighted("ce", KL)(student, {"logits": torch.tensor(T)}, {"label": LABEL, "taught": TAUGHT})
    taught = (kl(S, T) * TAUGHT.numpy()).sum() / 6
    labelled = cross_entropy(S, LABEL, [0, 1, 4])
    assert found["kl"].item() == pytest.approx(taught, rel=1e-9)
    assert found["ce"].item() == pytest.approx(labelled, rel=1e-9)
    assert found["loss"].item() == pytest.approx(labelled + 3 * taught, rel=1e-9)
    found["loss"].backward()
    gradient = student["logits"].grad
    assert gradient is not None
    assert gradient.abs().sum(dim=1).nonzero().flatten().tolist() == [0, 1, 3, 4]


def test_an_objective_without_a_teacher_does_not_ask_what_is_taught() -> None:
    nothing = torch.zeros(6, dtype=torch.bool)
    found = weighted("label-smoothing")(live(), {}, {"label": LABEL, "taught": nothing})
    assert found["label-smoothing"].item() > 0.1


def test_a_batch_of_which_nothing_is_taught_gives_zero_and_a_zero_gradient() -> None:
    student, nothing = live(), torch.zeros(6, dtype=torch.bool)
    found = weighted(KL, "rkd")(student, {"logits": torch.tensor(T)}, {"label": LABEL, "taught": nothing})
    found["loss"].backward()
    assert [v.item() for v in found.values()] == [0, 0, 0]
    assert student["logits"].grad is not None
    assert (student["logits"].grad == 0).all()


def test_objectives_on_relations_see_the_taught_rows_alone() -> None:
    batch = {"label": LABEL, "taught": TAUGHT}
    found = weighted("pkt")(live(), {"logits": torch.tensor(T)}, batch)["pkt"]
    rows = TAUGHT.numpy()
    alone = weighted("pkt")({"logits": torch.tensor(S[rows])}, {"logits": torch.tensor(T[rows])}, {})["pkt"]
    assert found.item() == pytest.approx(alone.item() * 4 / 6, rel=1e-9)


def test_a_weight_per_image_is_that_of_the_taught_rows() -> None:
    entry = {"use": "mse-logits", "weight": {"use": "teacher-confidence"}}
    found = weighted(entry)(live(), {"logits": torch.tensor(T)}, {"label": LABEL, "taught": TAUGHT})["loss"]
    p, label = softmax(T), LABEL.numpy()
    own = np.where(label >= 0, p[np.arange(6), label], p.max(axis=1))
    assert found.item() == pytest.approx((own * ((S - T) ** 2).mean(axis=1) * TAUGHT.numpy()).sum() / 6, rel=1e-9)


def test_each_head_sees_the_rows_and_labels_of_its_data() -> None:
    of = {"logits": torch.tensor([True, True, True, True, False, False]), "aux": torch.arange(6) >= 3}
    aux_label = torch.tensor([-1, -1, -1, 1, 0, 2])
    batch = {"label": LABEL, "labels": {"aux": aux_label}, "of": of, "target": torch.full((6, 4), 0.25).double()}
    student = live()
    found = weighted({"use": "ce", "on": "aux"}, KL)(student, {"logits": torch.tensor(T)}, batch)
    # Soft targets are the main head's; this one has labels of its own.
    assert found["ce"].item() == pytest.approx(cross_entropy(AUX, aux_label, [3, 4, 5]) / 2, rel=1e-9)
    assert found["kl"].item() == pytest.approx(kl(S, T)[:4].sum() / 6, rel=1e-9)
    found["loss"].backward()
    for name, rows in (("logits", [0, 1, 2, 3]), ("aux", [3, 4, 5])):
        gradient = student[name].grad
        assert gradient is not None
        assert gradient.abs().sum(dim=1).nonzero().flatten().tolist() == rows


def test_rows_must_be_both_of_the_head_and_taught() -> None:
    batch = {"label": LABEL, "taught": TAUGHT, "of": {"logits": torch.arange(6) >= 2}}
    found = weighted(KL)(live(), {"logits": torch.tensor(T)}, batch)["kl"]
    assert found.item() == pytest.approx(kl(S, T)[[3, 4]].sum() / 6, rel=1e-9)


def test_adversarial_objectives_hear_what_is_said_to_changed_images() -> None:
    other = normal(6, 4, seed=8)
    entries = ["ce", {**KL, "input": "adversarial"}]
    batch, teacher = {"label": LABEL}, {"logits": torch.tensor(T)}
    found = weighted(*entries)(live(), teacher, batch, {"logits": torch.tensor(other)})
    assert found["kl"].item() == pytest.approx(kl(other, T).mean(), rel=1e-9)
    assert found["ce"].item() == pytest.approx(cross_entropy(S, LABEL, [0, 1, 4]), rel=1e-9)
    assert weighted(*entries)(live(), teacher, batch)["kl"].item() == pytest.approx(kl(S, T).mean(), rel=1e-9)
