"""A learner in somebody else's loop: what it trains, what it leaves alone, and what does not fit together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

import edgekd
from edgekd.errors import RecipeError, UsageError
from edgekd.learner import Learner
from edgekd.models import Tapped
from edgekd.teachers import Frozen


class Small(nn.Module):
    """One convolution, normalisation and dropout; `width` sets the size of the features."""

    def __init__(self, width: int = 8, classes: int = 10) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, width, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(width)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(width * 16, classes)

    def forward(self, image: Tensor) -> Tensor:
        return self.head(self.drop(F.relu(self.norm(self.conv(image))).flatten(1)))


class TwoHeads(Small):
    def __init__(self, width: int = 8) -> None:
        super().__init__(width)
        self.coarse = nn.Linear(width * 16, 3)

    def forward(self, image: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        x = F.relu(self.norm(self.conv(image))).flatten(1)
        return {"logits": self.head(x), "coarse": self.coarse(x)}


HINT = {"use": "hint", "student": "conv", "teacher": "conv", "weight": 5.0}
IMAGES, LABELS = load_digits(return_X_y=True)
X = torch.from_numpy(IMAGES).float().reshape(-1, 1, 8, 8) / 8 - 1
Y = torch.from_numpy(LABELS).long()


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def learner(
    objectives: Sequence[Any], student: nn.Module | None = None, teacher: nn.Module | None = None, **more: Any
) -> Learner:
    return Learner.of(student or Small(), objectives=objectives, teacher=teacher, example=X[:2], **more)


def test_a_bare_loop_learns_from_teacher_features_and_labels() -> None:
    teacher = Small(16)
    optimizer = torch.optim.SGD(teacher.parameters(), 0.05, momentum=0.9)
    for step in range(60):
        rows = torch.arange(step * 64, (step + 1) * 64) % 1400
        optimizer.zero_grad()
        F.cross_entropy(teacher(X[rows]), Y[rows]).backward()
        optimizer.step()
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    student = Small()
    made = edgekd.Learner.of(
        student, objectives=["ce", {"use": "kl", "tau": 2.0}, HINT], teacher=teacher, example=X[:2]
    )
    optimizer = torch.optim.SGD(made.parameters(), 0.02, momentum=0.9)
    losses = []
    for step in range(60):
        rows = torch.arange(step * 64, (step + 1) * 64) % 1400
        optimizer.zero_grad()
        found = made({"image": X[rows], "label": Y[rows]})
        found["loss"].backward()
        optimizer.step()
        losses.append({name: value.item() for name, value in found.items()})
    assert list(losses[0]) == ["loss", "ce", "kl", "hint"]
    for name in losses[0]:
        assert sum(row[name] for row in losses[-5:]) < 0.6 * sum(row[name] for row in losses[:5])
    student.eval()
    assert (student(X[1400:]).argmax(1) == Y[1400:]).float().mean() > 0.8
    assert all(torch.equal(before[name], value) for name, value in teacher.state_dict().items())


def test_the_teacher_is_no_part_of_parameters_and_state() -> None:
    teacher = Small(16)
    made = learner(["ce", "kl", HINT], teacher=teacher)
    mine = {id(p) for p in made.parameters()}
    assert not mine & {id(p) for p in teacher.parameters()}
    assert len(mine) == len(list(Small().parameters())) + 1  # and the adapter
    assert [n for n in made.state_dict() if not n.startswith("students.")] == [
        "objectives.0.modules_list.2.adapter.weight"
    ]
    assert made.state_dict()["objectives.0.modules_list.2.adapter.weight"].shape == (16, 8, 1, 1)


def test_no_gradient_reaches_the_teacher_which_is_copied_and_left_alone() -> None:
    teacher = Small(16).train()
    made = learner(["kl", HINT], teacher=teacher)
    made.train()
    made({"image": X[:8], "label": Y[:8]})["loss"].backward()
    assert made.source is not None
    assert all(p.grad is None and not p.requires_grad for p in made.source.parameters())
    assert not any(module.training for child in made.source.children() for module in child.modules())
    assert all(p.grad is None and p.requires_grad for p in teacher.parameters())
    assert all(module.training for module in teacher.modules())
    assert made.student.training
    assert all(p.grad is not None for p in made.parameters())


def test_the_teacher_moves_with_the_learner() -> None:
    made = learner(["kl"], teacher=Small(16)).to(torch.float64)
    assert made.source is not None
    assert {p.dtype for p in made.source.parameters()} == {torch.float64}
    assert made.double()({"image": X[:4].double(), "label": Y[:4]})["loss"].isfinite()
    made.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    [source] = [m for m in made.source.modules() if isinstance(m, Small)]
    assert source.conv.weight.is_contiguous(memory_format=torch.channels_last)
    made.to("meta")
    assert {p.device.type for p in [*made.source.parameters(), *made.parameters()]} == {"meta"}


def test_labels_alone_need_no_teacher_and_ask_none() -> None:
    made = learner(["ce"])
    assert made.source is None
    calls: list[int] = []
    teacher = Small()
    teacher.register_forward_hook(lambda *_: calls.append(1))
    made = learner(["ce"], teacher=teacher)
    made({"image": X[:4], "label": Y[:4]})
    assert not calls


def test_putting_it_together_changes_neither_statistics_nor_mode() -> None:
    student = Small()
    student.train()
    made = learner(["ce", "kl"], student=student, teacher=Small())
    assert student.training
    assert student.norm.num_batches_tracked == 0
    assert torch.equal(student.norm.running_mean, torch.zeros(8))
    made.eval()
    assert not student.training


def test_outputs_of_mixed_precision_are_judged_in_float32() -> None:
    made = learner(["ce", "kl", HINT], teacher=Small(16))
    made.eval()
    with torch.autocast("cpu", torch.bfloat16):
        half = made({"image": X[:64], "label": Y[:64]})
    full = made({"image": X[:64], "label": Y[:64]})
    assert {value.dtype for value in half.values()} == {torch.float32}
    assert half["loss"].item() == pytest.approx(full["loss"].item(), rel=0.02)


def test_a_tap_that_wraps_the_student_is_used() -> None:
    seen: list[Any] = []

    def tap(student: nn.Module, taps: Sequence[str]) -> nn.Module:
        seen.append(list(taps))
        return Tapped(student, taps)

    learner(["ce", HINT], teacher=Small(16), tap=tap)
    assert seen == [["conv"]]


def test_a_source_of_ones_own_teaches() -> None:
    class Doubled(Frozen):
        def forward(self, batch: dict[str, Any], students: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
            return [{"logits": 2 * out["logits"]} for out in super().forward(batch, students)]

    teacher = Small()
    made = learner(["mse-logits"], teacher=teacher, source=Doubled)
    made.eval()
    expected = F.mse_loss(made.student(X[:8])["logits"], 2 * teacher.eval()(X[:8]))
    assert torch.allclose(made({"image": X[:8], "label": Y[:8]})["loss"], expected)


@pytest.mark.parametrize(
    ("objectives", "student", "teacher", "where", "what", "hint"),
    [
        (["ce", "kl"], Small(), None, "objectives", "need a teacher", "use only 'ce'"),
        ([], Small(), None, "objectives", "nothing to learn", "ce"),
        (
            ["kl"],
            Small(classes=10),
            Small(classes=7),
            "objectives",
            r"the student gives (2, 10) logits and the teacher (2, 7)",
            "same classes",
        ),
        (
            ["ce", {**HINT, "student": "convv"}],
            Small(),
            Small(),
            "objectives[1].student",
            "student: the network has no module 'convv' to tap",
            "did you mean 'conv'?",
        ),
        (
            [{**HINT, "teacher": "layer9"}],
            Small(),
            Small(),
            "objectives[0].teacher",
            "teacher: the network has no module 'layer9' to tap",
            "at the top: conv, norm, drop, head",
        ),
        (
            ["ce", {**HINT, "teacher": "head"}],
            Small(),
            Small(),
            "objectives[1]",
            "'conv' gives [2, 8, 4, 4], the teacher's 'head' [2, 10]",
            "maps with maps",
        ),
        ([{"use": "kl", "on": "fine"}], TwoHeads(), TwoHeads(), "objectives[0].on", "no head 'fine'", "coarse"),
    ],
)
def test_what_does_not_fit_is_told(
    objectives: list[Any], student: nn.Module, teacher: nn.Module | None, where: str, what: str, hint: str
) -> None:
    with pytest.raises(UsageError) as raised:
        learner(objectives, student, teacher)
    [problem] = raised.value.problems
    assert problem.where == where
    assert what in problem.what
    assert hint in (problem.hint or "")
    assert raised.value.exit_code == 2


def test_wrong_arguments_are_a_recipe_error() -> None:
    with pytest.raises(RecipeError) as raised:
        learner([{"use": "kl", "tau": 0}], teacher=Small())
    assert raised.value.problems[0].where == "objectives[0].tau"


def test_an_objective_on_a_second_head_trains_it() -> None:
    student, teacher = TwoHeads(), TwoHeads()
    made = learner(["kl", {"use": "mse-logits", "on": "coarse"}], student, teacher)
    found = made({"image": X[:8], "label": Y[:8]})
    found["loss"].backward()
    assert student.coarse.weight.grad is not None
    assert student.coarse.weight.grad.abs().max() > 0
    student.eval()
    expected = F.mse_loss(student(X[:8])["coarse"], teacher.eval()(X[:8])["coarse"])
    made.eval()
    assert torch.allclose(made({"image": X[:8], "label": Y[:8]})["mse-logits"], expected)
