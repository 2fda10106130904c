"""Several heads, a mix of data sets, unlabelled pools and learning without labels, through the recipe."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_strategies import KL, RESNET, SMALL, answers, distill, lessons, recipe, run, tiny_digits, watched, weights

from edgekd.artifact import Artifact
from edgekd.data import load
from edgekd.errors import RecipeError
from edgekd.pipeline import plan
from edgekd.recipe import DataSpec, parse_recipe
from edgekd.stages.teaching import load_network

Tables = dict[str, dict[str, Any]]

OWN = '''\
import torch
from torch import nn
from edgekd.data import Source, Split
from edgekd.models import Tapped
from edgekd.models.cifar_resnet import cifar_resnet
from tiny_strategies import tiny_digits


def digits_with_parity(every=6):
    """Digits whose second label says whether they are odd."""
    few = tiny_digits(every)
    def told(split):
        return Split(split.images, split.labels, {"parity": split.labels % 2})
    return Source(told(few.train), told(few.test), few.classes)


def parity():
    """Other digits, by whether they are odd."""
    few = tiny_digits(begin=1)
    def told(split):
        return Split(split.images, split.labels % 2)
    return Source(told(few.train), told(few.test), ["even", "odd"])


class TwoHeads(nn.Module):
    def __init__(self, width, num_classes):
        super().__init__()
        self.body = Tapped(cifar_resnet(8, width, in_channels=1, num_classes=num_classes), ["layer3"])
        self.parity = nn.Linear(4 * width, 2)

    def forward(self, x):
        found = self.body(x)
        return {"logits": found["logits"], "parity": self.parity(found["layer3"].mean(dim=(2, 3)))}


def two_heads(width: int = 4, num_classes: int = 10):
    return TwoHeads(width, num_classes)
'''


@pytest.fixture(autouse=True)
def _own(monkeypatch: pytest.MonkeyPatch) -> Any:
    Path("own_tasks.py").write_text(OWN)
    monkeypatch.setattr(sys, "path", [str(Path.cwd()), *sys.path])
    sys.modules.pop("own_tasks", None)
    yield
    sys.modules.pop("own_tasks", None)


def head(artifact: Artifact, name: str) -> float:
    """How often a head is right about whether a test image is odd."""
    data = load(DataSpec.model_validate({"use": "tiny-digits"}), 0)
    images = (data.test.images.float() / 255 - data.mean[0]) / data.std[0]
    with torch.no_grad():
        found = load_network(artifact).eval()(images)[name]
    return float((found.argmax(dim=1) == data.test.labels % 2).float().mean())


def test_objectives_name_the_head_they_train(teachers: Tables) -> None:
    teacher = {"model": {"use": "own_tasks:two_heads", "width": 8}, "objectives": ["ce", {"use": "ce", "on": "parity"}]}
    both = [*KL, {"use": "ce", "on": "parity"}, {"use": "kl", "on": "parity"}]
    student = {"use": "own_tasks:two_heads"}
    with lessons() as found:
        stage = distill(model=student, objectives=both, epochs=6, lr=0.05)
        made = run(recipe({**teacher, "epochs": 6}, stage, data={"use": "own_tasks:digits_with_parity", "every": 4}))
    assert found[0].teacher[0]["parity"].shape == found[0].students[0]["parity"].shape == (32, 2)
    assert torch.equal(found[0].batch["labels"]["parity"], found[0].batch["label"] % 2)
    assert {"loss.ce-0", "loss.kl-1", "loss.ce-2", "loss.kl-3"} <= made.history()[0].keys()
    assert head(made["teacher"], "parity") > 0.8
    assert head(made["distill"], "parity") > 0.65


def test_a_head_without_an_objective_stays_as_it_was(teachers: Tables) -> None:
    student = {"use": "own_tasks:two_heads"}
    data = {"use": "own_tasks:digits_with_parity"}
    objectives = ["ce", {"use": "ce", "on": "parity"}]
    without = run(
        recipe(teachers["resnet"], distill(model=student, objectives=["ce"], weight_decay=0.0), data=data), "a"
    )
    with_it = run(
        recipe(teachers["resnet"], distill(model=student, objectives=objectives, weight_decay=0.0), data=data), "b"
    )
    torch.manual_seed(0)
    from own_tasks import two_heads  # type: ignore[import-not-found]

    fresh = two_heads().state_dict()["parity.weight"]
    assert torch.equal(weights(without["distill"])["parity.weight"], fresh)
    assert not torch.equal(weights(with_it["distill"])["parity.weight"], fresh)


def test_a_further_data_set_trains_a_head_of_its_own(teachers: Tables) -> None:
    mix = [{"use": "own_tasks:parity", "batch": 16, "on": "parity"}]
    stage = distill(
        model={"use": "own_tasks:two_heads"},
        objectives=["ce", {"use": "ce", "on": "parity"}],
        mix=mix,
        epochs=6,
        lr=0.05,
    )
    batches: list[dict[str, Any]] = []
    with watched(lambda _, batch: batches.append(batch)):
        made = run(recipe(teachers["resnet"], stage))
    batch = batches[0]
    assert batch["source"].tolist() == [0] * 32 + [1] * 16
    assert (batch["label"] >= 0).tolist() == [True] * 32 + [False] * 16
    assert (batch["labels"]["parity"] >= 0).tolist() == [False] * 32 + [True] * 16
    history = made.history()
    assert history[-1]["loss.ce-1"] < 0.9 * history[0]["loss.ce-1"]


def test_each_data_set_of_a_mix_has_its_own_teacher(teachers: Tables) -> None:
    mix = [{"use": "tiny-digits", "begin": 1, "batch": 16}, {"use": "tiny-digits", "begin": 2, "batch": 8}]
    three = [teachers["resnet"], teachers["mobile"], {"model": SMALL, "epochs": 1}]
    source = {"use": "ensemble", "combine": "source"}
    with lessons() as found:
        made = run(recipe(three, distill(objectives=KL, mix=mix, source=source)))
    for lesson in found[::2]:
        assert torch.bincount(lesson.batch["source"]).tolist() == [32, 16, 8]
        for number, name in enumerate(("teacher", "teacher-2", "teacher-3")):
            rows = lesson.batch["source"] == number
            expected = answers(made[name], lesson.batch["image"][rows])
            torch.testing.assert_close(lesson.teacher[0]["logits"][rows], expected, rtol=1e-3, atol=1e-3)
    index = torch.cat([lesson.batch["index"] for lesson in found])
    assert index.max() < 3 * 240
    assert len(index.unique()) > 216  # each data set's rows have numbers of their own


def test_an_unlabelled_pool_is_for_teachers_objectives_only(teachers: Tables) -> None:
    pool = {"use": "tiny-digits", "begin": 3, "batch": 32}
    labels = distill(objectives=["ce"])
    taught = distill(objectives=["ce", {"use": "kl", "weight": 0.0}])
    batches: list[dict[str, Any]] = []
    with watched(lambda _, batch: batches.append(batch)):
        run(recipe(teachers["resnet"], distill(objectives=KL, unlabelled=pool)), "pool")
    assert all((b["label"][32:] == -1).all() and (b["label"][:32] >= 0).all() for b in batches)
    # Labels' loss is summed over labelled rows alone, however large the pool is; only batch norm sees the others.
    groups = {"use": "own_tasks:without_norms"}
    Path("own_tasks.py").write_text(OWN + WITHOUT_NORMS)
    alone = run(recipe(teachers["resnet"], distill(**{**labels, "model": groups})), "alone")
    beside = run(recipe(teachers["resnet"], distill(**{**taught, "model": groups}, unlabelled=pool)), "beside")
    for name, value in weights(alone["distill"]).items():
        torch.testing.assert_close(value, weights(beside["distill"])[name], rtol=1e-3, atol=1e-5)


WITHOUT_NORMS = """

