"""Weights and temperatures that change, views that teacher and student share, and attacks, through the recipe."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny_strategies import KL, SMALL, answers, distill, lessons, recipe, run, tiny_digits, watched, weights
from torch import Tensor

from edgekd.data import load
from edgekd.learner import Learner
from edgekd.recipe import DataSpec
from edgekd.stages.teaching import load_network

Tables = dict[str, dict[str, Any]]


def course(table: dict[str, Any], teachers: Tables) -> list[Tensor]:
    """What the weight of the second objective is, step by step of three epochs."""
    found: list[Tensor] = []

    def look(learner: Learner, batch: dict[str, Any]) -> None:
        if learner.source is None:
            return
        rule, steps = learner.weighted[0].weights[1], len(found)
        handle = rule.register_forward_hook(
            lambda _, given, value: found.append(value) if len(found) == steps else None
        )
        handles.append(handle)

    handles: list[Any] = []
    with watched(look):
        run(recipe(teachers["resnet"], distill(objectives=["ce", {"use": "kl", "weight": table}], epochs=3)))
    return found


@pytest.mark.parametrize("use", ["linear", "cosine"])
def test_a_schedule_goes_from_its_start_to_its_end_over_the_training(teachers: Tables, use: str) -> None:
    found = [float(v) for v in course({"use": use, "start": 1.0, "end": 0.2}, teachers)]
    done = [(i + 0.5) / len(found) for i in range(len(found))]
    share = done if use == "linear" else [(1 - math.cos(math.pi * d)) / 2 for d in done]
    assert len(found) == 18
    assert found == pytest.approx([1.0 - 0.8 * s for s in share])


def test_weights_per_image_follow_the_teachers_confidence(teachers: Tables) -> None:
    confidence = [{"use": "ce"}, {"use": "kl", "weight": {"use": "teacher-confidence"}}]
    seen: list[Tensor] = []

    def look(learner: Learner, batch: dict[str, Any]) -> None:
        if not seen:
            learner.weighted[0].weights[1].register_forward_hook(lambda _, given, value: seen.append(value))

    with watched(look), lessons() as found:
        run(recipe(teachers["resnet"], distill(objectives=confidence)))
    p = found[0].teacher[0]["logits"].softmax(dim=1)
    torch.testing.assert_close(seen[0].float(), p.gather(1, found[0].batch["label"][:, None])[:, 0])


def test_weights_per_image_follow_the_disagreement(teachers: Tables) -> None:
    objectives = ["ce", {"use": "kl", "weight": {"use": "disagreement", "scale": 2.0}}]
    seen: list[Tensor] = []

    def look(learner: Learner, batch: dict[str, Any]) -> None:
        if not seen:
            learner.weighted[0].weights[1].register_forward_hook(lambda _, given, value: seen.append(value))

    with watched(look), lessons() as found:
        made = run(recipe(teachers["resnet"], distill(objectives=objectives, epochs=3, lr=0.05)))
    p, q = found[0].teacher[0]["logits"].softmax(dim=1), found[0].students[0]["logits"].detach().softmax(dim=1)
    torch.testing.assert_close(seen[0].float(), (p - q).abs().sum(dim=1), rtol=1e-4, atol=1e-5)
    assert made.history()[-1]["loss.kl"] < made.history()[0]["loss.kl"]


def test_a_temperature_may_be_learnt_against_the_student(teachers: Tables) -> None:
    taus: list[float] = []

    def look(learner: Learner, batch: dict[str, Any]) -> None:
        [theta] = [v for n, v in learner.objectives.named_parameters() if n.endswith("theta")]
        taus.append(1 + 20 * float(theta.detach().sigmoid()))

    objectives = ["ce", {"use": "kl", "tau": {"use": "curriculum", "start": 4.0}}]
    with watched(look):
        run(recipe(teachers["resnet"], distill(objectives=objectives, epochs=3, lr=0.1)))
    assert taus[0] == pytest.approx(4.0, abs=1e-4)
    assert abs(taus[-1] - 4.0) > 1e-3
    assert all(1 < tau < 21 for tau in taus)


def test_the_temperature_may_follow_a_schedule(teachers: Tables) -> None:
    objectives = ["ce", {"use": "kl", "tau": {"use": "linear", "start": 8.0, "end": 1.0}}]
    constant = ["ce", {"use": "kl", "tau": 8.0}]
    moving = run(recipe(teachers["resnet"], distill(objectives=objectives, epochs=2)), "moving")
    fixed = run(recipe(teachers["resnet"], distill(objectives=constant, epochs=2)), "fixed")
    assert moving.history()[0]["loss.kl"] != fixed.history()[0]["loss.kl"]
    assert not torch.equal(weights(moving["distill"])["linear.weight"], weights(fixed["distill"])["linear.weight"])


@pytest.mark.parametrize("augment", [{"use": "mixup", "alpha": 1.0}, "cutmix", "random-erasing", "crop-flip"], ids=str)
def test_the_teacher_sees_the_images_that_the_student_sees(teachers: Tables, augment: Any) -> None:
    seen: list[Tensor] = []

    def look(learner: Learner, batch: dict[str, Any]) -> None:
        if learner.source is not None and not seen:
            for network in (learner.students[0].network, learner.source.network.network):
                network.register_forward_pre_hook(lambda _, given: seen.append(given[0]))

    with watched(look), lessons() as found:
        run(recipe(teachers["resnet"], distill(objectives=KL), data={"augment": augment}))
    assert len(seen) >= 4
    trained = seen[: 2 * len(found)]  # what comes after is validation
    for student, teacher, lesson in zip(trained[::2], trained[1::2], found, strict=True):
        assert torch.equal(student, teacher)
        assert torch.equal(student, lesson.batch["image"])
    data = load(DataSpec.model_validate({"use": "tiny-digits"}), 0)
    plain = (data.train.images.float() / 255 - data.mean[0]) / data.std[0]
    same = [
        torch.allclose(image, plain[i], atol=1e-4) for image, i in zip(trained[0], found[0].batch["index"], strict=True)
    ]
    assert sum(same) < 24  # erasing leaves every second one as it is
    if augment not in ("random-erasing", "crop-flip"):
        target = found[0].batch["target"]
        torch.testing.assert_close(target.sum(dim=1), torch.ones(32))
        assert int((target > 0).sum(dim=1).max()) == 2  # soft labels of two images


def test_early_stopping_ends_a_distillation_that_gets_no_better(teachers: Tables) -> None:
    made = run(recipe(teachers["resnet"], distill(objectives=KL, epochs=12, lr=1e-7, patience=2)))
    history = made.history()
    assert len(history) < 12
    best = max(range(len(history)), key=lambda i: history[i]["val.accuracy"])
    assert len(history) == best + 3
    assert made["distill"].manifest.metrics["accuracy"] == history[best]["val.accuracy"]


@pytest.mark.parametrize("model", [SMALL, {"use": "mobilenet", "width": 0.25}, {"use": "vit", "dim": 12, "depth": 1}])
def test_dropout_is_for_the_student_in_training_only(teachers: Tables, model: dict[str, Any]) -> None:
    inputs: dict[bool, list[float]] = {True: [], False: []}

    def look(learner: Learner, batch: dict[str, Any]) -> None:
        student = learner.students[0].network

        def hook(_: Any, given: tuple[Tensor]) -> None:
            inputs[student.training].append(float((given[0] == 0).float().mean()))

        student.linear.register_forward_pre_hook(hook)
        learner.forward = type(learner).forward.__get__(learner)  # once is enough

    with watched(look):
        made = run(recipe(teachers["resnet"], distill(model={**model, "dropout": 0.5}, objectives=KL)))
    zeros = sum(inputs[True]) / len(inputs[True])
    assert 0.4 < zeros < 0.95
    assert inputs[False]
    assert max(inputs[False]) < 0.4
    image = torch.randn(4, 1, 16, 16)
    assert torch.equal(answers(made["distill"], image), answers(made["distill"], image))


def test_weight_decay_keeps_weights_small(teachers: Tables) -> None:
    strong = run(recipe(teachers["resnet"], distill(weight_decay=0.5)), "strong")
    weak = run(recipe(teachers["resnet"], distill(weight_decay=0.0)), "weak")
    norms = [float(weights(m["distill"])["linear.weight"].norm()) for m in (strong, weak)]
    assert norms[0] < 0.9 * norms[1]


def attacked(artifact: Any, eps: float) -> float:
    """Accuracy on test images under one step of the sign of the gradient, of `eps` in units of images in [0, 1]."""
    network = load_network(artifact).eval()
    mean, std = artifact.manifest.preprocessing.mean[0], artifact.manifest.preprocessing.std[0]
    split = tiny_digits(3).test
    image = ((split.images.float() / 255 - mean) / std).requires_grad_(True)
    F.cross_entropy(network(image), split.labels).backward()
    assert image.grad is not None
    low, high = -mean / std, (1 - mean) / std
    with torch.no_grad():
        changed = (image + eps / std * image.grad.sign()).clamp(low, high)
        return float((network(changed).argmax(dim=1) == split.labels).float().mean())


def test_a_student_taught_on_attacked_images_withstands_attacks(teachers: Tables) -> None:
    robust = [{"use": "ce", "weight": 0.2}, {"use": "kl", "weight": 0.8, "tau": 2.0, "input": "adversarial"}]
    same = {"model": SMALL, "epochs": 6, "lr": 0.1, "keep": "last"}
    pgd = {"use": "pgd", "eps": 0.1, "steps": 2}
    data = {"data": {"every": 4}}
    hard = run(recipe(teachers["resnet"], distill(objectives=robust, attack=pgd, **same), **data), "hard")
    soft = run(recipe(teachers["resnet"], distill(objectives=KL, **same), **data), "soft")
    figures = {name: attacked(made["distill"], 0.1) for name, made in (("hard", hard), ("soft", soft))}
    assert figures["hard"] > figures["soft"] + 0.05


def divergence(student: Tensor, teacher: Tensor) -> float:
    """KL divergence from the teacher's probabilities, summed over rows."""
    p = teacher.softmax(dim=1)
    return float((p * (p.log() - student.log_softmax(dim=1))).sum())


