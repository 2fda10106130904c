"""Every teacher source through the recipe: what a student is told is what the method says it is told."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tiny_strategies import KL, SMALL, answers, distill, lessons, recipe, run, watched, weights
from torch import Tensor

from edgekd.artifact import Artifact
from edgekd.learner import Learner

Tables = dict[str, dict[str, Any]]


def test_frozen_is_the_teachers_own_answer_to_the_students_images(teachers: Tables) -> None:
    with lessons() as found:
        made = run(recipe(teachers["resnet"], distill(objectives=KL, epochs=3, lr=0.05), data={"augment": "crop-flip"}))
    assert len(found) == 3 * (216 // 32)
    for lesson in found[::5]:
        expected = answers(made["teacher"], lesson.batch["image"])
        torch.testing.assert_close(lesson.teacher[0]["logits"], expected, rtol=1e-4, atol=1e-4)
    history = made.history()
    assert history[-1]["loss.kl"] < 0.8 * history[0]["loss.kl"]
    assert made["distill"].manifest.parents["teacher"] == made["teacher"].key


def logits(artifact: Artifact, lesson: Any) -> NDArray[Any]:
    return answers(artifact, lesson.batch["image"]).double().numpy()


def softmax(x: NDArray[Any], axis: int) -> NDArray[Any]:
    e = np.exp(x - x.max(axis=axis, keepdims=True))
    return e / e.sum(axis=axis, keepdims=True)


def combined(how: str, found: NDArray[Any], label: NDArray[Any], accuracies: list[float]) -> NDArray[Any]:
    """Logits [M, N, K] of teachers as one [N, K], by the formula of each rule."""
    if how == "confidence":  # CA-MKD, eq. 5: w_m = (1 - exp(CE_m) / sum exp(CE)) / (M - 1)
        loss = -np.log(softmax(found, 2)[:, np.arange(len(label)), label])
        shares = (1 - softmax(loss, 0)) / (len(found) - 1)
    else:
        given = {"mean": [1, 1], "fixed": [0.2, 0.8], "accuracy": [1 / (1.01 - a) for a in accuracies]}[how]
        shares = np.tile((np.array(given) / sum(given))[:, None], len(label))
    return (shares[:, :, None] * found).sum(axis=0)


@pytest.mark.parametrize("how", ["mean", "fixed", "confidence"])
def test_an_ensemble_of_two_architectures_weighs_its_members(teachers: Tables, how: str) -> None:
    source = {"use": "ensemble", "combine": how, **({"weights": [0.2, 0.8]} if how == "fixed" else {})}
    with lessons() as found:
        made = run(recipe([teachers["resnet"], teachers["mobile"]], distill(objectives=KL, source=source)))
    for lesson in found[::3]:
        each = np.stack([logits(made[m], lesson) for m in ("teacher", "teacher-2")])
        expected = combined(how, each, lesson.batch["label"].numpy(), [])
        np.testing.assert_allclose(lesson.teacher[0]["logits"].numpy(), expected, rtol=1e-3, atol=1e-3)


def test_an_ensemble_weighs_by_accuracy_on_the_validation_split(teachers: Tables) -> None:
    trained = [{"model": SMALL, "epochs": 1}, {**teachers["mobile"], "held_out": True}]
    with lessons() as found:
        made = run(recipe(trained, distill(objectives=KL, source={"use": "ensemble", "combine": "accuracy"})))
    members = [made["teacher"], made["teacher-2"]]
    accuracies = [m.manifest.metrics["accuracy"] for m in members]
    assert accuracies[0] < accuracies[1]
    each = np.stack([logits(m, found[0]) for m in members])
    expected = combined("accuracy", each, found[0].batch["label"].numpy(), accuracies)
    np.testing.assert_allclose(found[0].teacher[0]["logits"].numpy(), expected, rtol=1e-3, atol=1e-3)


def test_random_draws_one_teacher_per_batch(teachers: Tables) -> None:
    source = {"use": "ensemble", "combine": "random"}
    with lessons() as found:
        made = run(recipe([teachers["resnet"], teachers["mobile"]], distill(objectives=KL, source=source, epochs=2)))
    drawn = []
    for lesson in found:
        told = lesson.teacher[0]["logits"]
        near = [
            torch.allclose(told, answers(made[m], lesson.batch["image"]), atol=1e-3) for m in ("teacher", "teacher-2")
        ]
        assert sum(near) == 1
        drawn.append(near.index(True))
    assert set(drawn) == {0, 1}


def test_teachers_of_some_classes_are_merged_into_one_label_space(teachers: Tables) -> None:
    some = [teachers["low"], teachers["high"]]  # 0 to 5, and 4 to 9
    with lessons() as found:
        made = run(recipe(some, distill(objectives=KL, source="ensemble", epochs=3, lr=0.05)))
    assert made["teacher"].manifest.classes == list("012345")
    for lesson in found[::7]:
        low, high = logits(made["teacher"], lesson), logits(made["teacher-2"], lesson)
        expected = np.concatenate([low[:, :4], (low[:, 4:] + high[:, :2]) / 2, high[:, 2:]], axis=1)
        np.testing.assert_allclose(lesson.teacher[0]["logits"].numpy(), expected, rtol=1e-3, atol=1e-3)
    history = made.history()
    assert history[-1]["loss.kl"] < 0.9 * history[0]["loss.kl"]
    assert made["distill"].manifest.classes == list("0123456789")


def test_confidence_gives_nothing_to_a_teacher_without_the_label(teachers: Tables) -> None:
    some = [teachers["low"], teachers["high"]]
    with lessons() as found:
        made = run(recipe(some, distill(objectives=KL, source={"use": "ensemble", "combine": "confidence"})))
    lesson, label = found[0], found[0].batch["label"]
    low, high = logits(made["teacher"], lesson), logits(made["teacher-2"], lesson)
    told = lesson.teacher[0]["logits"].numpy()
    only = (label < 4).numpy()  # nobody but the first knows these, so classes 4 and 5 are its own too
    np.testing.assert_allclose(told[only][:, :6], low[only], rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(told[only][:, 6:], high[only][:, 2:], rtol=1e-3, atol=1e-3)


def test_a_moving_average_of_the_student_teaches_it() -> None:
    states: list[dict[str, Tensor]] = []
    averages: list[dict[str, Tensor]] = []

    def look(learner: Learner, batch: dict[str, Any]) -> None:
        if learner.source is None:  # the teacher's own training
            return
        states.append({k: v.clone() for k, v in learner.students[0].network.state_dict().items()})
        averages.append({k: v.clone() for k, v in learner.source.averages[0].network.state_dict().items()})

    with watched(look):
        run(
            recipe(
                {"model": SMALL, "epochs": 1}, distill(objectives=["ce", "kl"], source={"use": "ema", "decay": 0.5})
            ),
            "a",
        )
    expected = dict(states[0])
    for step, (live, found) in enumerate(zip(states, averages, strict=True)):
        if step:
            decay = min(0.5, step / (9 + step))
            expected = {k: v * decay + live[k] * (1 - decay) for k, v in expected.items()}
        for name, value in found.items():
            if value.is_floating_point():
                torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-5)
    assert not torch.equal(averages[-1]["linear.weight"], states[-1]["linear.weight"])


def test_a_teacher_that_is_no_network_is_right_with_the_probability_asked_for(teachers: Tables) -> None:
    objectives = ["ce", {"use": "kl", "tau": 20.0, "weight": 0.1}]
    with lessons() as found:
        run(recipe(teachers["resnet"], distill(objectives=objectives, source={"use": "teacher-free", "correct": 0.7})))
    p = found[0].teacher[0]["logits"].exp()
    right = p.gather(1, found[0].batch["label"][:, None])
    torch.testing.assert_close(right, torch.full_like(right, 0.7))
    assert p.sort(dim=1)[0][:, :-1].allclose(torch.tensor(0.3 / 9))


def test_classifiers_on_inner_layers_train_and_are_not_kept(teachers: Tables) -> None:
    byot = {"use": "byot", "student": ["layer1", "layer2"]}
    made = run(recipe(teachers["resnet"], distill(objectives=["ce", byot], epochs=3, lr=0.05)))
    history = made.history()
    assert history[-1]["loss.byot"] < history[0]["loss.byot"]
    assert "teacher" in made.artifacts
    alone = run(recipe(teachers["resnet"], distill(objectives=["ce"])), "alone")
    assert weights(made["distill"]).keys() == weights(alone["distill"]).keys()


@pytest.mark.parametrize("count", [2, 3])
def test_peers_learn_from_the_mean_of_the_others(teachers: Tables, count: int) -> None:
    models = [SMALL, {"use": "mobilenet", "width": 0.25}, {**SMALL, "width": 6}][:count]
    stage = distill(
        students=[{"model": m} for m in models], objectives=["ce", {"use": "kl", "tau": 1.0}], source="peers"
    )
    with lessons() as found:
        made = run(recipe(teachers["resnet"], stage))
    said = [s["logits"].detach().double().softmax(dim=1) for s in found[3].students]
    for i, told in enumerate(found[3].teacher):
        others = [p for j, p in enumerate(said) if j != i]
        torch.testing.assert_close(told["logits"].double().exp(), sum(others) / len(others), rtol=1e-4, atol=1e-6)
        assert not told["logits"].requires_grad
    for i, model in enumerate(models, 1):
        artifact = made[f"distill.{i}"]
        assert artifact.manifest.model.use == model["use"]
        assert 0 <= artifact.manifest.metrics["accuracy"] <= 1
        assert {"loss.ce", "loss.kl", "val.accuracy"} <= made.history(f"distill.{i}")[0].keys()


def test_two_way_the_teacher_goes_on_learning_from_its_student(teachers: Tables) -> None:
    students = [{"name": "big", "start": "teacher"}, {"name": "small", "model": SMALL}]
    stage = distill(students=students, objectives=["ce", {"use": "kl", "tau": 1.0}], source="peers", epochs=4, lr=0.02)
    made = run(recipe(teachers["resnet"], stage))
    before, after = weights(made["teacher"]), weights(made["distill.big"])
    assert before.keys() == after.keys()
    assert not torch.equal(before["linear.weight"], after["linear.weight"])
    assert made["distill.big"].manifest.parents["start.teacher"] == made["teacher"].key
    history = made.history("distill.small")
    assert history[-1]["loss.kl"] < history[0]["loss.kl"]