def without_norms(num_classes=10):
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 7 * 7, num_classes)
    )
"""


@pytest.mark.parametrize("mixture", ["mixup", "cutmix"])
def test_mixed_images_keep_their_soft_labels_beside_a_pool_without_labels(teachers: Tables, mixture: str) -> None:
    few = tiny_digits(begin=3)
    nothing, images = np.full(len(few.train), -1), few.train.images.numpy()
    np.savez("pool.npz", x_train=images, y_train=nothing, x_test=images[:1], y_test=nothing[:1])
    pool = {"use": "npz", "file": "pool.npz", "layout": "NCHW", "batch": 16}
    further = {"use": "tiny-digits", "begin": 1, "batch": 8}
    other = {"use": "own_tasks:parity", "batch": 4, "on": "parity"}
    objectives = [*KL, {"use": "kl", "on": "parity"}]
    both = {"use": "own_tasks:two_heads", "width": 4}
    stage = distill(model=both, objectives=objectives, mix=[further, other], unlabelled=pool, epochs=2)
    batches: list[dict[str, Any]] = []
    with watched(lambda learner, batch: batches.append(batch) if learner.source is not None else None):
        run(recipe({"model": both, "epochs": 1}, stage, data={"augment": mixture}))
    for batch in batches:
        assert batch["target"].shape == (32 + 8 + 4 + 16, 10)
        torch.testing.assert_close(batch["target"].sum(dim=1), (batch["label"] >= 0).float())
        assert (batch["label"] >= 0).tolist() == [True] * 40 + [False] * 20
    # Rows of two classes are there, of the main data as of the further set: hard labels would have one each.
    mixed = torch.cat([(batch["target"] > 0).sum(dim=1)[:, None] for batch in batches], dim=1)
    assert (mixed[:32] == 2).any()
    assert (mixed[32:40] == 2).any()


def test_labels_of_a_further_head_cannot_be_mixed(teachers: Tables) -> None:
    both = {"model": {"use": "own_tasks:two_heads"}, "objectives": ["ce", {"use": "ce", "on": "parity"}]}
    stage = distill(model=both["model"], objectives=["ce", {"use": "kl", "on": "parity"}])
    table = recipe({**both, "epochs": 1}, stage, data={"use": "own_tasks:digits_with_parity"})
    plan(parse_recipe(table), Path("run"))
    table["data"]["augment"] = "cutmix"
    with pytest.raises(RecipeError) as raised:
        plan(parse_recipe(table), Path("run"))
    [problem] = raised.value.problems
    assert problem.where == "teacher.objectives[1].on"
    assert problem.what == "CutMix mixes the labels of the head 'logits', not this head's"
    assert "leave out the mixture" in (problem.hint or "")


def test_a_pool_whose_file_has_changed_is_read_anew(teachers: Tables) -> None:
    pool = {"use": "npz", "file": "pool.npz", "layout": "NCHW", "batch": 16}
    table = recipe(teachers["resnet"], distill(objectives=KL, unlabelled=pool))

    def learnt_from(begin: int) -> tuple[str, set[bytes]]:
        split = tiny_digits(begin=begin).train
        images, labels = split.images.numpy(), split.labels.numpy()
        np.savez("pool.npz", x_train=images, y_train=labels, x_test=images[:1], y_test=labels[:1])
        batches: list[dict[str, Any]] = []
        with watched(lambda _, batch: batches.append(batch)):
            made = run(table)
        seen = torch.cat([b["image"][32:] for b in batches]) if batches else torch.empty(0)
        return made["distill"].key, {image.numpy().tobytes() for image in seen}

    first, same, second = learnt_from(3), learnt_from(3), learnt_from(4)
    assert same == (first[0], set())
    assert first[0] != second[0]
    assert first[1]
    assert second[1]
    assert not first[1] & second[1]


def test_rows_of_which_the_teacher_is_not_sure_are_silent(teachers: Tables) -> None:
    Path("own_tasks.py").write_text(OWN + WITHOUT_NORMS)
    model = {"use": "own_tasks:without_norms"}
    # This teacher is never so sure.
    unsure = {"model": SMALL, "epochs": 1}

    def trained(place: str, begin: int, threshold: float) -> dict[str, torch.Tensor]:
        pool = {"use": "tiny-digits", "begin": begin, "batch": 32, "threshold": threshold}
        stage = distill(model=model, objectives=["ce", {"use": "kl", "tau": 1.0}], unlabelled=pool)
        return weights(run(recipe(unsure, stage), place)["distill"])

    silent, other_silent = trained("a", 3, 0.9999999), trained("b", 4, 0.9999999)
    assert all(torch.equal(value, other_silent[name]) for name, value in silent.items())
    loud, other_loud = trained("c", 3, 0.0), trained("d", 4, 0.0)
    assert not torch.allclose(loud["3.weight"], other_loud["3.weight"], atol=1e-4)


def test_a_threshold_asks_the_teacher_row_by_row(teachers: Tables) -> None:
    pool = {"use": "tiny-digits", "begin": 3, "batch": 32, "threshold": 0.9}
    with lessons() as found:
        made = run(recipe(teachers["resnet"], distill(objectives=KL, unlabelled=pool)))
    lesson = found[0]
    sure = lesson.teacher[0]["logits"].softmax(dim=1).amax(dim=1) >= 0.9
    assert 0 < int(sure[32:].sum()) < 32
    assert lesson.batch["threshold"].tolist() == pytest.approx([0.0] * 32 + [0.9] * 32)
    assert made.history()[0]["loss.kl"] > 0


def test_representations_are_learnt_without_labels_before_a_short_labelled_phase(teachers: Tables) -> None:
    seed = {"use": "seed", "student": "layer3", "teacher": "layer3", "queue": 64}
    pool = {"use": "tiny-digits", "begin": 3, "batch": 32}
    first = distill(objectives=[seed], unlabelled=pool, epochs=4, model=RESNET, keep="last", lr=0.1)
    labelled = {"use": "distill", "objectives": ["ce"], "epochs": 2, "lr": 0.03, "precision": "fp32"}
    batches: list[dict[str, Any]] = []
    with watched(lambda learner, batch: batches.append(batch) if learner.source is not None else None):
        made = run(recipe(teachers["resnet"], first, labelled))
    assert made["distill-2"].manifest.parents["source"] == made["distill"].key
    assert all((b["label"][32:] == -1).all() for b in batches)
    history = made.history()
    # In the first epoch the queue fills up, and among fewer images the right one is found more easily.
    assert history[-1]["loss.seed"] < history[1]["loss.seed"]
    scratch = run(recipe(teachers["resnet"], distill(**{**labelled, "model": RESNET})), "scratch")
    assert made["distill-2"].manifest.metrics["loss"] < scratch["distill"].manifest.metrics["loss"]
