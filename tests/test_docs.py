"""The recipes in docs/distillation.md are planned, and its tables say what the runs found."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
import tomllib
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from edgekd.artifact import ModelSpec
from edgekd.data.digits import digits
from edgekd.errors import RecipeError
from edgekd.models import build, save_state
from edgekd.pipeline import plan
from edgekd.recipe import parse_recipe
from edgekd.registry import names

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "distillation.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```toml\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
BASE: dict[str, Any] = {
    "version": 1,
    "name": "docs",
    "data": {"use": "digits", "size": 16},
    "teacher": {"model": {"use": "cifar-resnet", "depth": 20}, "epochs": 1},
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the page's recipes name: a pool without labels, a second data set, a teacher's weights, own code."""
    directory = tmp_path_factory.mktemp("docs")
    # Mirrored: neither may be in the main data's validation or test split.
    images = digits(16).train.images.permute(0, 2, 3, 1).numpy()[:200, :, ::-1]
    labels = digits(16).train.labels.numpy()[:200]
    for name, known in (("pool", np.full(200, -1)), ("other", labels)):
        splits = {"x_train": images[:150], "y_train": known[:150], "x_test": images[150:], "y_test": known[150:]}
        np.savez(directory / f"{name}.npz", **splits)
    save_state(build(ModelSpec(use="cifar-resnet", args={"depth": 32})), directory / "other.safetensors")
    [own] = re.findall(r"^```python\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
    (directory / "mine.py").write_text(own)
    return directory


def planned(block: str, files: Path, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    monkeypatch.chdir(files)
    monkeypatch.syspath_prepend(str(files))
    try:
        return plan(parse_recipe({**BASE, **tomllib.loads(block)})).steps
    finally:
        sys.modules.pop("mine", None)


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_every_recipe_of_the_page_is_planned(number: int, files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = planned(BLOCKS[number], files, monkeypatch)
    stages = tomllib.loads(BLOCKS[number])["stage"]
    students = sum(max(len(stage.get("students", [])), 1) for stage in stages)
    assert len([step for step in steps if step.stage.kind != "teacher"]) == students
    assert all(step.spec is not None for step in steps)


def test_a_recipe_that_is_wrong_would_be_noticed(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    [block] = [b for b in BLOCKS if '{ use = "attention"' in b]
    with pytest.raises(Exception, match="no module 'layer4' to tap"):
        planned(block.replace('"layer3"', '"layer4"'), files, monkeypatch)


TAPS = {"student": "layer2", "teacher": "layer2"}
HINT = {"use": "hint", **TAPS}
ADVERSARIAL = {"use": "kl", "input": "adversarial"}
PEERS = [{"model": "cifar-resnet"}, {"model": "cifar-resnet"}]
TEACHER = {"model": {"use": "cifar-resnet", "depth": 8}, "epochs": 1}
SOME = {**TEACHER, "classes": ["0", "1", "2"]}
WIDE = {"use": "cifar-resnet", "width": 8}
POOL = {"use": "npz", "file": "pool.npz"}


@pytest.mark.parametrize(
    ("stage", "more", "said"),
    [
        ({"source": "cached", "objectives": [HINT]}, {}, "gives logits only"),
        ({"source": "teacher-free", "objectives": [HINT]}, {}, "gives logits only"),
        ({"model": None, "students": PEERS, "source": "peers", "objectives": [HINT]}, {}, "gives logits only"),
        ({"source": "cached"}, {"data": {**BASE["data"], "augment": "cutmix"}}, "has not seen the images"),
        ({"source": "cached", "unlabelled": POOL}, {}, "has not seen the further images"),
        ({"source": "cached", "mix": [{**POOL, "file": "other.npz"}]}, {}, "has not seen the further images"),
        ({"source": {"use": "cached", "of": {"use": "ensemble", "combine": "random"}}}, {}, "answers anew each time"),
        ({"source": "frozen"}, {"teacher": [TEACHER, TEACHER]}, "takes one teacher, got 2"),
        ({"source": "frozen"}, {"teacher": SOME}, "does not know all classes"),
        (
            {"source": {"use": "ensemble", "combine": "accuracy"}},
            {"teacher": {"model": {"use": "cifar-resnet", "depth": 32}, "weights": "other.safetensors"}},
            "may have been trained on the validation images",
        ),
        ({"source": {"use": "ensemble", "combine": "random"}}, {"teacher": [TEACHER, SOME]}, "that know all classes"),
        (
            {"source": {"use": "ensemble", "combine": "source"}},
            {"teacher": [TEACHER, TEACHER]},
            "2 teachers for 1",
        ),
        ({"objectives": [{"use": "pkt", "weight": {"use": "disagreement"}}]}, {}, "one number for the whole batch"),
        ({"objectives": ["ce"], "unlabelled": POOL}, {}, "every objective looks at labels"),
        ({"patience": 3}, {"data": {**BASE["data"], "validation": 0.0}}, "no validation split"),
        ({"objectives": [{"use": "kl", "tau": {"use": "linear", "start": 4.0, "end": 0.0}}]}, {}, "can become 0"),
        ({"objectives": [{"use": "kl", "weight": {"use": "linear", "epochs": 5}}]}, {}, "the training has 1"),
        ({"model": WIDE, "objectives": [{"use": "fsp", **{k: ["layer1", "layer2"] for k in TAPS}}]}, {}, "channels"),
        ({"objectives": [{"use": "classifier-reuse", "teacher": "layer3"}]}, {}, "no module 'projector'"),
        ({"use": "fuse", "model": None}, {"data": {**BASE["data"], "validation": 0.0}}, "no validation split"),
        ({"attack": {"use": "fgsm"}}, {}, "no objective looks at"),
        ({"objectives": [ADVERSARIAL]}, {}, "no attack makes it"),
    ],
)
def test_what_does_not_go_together_is_said_before_anything_runs(
    stage: dict[str, Any], more: dict[str, Any], said: str, files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(files)
    whole = {"use": "distill", "model": {"use": "cifar-resnet", "depth": 8}, "epochs": 1, **stage}
    last = {key: value for key, value in whole.items() if value is not None}
    before = [{"use": "distill", "epochs": 1}] if last["use"] == "fuse" else []
    with pytest.raises(RecipeError, match=said) as raised:
        plan(parse_recipe({**BASE, **more, "stage": [*before, last]}))
    assert all(problem.where.startswith(f"stage[{len(before)}]") for problem in raised.value.problems)


def test_the_page_tells_of_every_objective_source_and_rule() -> None:
    for kind in ("objectives", "teachers", "rules"):
        assert [name for name in names(kind) if f"`{name}`" not in PAGE] == []


@pytest.fixture(scope="module")
def table() -> ModuleType:
    """The script that makes the tables."""
    file = ROOT / "benchmarks" / "distillation_table.py"
    spec = importlib.util.spec_from_file_location("distillation_table", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def row(method: str, seed: int, accuracy: float, **more: Any) -> dict[str, Any]:
    return {"method": method, "seed": seed, "accuracy": accuracy, "seconds": 100.0, "macs": 12239488, "cpu": "a",
            "threads": 2, **more}  # fmt: skip


def test_the_screen_as_a_table(table: ModuleType) -> None:
    rows = [row("labels", 0, 0.78), row("kl", 0, 0.815, seconds=210.0), row("byot", 0, 0.75, cpu="b")]
    lines = table.screen_table(rows).splitlines()
    assert lines[2:5] == [
        "| kl | 81.50 % | +3.50 | – | 12.2 M | 2.10× |",
        "| labels | 78.00 % | – | −3.50 | 12.2 M | 1.00× |",
        "| byot | 75.00 % | −3.00 | −6.50 | 12.2 M | – |",
    ]
    assert lines[6].startswith("Not measured yet: `label-smoothing`, ")
    assert lines[6].count("`") == 2 * (len(table.METHODS) - 3)
    assert table.screen_table([]) == "Not measured yet."


def test_the_final_runs_as_a_table(table: ModuleType) -> None:
    accuracies = {"labels": (0.88, 0.882, 0.884), "kl": (0.890, 0.893, 0.896)}
    rows = [row(method, seed, a) for method, found in accuracies.items() for seed, a in enumerate(found)]
    # Gaps 1.0, 1.1 and 1.2 points: 1.1 +- 4.3027 (t, 2 degrees of freedom, 97.5 %) * 0.1 / sqrt(3).
    assert table.final_table([*rows, row("dkd", 0, 0.9)]).splitlines()[2:] == [
        "| dkd | 1 | 90.00 % | – | – |",
        "| kl | 3 | 89.30 ± 0.30 % | +1.10 \\[+0.85, +1.35\\] | – |",
        "| labels | 3 | 88.20 ± 0.20 % | – | −1.10 \\[−1.35, −0.85\\] |",
    ]
    assert table.final_table([]) == "Not measured yet."


def test_tables_are_filled_into_a_page(table: ModuleType, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "<!-- table:screen -->\nold\n<!-- /table:screen -->\n<!-- table:final --><!-- /table:final -->\nend\n"
    )
    (tmp_path / "distillation_screen.json").write_text(json.dumps({"runs": [row("kl", 0, 0.8)]}))
    for _ in range(2):  # again, over what is there
        table.show_tables(page, tmp_path)
        text = page.read_text()
        assert "old" not in text
        assert text.count("| kl | 80.00 % | – | – | 12.2 M | – |") == 1
        assert text.endswith("<!-- table:final -->\n\nNot measured yet.\n\n<!-- /table:final -->\nend\n")
    page.write_text("nothing")
    with pytest.raises(SystemExit, match="has no markers"):
        table.show_tables(page, tmp_path)


def test_the_page_has_the_markers() -> None:
    for name in ("screen", "final"):
        assert PAGE.index(f"<!-- table:{name} -->") < PAGE.index(f"<!-- /table:{name} -->")
