"""What a user can get wrong about teachers, students, pools and phases: `edgekd check` finds it before training."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_strategies import KL, SMALL, distill, recipe, run
from wrong_strategies import CE_ONLY, NORMALISED, OTHER, TEACHER, WRONG, ensemble, hint, knows

from edgekd.artifact import Artifact
from edgekd.recipe import parse_recipe, to_toml
from edgekd.registry import unregister

Call = Callable[..., Any]


def checked(table: dict[str, Any], edgekd: Call) -> tuple[int, list[str], list[str]]:
    """Exit code of `edgekd check`, its errors, and their hints."""
    here = Path.cwd()
    (here / "recipe.toml").write_text(to_toml(parse_recipe(table)))
    done = edgekd("check", "recipe.toml", cwd=here)
    assert "Traceback" not in done.err
    assert done.out == ""
    assert not (here / "runs").exists()
    lines = done.err.splitlines()
    told = [line.strip() for line in lines if "problems" not in line and not line.strip().startswith("hint: ")]
    errors = [line.removeprefix("error: ") for line in told if line]
    return done.code, errors, [line.strip() for line in lines if line.strip().startswith("hint: ")]


@pytest.mark.parametrize("name", WRONG)
def test_check_finds(name: str, edgekd: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    table, where, what, hint_text = WRONG[name]
    code, errors, hints = checked(table, edgekd)
    assert code == 2
    assert len(errors) == 1, errors
    assert errors[0].startswith(f"{where}"), errors
    assert what in errors[0]
    [said] = hints
    assert hint_text in said


def test_accuracy_of_a_teacher_that_may_have_seen_the_validation_images(teachers: Any, edgekd: Call) -> None:
    from_elsewhere = [TEACHER, teachers["resnet"]]
    code, [error], [said] = checked(recipe(from_elsewhere, distill(source=ensemble("accuracy"))), edgekd)
    assert code == 2
    assert error.startswith("stage[0].source.combine: teacher 2 may have been trained on the validation images")
    assert "held_out = true" in said


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Artifact]:
    """Teachers of other runs: images of another size, of other classes, normalised otherwise, and one that fits."""
    data: dict[str, dict[str, Any]] = {
        "size": {"size": 8},
        "classes": {"use": "spelt-digits"},
        "normalised": {"normalize": {"mean": [0.1], "std": [0.9]}},
        "some": {"names": ["1", "2"], **NORMALISED},
    }
    place = tmp_path_factory.mktemp("elsewhere")
    return {
        name: run(recipe(TEACHER, distill(objectives=CE_ONLY), data=own), place / name)["teacher"]
        for name, own in data.items()
    }


@pytest.mark.parametrize(
    ("name", "what", "hint_text"),
    [
        ("size", "was made for images of 1x8x8, the data have 1x16x16", "resize"),
        ("classes", "knows the class 'zero', the data do not", "known: 0, 1"),
        ("normalised", "was trained with another normalisation", "data.normalize = { mean = [0.1], std = [0.9] }"),
    ],
)
def test_a_teacher_of_another_run_must_fit(
    elsewhere: dict[str, Artifact], edgekd: Call, name: str, what: str, hint_text: str
) -> None:
    table = recipe(TEACHER, distill(teacher=["teacher", str(elsewhere[name].path)], source="ensemble"))
    code, [error], [said] = checked(table, edgekd)
    assert code == 2
    assert error.startswith("stage[0].teacher: ")
    assert what in error
    assert hint_text in said


def test_a_start_of_another_run_must_have_the_same_classes(elsewhere: dict[str, Artifact], edgekd: Call) -> None:
    students = [{"model": SMALL}, {"start": str(elsewhere["some"].path)}]
    code, [error], [said] = checked(recipe(TEACHER, distill(students=students), data=NORMALISED), edgekd)
    assert code == 2
    assert error.startswith("stage[0].students[1].start: ")
    assert "other classes than the data" in error
    assert "same order" in said


def test_a_teacher_of_another_run_that_knows_some_classes_joins_an_ensemble(elsewhere: dict[str, Artifact]) -> None:
    both = ["teacher", str(elsewhere["some"].path)]
    made = run(recipe(TEACHER, distill(teacher=both, source="ensemble"), data=NORMALISED))
    assert made["distill"].manifest.parents["teacher.2"] == elsewhere["some"].key


def test_everything_is_told_at_once(edgekd: Call) -> None:
    students = [
        {"name": "a", "model": {"use": "cifar-resnet", "depth": 9}},
        {"name": "b", "model": SMALL, "objectives": [hint("layr2", "layer9"), {"use": "kl", "tau": -1}]},
        {"name": "c", "model": "nothing"},
    ]
    table = recipe(
        [TEACHER, knows("1", "eleven")],
        distill(teacher=["nobody", "noone"]),
        distill(students=students, teacher="teacher"),
        distill(
            source="frozn",
            teacher="teacher",
            objectives=["ce", hint("layer2", "layer9")],
            unlabelled={**OTHER, "size": 8},
        ),
        distill(teacher="teacher"),
        {"use": "fuse", "epochs": 1, "teacher": "teacher", "objectives": KL},
        {"use": "average"},
        data={"validation": 0},
    )
    code, errors, _ = checked(table, edgekd)
    assert code == 2
    places = [error.split(": ")[0] for error in errors]
    assert places == [
        "teacher[1].classes",
        "stage[0].teacher",
        "stage[0].teacher",
        "stage[1].students[0].model.depth",
        "stage[1].students[2].model",
        "stage[2].unlabelled",
        "stage[2].source",
        "stage[2].objectives[1].teacher",
        "stage[4]",
        "stage[5].members",
    ]


def test_wrong_objectives_are_told_together(edgekd: Call) -> None:
    objectives = [hint("layr2", "layer9"), {"use": "kll"}, {"use": "kl", "weight": -1}, {"use": "kl", "tau": -1}]
    _, errors, _ = checked(recipe(TEACHER, distill(objectives=objectives)), edgekd)
    assert sorted(e.split(": ")[0] for e in errors) == [
        "stage[0].objectives[1]",
        "stage[0].objectives[2].weight",
        "stage[0].objectives[3].tau",
    ]
    _, errors, _ = checked(recipe(TEACHER, distill(objectives=[hint("layr2", "layer9"), hint("no", "layer2")])), edgekd)
    assert [e.split(": ")[0] for e in errors] == [
        "stage[0].objectives[0].student",
        "stage[0].objectives[1].student",
        "stage[0].objectives[0].teacher",
    ]


def test_an_objective_of_ones_own_that_fails_is_told(edgekd: Call) -> None:
    Path("own_loss.py").write_text(
        "from torch import nn\nfrom edgekd.registry import register\n\n\n"
        "@register('objectives', 'own-wrong')\nclass Wrong(nn.Module):\n"
        "    def forward(self, student, teacher, batch):\n"
        "        return (student['logits'] - teacher['features']).square().mean()\n"
    )
    table = {**recipe(TEACHER, distill(objectives=["ce", "own-wrong"])), "plugins": ["own_loss.py"]}
    try:
        code, [error], _ = checked(table, edgekd)
    finally:
        unregister("objectives", "own-wrong")
    assert code == 2
    assert error == "stage[0].objectives: the loss of two blank images fails: KeyError: 'features'"
