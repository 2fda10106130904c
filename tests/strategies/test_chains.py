"""Generations, assistants, fleets, ensembles at deployment and the fusion phase, through the recipe."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from tiny_strategies import KL, RESNET, SMALL, answers, distill, recipe, run, weights

import edgekd
from edgekd.artifact import Artifact
from edgekd.data import load
from edgekd.pipeline import plan
from edgekd.recipe import DataSpec, parse_recipe
from edgekd.tasks import Classification

Tables = dict[str, dict[str, Any]]
MIDDLE = {**SMALL, "width": 6}


def test_born_again_generations_each_teach_the_next(teachers: Tables) -> None:
    generations = [distill(), distill(teacher="distill"), distill(teacher="distill-2")]
    made = run(recipe(teachers["resnet"], *generations))
    chain = ["teacher", "distill", "distill-2", "distill-3"]
    for before, after in itertools.pairwise(chain):
        assert made[after].manifest.parents == {"teacher": made[before].key}
    assert made["distill-2"].manifest.model == made["distill"].manifest.model
    assert not torch.equal(weights(made["distill"])["linear.weight"], weights(made["distill-2"])["linear.weight"])


def test_a_teacher_assistant_stands_between_and_an_ensemble_of_generations_ends_it(teachers: Tables) -> None:
    assistant = distill(model=MIDDLE)
    last = distill(model=SMALL, teacher=["teacher", "distill"], source="ensemble")
    made = run(recipe(teachers["resnet"], assistant, distill(teacher="distill"), last))
    assert made["distill"].manifest.model.args["width"] == 6
    assert made["distill-2"].manifest.parents == {"teacher": made["distill"].key}
    assert made["distill-3"].manifest.parents == {"teacher": made["teacher"].key, "teacher.2": made["distill"].key}


def test_a_later_stage_goes_on_from_the_stage_it_names(teachers: Tables) -> None:
    fleet = distill(students=[{"name": "a", "model": SMALL}, {"name": "b", "model": MIDDLE}])
    on = {"use": "distill", "epochs": 1, "after": "distill.b", "teacher": "distill.a"}
    made = run(recipe(teachers["resnet"], fleet, on))
    assert made["distill-2"].manifest.parents == {"source": made["distill.b"].key, "teacher": made["distill.a"].key}
    assert made["distill-2"].manifest.model.args["width"] == 6


def test_a_student_of_a_fleet_is_the_student_trained_alone(teachers: Tables) -> None:
    models = {"s": SMALL, "mobile": {"use": "mobilenet", "width": 0.25}}
    training = {"objectives": ["ce", "kl", "pkt"], "epochs": 2, "ema": 0.9, "clip_norm": 1.0}
    students = [{"name": name, "model": model} for name, model in models.items()]
    mixed = {"data": {"augment": ["crop-flip", "mixup"]}}
    fleet = run(recipe(teachers["resnet"], distill(students=students, **training), **mixed))
    assert [name for name in fleet.artifacts if name != "teacher"] == ["distill.s", "distill.mobile"]
    for name, model in models.items():
        alone = run(recipe(teachers["resnet"], distill(model=model, **training), **mixed), f"alone-{name}")
        expected, found = weights(alone["distill"]), weights(fleet[f"distill.{name}"])
        assert all(torch.equal(value, found[key]) for key, value in expected.items())
        assert fleet[f"distill.{name}"].manifest.metrics == alone["distill"].manifest.metrics
        own = [{k: v for k, v in r.items() if k.startswith(("loss", "val"))} for r in fleet.history(f"distill.{name}")]
        assert own == [{k: r[k] for k in own[0]} for r in alone.history()]


def test_students_of_one_kind_begin_apart(teachers: Tables) -> None:
    peers = {"objectives": ["ce", {"use": "kl", "tau": 1.0}], "source": "peers", "lr": 1e-9}
    made = run(recipe(teachers["resnet"], distill(students=[{"model": SMALL}, {"model": SMALL}], **peers)))
    one, other = weights(made["distill.1"]), weights(made["distill.2"])
    assert not torch.allclose(one["linear.weight"], other["linear.weight"], atol=1e-2)


def test_each_student_of_a_fleet_may_have_objectives_of_its_own(teachers: Tables) -> None:
    hint = {"use": "hint", "student": "layer2", "teacher": "layer2"}
    students = [{"name": "plain", "model": SMALL, "objectives": ["ce"]}, {"name": "taught", "model": SMALL}]
    made = run(recipe(teachers["resnet"], distill(students=students, objectives=["ce", "kl", hint])))
    assert [k for k in made.history("distill.plain")[0] if k.startswith("loss.")] == ["loss.ce"]
    assert [k for k in made.history("distill.taught")[0] if k.startswith("loss.")] == [
        "loss.ce",
        "loss.kl",
        "loss.hint",
    ]


def test_a_fleet_that_was_killed_goes_on_where_it_was(teachers: Tables, monkeypatch: pytest.MonkeyPatch) -> None:
    table = recipe(teachers["resnet"], distill(students=[{"model": SMALL}, {"model": MIDDLE}], epochs=3))
    whole = run(table, "whole")
    killed(table, 2)
    resumed = run(table, "cut")
    assert any(e["event"] == "resume" and e["epoch"] == 2 for e in resumed.events)
    for name in ("distill.1", "distill.2"):
        expected, found = weights(whole[name]), weights(resumed[name])
        assert all(torch.equal(value, found[key]) for key, value in expected.items())


class Killed(BaseException):
    """What ends a run at once."""


def killed(table: dict[str, Any], epochs: int) -> None:
    """Run until so many epochs of the last stage are done."""
    done = [0]

    def stop(event: dict[str, Any]) -> None:
        if event["event"] == "epoch":
            done[0] += 1
            if done[0] == epochs:
                raise Killed

    planned = plan(parse_recipe(table), Path("cut"))
    with pytest.raises(Killed):
        edgekd.run(table, directory="cut", until=planned.steps[-2].name, emit=stop)


def test_students_side_by_side_are_one_file_that_averages_them(teachers: Tables) -> None:
    stages = [distill(students=[{"model": SMALL}, {"model": MIDDLE}], objectives=KL), {"use": "average"}]
    table = recipe(teachers["resnet"], *stages)
    made = run(table)
    planned = plan(parse_recipe(table), Path("run"))
    edgekd.pipeline.run_steps(planned, lambda event: None)
    session = onnxruntime.InferenceSession(str(planned.artifact("export").file("model.onnx")))
    assert [i.name for i in session.get_inputs()] == ["image"]
    image = torch.randn(5, 1, 16, 16)
    [found] = session.run(None, {"image": image.numpy()})
    each = [answers(made[name], image) for name in ("distill.1", "distill.2")]
    assert not torch.allclose(each[0], each[1], atol=0.1)
    np.testing.assert_allclose(found, torch.stack(each).mean(dim=0).numpy(), rtol=1e-3, atol=1e-4)
    assert made["average"].manifest.metrics["parameters"] == sum(
        made[n].manifest.metrics["parameters"] for n in ("distill.1", "distill.2")
    )


def test_named_students_of_several_stages_can_be_averaged(teachers: Tables) -> None:
    stages = [distill(), distill(model=MIDDLE), {"use": "average", "members": ["distill", "distill-2"]}]
    made = run(recipe(teachers["resnet"], *stages))
    assert made["average"].manifest.parents == {
        "start.distill": made["distill"].key,
        "start.distill-2": made["distill-2"].key,
    }


def judged(artifact: Artifact) -> float:
    """Accuracy of an artifact's network on the validation split."""
    data = load(DataSpec.model_validate({"use": "tiny-digits"}), 0)
    images = (data.validation.images.float() / 255 - data.mean[0]) / data.std[0]
    return Classification().metrics(answers(artifact, images).numpy(), data.validation.labels.numpy())["accuracy"]