@pytest.mark.parametrize("use", ["fgsm", "pgd"])
def test_attacks_stay_within_their_size_and_within_images(teachers: Tables, use: str) -> None:
    seen: list[tuple[Tensor, Tensor]] = []
    gaps: list[list[float]] = []
    objectives = ["ce", {"use": "kl", "input": "adversarial"}]

    def look(learner: Learner, batch: dict[str, Any]) -> None:
        attack = learner.attack
        if attack is None or getattr(attack, "told", False):
            return

        def told(*given: Any) -> Tensor:
            student, clean, teacher, _ = given
            changed = type(attack).__call__(attack, *given)
            seen.append((clean, changed))
            with torch.no_grad():
                gaps.append([divergence(student.eval()(images)["logits"], teacher) for images in (clean, changed)])
            student.train()
            return changed

        told.told = True  # type: ignore[attr-defined]
        learner.attack = told  # type: ignore[assignment]

    with watched(look):
        made = run(
            recipe(teachers["resnet"], distill(objectives=objectives, attack={"use": use, "eps": 0.1, "steps": 2}))
        )
    mean, std = made["distill"].manifest.preprocessing.mean[0], made["distill"].manifest.preprocessing.std[0]
    for clean, changed in seen:
        gap = ((changed - clean) * std).abs()
        assert 0.09 < float(gap.max()) <= 0.1 + 1e-5
        pixels = changed * std + mean
        assert float(pixels.min()) >= -1e-5
        assert float(pixels.max()) <= 1 + 1e-5
    assert len(seen) == 6
    assert all(after > before for before, after in gaps)  # it takes the student away from the teacher