@pytest.mark.parametrize("average", ["swa", "soup", "none"])
def test_fusing_keeps_the_best_of_its_candidates_and_says_which(teachers: Tables, average: str) -> None:
    fuse = {"use": "fuse", "epochs": 3, "lr": 0.05, "average": average, "precision": "fp32"}
    made = run(recipe(teachers["resnet"], distill(objectives=KL, epochs=3, lr=0.05), fuse))
    document = json.loads(made["fuse"].file("fusion.json").read_text())
    found = {name: figures["accuracy"] for name, figures in document["candidates"].items()}
    assert list(found) == ["before", "last", *([] if average == "none" else [average])]
    kept = document["kept"]
    assert found[kept] == max(found.values())
    assert made["fuse"].manifest.metrics["kept"] == kept
    assert found["before"] == made["distill"].manifest.metrics["accuracy"]
    assert judged(made["fuse"]) == pytest.approx(found[kept])
    [said] = [e for e in made.events if e["event"] == "kept"]
    assert (said["stage"], said["kept"]) == ("fuse", kept)


def test_fusing_keeps_what_was_there_where_nothing_is_better(teachers: Tables) -> None:
    table = {**teachers["resnet"]}
    same = {"use": "distill", "epochs": 1, "lr": 1e-9, "after": "teacher", "precision": "fp32"}
    wild = {"use": "fuse", "epochs": 1, "lr": 30.0, "average": "none", "precision": "fp32"}
    made = run(recipe(table, same, wild))
    assert made["fuse"].manifest.metrics["kept"] == "before"
    before, after = weights(made["distill"]), weights(made["fuse"])
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_an_interrupted_fusion_ends_with_the_same_bits(teachers: Tables) -> None:
    fuse = {"use": "fuse", "epochs": 3, "lr": 0.05, "average": "swa", "precision": "fp32"}
    table = recipe(teachers["resnet"], distill(objectives=KL), fuse)
    whole = run(table, "whole")
    killed(table, 1 + 2)
    resumed = run(table, "cut")
    assert any(e["event"] == "resume" and e["stage"] == "fuse" for e in resumed.events)
    expected, found = weights(whole["fuse"]), weights(resumed["fuse"])
    assert all(torch.equal(value, found[key]) for key, value in expected.items())
    assert whole["fuse"].file("fusion.json").read_text() == resumed["fuse"].file("fusion.json").read_text()


def test_a_fusion_that_stops_early_averages_the_epochs_that_it_had(teachers: Tables) -> None:
    fuse = {"use": "fuse", "epochs": 6, "lr": 1e-9, "patience": 1, "average": "swa", "precision": "fp32"}
    made = run(recipe(teachers["resnet"], distill(objectives=KL), fuse))
    assert 1 < len(made.history("fuse")) < 6
    assert set(json.loads(made["fuse"].file("fusion.json").read_text())["candidates"]) == {"before", "last", "swa"}


def test_fusing_may_go_on_with_a_teacher(teachers: Tables) -> None:
    fuse = {"use": "fuse", "epochs": 1, "objectives": KL}
    made = run(recipe(teachers["resnet"], distill(model=RESNET), fuse))
    assert made["fuse"].manifest.parents == {"source": made["distill"].key, "teacher": made["teacher"].key}
    assert made.history("fuse")[0]["loss.kl"] > 0
