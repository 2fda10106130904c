"""What a plan finds wrong with a stage before anything runs, and what it takes from profiles and from distillation."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from tiny_stages import HINT, RESNET, TAUGHT, made_recipe
from torch import Tensor, nn

from edgekd.artifact import ModelSpec
from edgekd.data import Dataset
from edgekd.errors import Problem
from edgekd.models import save_state, specify
from edgekd.profile import Profile
from edgekd.recipe import Component, Training
from edgekd.stages import Context, Distill, Prune, Quantize, Teacher
from edgekd.stages.teaching import Expert, Teaching, learner_problems

FROZEN = Component(use="frozen")
NOTHING = Teaching(["ce"], FROZEN)


def spec(width: int = 8, classes: int = 10, **more: Any) -> ModelSpec:
    args = {"depth": 8, "width": width, "num_classes": classes, **more}
    return specify("cifar-resnet", args, classes=10, size=[1, 16, 16], where="model")


def expert(made: ModelSpec) -> Expert:
    return Expert(made, "key", [f"digit {d}" for d in range(10)], None)


def problems_of(made: ModelSpec, objectives: list[Any], context: Context, source: str = "frozen") -> list[Problem]:
    one = [("student", made, objectives, f"{context.where}.objectives")]
    return learner_problems(
        one, Teaching(objectives, Component(use=source)), Training(epochs=1), context, context.where
    )


class Eleven(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(256, 11)

    def forward(self, image: Tensor) -> Tensor:
        return self.head(image.flatten(1))


@pytest.fixture
def own(monkeypatch: pytest.MonkeyPatch) -> str:
    """A user's module with networks that do not suit the data."""
    module = ModuleType("own_networks")
    module.eleven = Eleven  # type: ignore[attr-defined]
    module.wide = lambda: nn.Sequential(nn.Flatten(), nn.Linear(999, 10))  # type: ignore[attr-defined]
    module.pair = lambda: Pair()  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "own_networks", module)
    return "own_networks"


class Pair(Eleven):
    def forward(self, image: Tensor) -> Any:
        return super().forward(image), 1


@pytest.fixture
def context(dataset: Dataset, cpu: Profile) -> Any:
    def make(**changes: Any) -> Context:
        defaults = {
            "recipe": made_recipe(),
            "data": dataset,
            "profiles": [cpu],
            "teachers": [expert(spec(16))],
            "source": spec(),
            "where": "stage[2]",
            "starts": {},
        }
        return Context(**{**defaults, **changes})

    return make


def distill(**config: Any) -> Distill:
    return Distill.model_validate({"model": RESNET, "epochs": 1, **config})


def test_what_fits_has_no_problems_and_gives_the_students_spec(context: Any) -> None:
    found, problems = distill(objectives=TAUGHT).check(context())
    assert problems == []
    assert found == spec()
    found, problems = Distill(epochs=1).check(context(source=spec(4)))
    assert (found, problems) == (spec(4), [])


@pytest.mark.parametrize(
    ("config", "where", "what", "hint"),
    [
        (
            {"objectives": [{**HINT, "student": "layer9"}]},
            "stage[2].objectives[0].student",
            "student: the network has no module 'layer9' to tap",
            "did you mean",
        ),
        (
            {"objectives": ["ce", {**HINT, "teacher": "linear"}]},
            "stage[2].objectives[1]",
            "'layer2' gives [2, 16, 8, 8], the teacher's 'linear' [2, 10]",
            "maps with maps",
        ),
        ({"objectives": [{"use": "kl", "tau": 0}]}, "stage[2].objectives[0].tau", "greater than 0", None),
        ({"objectives": ["kll"]}, "stage[2].objectives[0]", "no objectives called 'kll'", "did you mean 'kl'?"),
        ({"objectives": [{"use": "ce", "on": "aux"}]}, "stage[2].objectives[0].on", "no head 'aux'", "logits"),
        ({"source": "frozn"}, "stage[2].source", "no teachers called 'frozn'", "did you mean 'frozen'?"),
        ({"source": {"use": "cached", "views": 0}}, "stage[2].source.views", "greater than 0", None),
        (
            {"source": "cached", "objectives": TAUGHT},
            "stage[2].objectives[2].teacher",
            "logits only, not 'layer2'",
            "source = 'frozen'",
        ),
        ({"epochs": 0}, "stage[2].epochs", "must be at least 1", None),
        ({"model": {"use": "cifar-resnet", "depth": 9}}, "stage[2].model.depth", "6n+2", None),
        (
            {"model": {**RESNET, "in_channels": 3}},
            "stage[2].model",
            "cifar-resnet fails on images [2, 1, 16, 16]: RuntimeError",
            "number of channels",
        ),
        (
            {"model": {**RESNET, "num_classes": 7}},
            "stage[2].model",
            "cifar-resnet gives [2, 7] for 2 images, expected [2, 10]",
            "10 classes",
        ),
        (
            {"model": "own_networks:eleven"},
            "stage[2].model",
            "own_networks:eleven gives [2, 11] for 2 images, expected [2, 10]",
            "num_classes",
        ),
        ({"model": "own_networks:wide"}, "stage[2].model", "own_networks:wide fails on images", "this size"),
        ({"model": "own_networks:pair"}, "stage[2].model", "returned tuple, which has no logits", "forward may return"),
    ],
)
def test_what_does_not_fit_is_placed(
    context: Any, own: str, config: dict[str, Any], where: str, what: str, hint: str | None
) -> None:
    _, [problem] = distill(**config).check(context())
    assert problem.where == where
    assert what in problem.what
    assert (hint or "") in (problem.hint or "")


@pytest.mark.parametrize("mixture", ["mixup", "cutmix"])
def test_a_cached_teacher_and_mixtures_exclude_each_other(context: Any, mixture: str) -> None:
    mixed = context(recipe=made_recipe(augment=["crop-flip", mixture]))
    _, [problem] = distill(source="cached").check(mixed)
    assert problem == Problem(
        "stage[2].source",
        f"a cached teacher has not seen the images that {'Mixup' if mixture == 'mixup' else 'CutMix'} makes",
        "use source = 'frozen', or leave out the mixture",
    )
    assert problems_of(spec(), ["ce"], mixed, "cached") == []  # labels alone: no teacher is asked
    assert distill(source="cached").check(context(recipe=made_recipe(augment="crop-flip")))[1] == []
    assert distill().check(mixed)[1] == []


def test_a_teachers_classes_must_be_the_students(context: Any) -> None:
    [problem] = problems_of(spec(), ["kl"], context(teachers=[expert(spec(16, 7))]))
    assert problem.where == "stage[2].objectives"
    assert problem.what == "the student gives (2, 10) logits and the teacher (2, 7)"


@pytest.mark.parametrize("stage", [Prune, Quantize])
def test_healing_is_checked_at_its_place_and_only_where_it_happens(context: Any, stage: Any) -> None:
    config = {"target": {"macs": 0.5}} if stage is Prune else {}
    heal = {"epochs": 1, "objectives": [{**HINT, "teacher": "nothing"}]}
    _, [problem] = stage.model_validate({**config, "heal": heal}).check(context())
    assert problem.where == "stage[2].heal.objectives[0].teacher"
    assert stage.model_validate({**config, "heal": {**heal, "epochs": 0}}).check(context()) == (spec(), [])


def test_a_teacher_needs_weights_or_epochs(context: Any) -> None:
    nothing = context(teachers=[], source=None, where="teacher")
    _, [problem] = Teacher.model_validate({"model": RESNET}).check(nothing)
    assert (problem.where, problem.hint) == ("teacher", "set weights = 'FILE', or epochs = 10")
    _, [problem] = Teacher.model_validate({"model": RESNET, "epochs": 1, "objectives": ["ce", "kl"]}).check(nothing)
    assert problem.where == "teacher.objectives"
    assert "need a teacher" in problem.what
    with pytest.raises(ValidationError, match="at least 1 item"):
        Teacher.model_validate({"model": RESNET, "epochs": 1, "objectives": []})


def test_weights_of_another_network_are_told(context: Any, tmp_path: Any) -> None:
    torch.manual_seed(0)
    save_state(Eleven(), tmp_path / "other.safetensors")
    stage = Teacher.model_validate({"model": RESNET, "weights": str(tmp_path / "other.safetensors")})
    found, problems = stage.check(context(teachers=[], source=None, where="teacher"))
    assert found is None
    assert "teacher.weights" in problems[0].where


def test_stages_take_what_they_leave_open_from_profiles_and_distillation(cpu: Profile) -> None:
    wide = cpu.model_copy(update={"channel_multiple": 32})
    distilled = Teaching(TAUGHT, Component.model_validate({"use": "cached", "views": 3}))
    pruned = Prune.model_validate({"target": {"macs": 0.5}}).resolved([cpu, wide], distilled)
    assert pruned.channel_multiple == 32
    assert pruned.heal.objectives == TAUGHT
    assert pruned.heal.source == distilled.source
    own = {"target": {"macs": 0.5}, "channel_multiple": 4, "heal": {"objectives": ["ce"], "source": "frozen"}}
    kept = Prune.model_validate(own).resolved([cpu, wide], distilled)
    assert (kept.channel_multiple, kept.heal.objectives, kept.heal.source) == (4, ["ce"], FROZEN)
    quantized = Quantize().resolved([cpu], distilled)
    assert (quantized.scheme, quantized.heal.objectives) == ("x86-u8s8", TAUGHT)
    assert Quantize(scheme="trt-s8s8").resolved([cpu], distilled).scheme == "trt-s8s8"
    assert distill().resolved([cpu], distilled) == distill()


def test_schemes_are_known(context: Any, cpu: Profile) -> None:
    other = cpu.model_copy(update={"scheme": "trt-s8s8"})
    heal = {"epochs": 0}
    two = context(profiles=[cpu, other])
    auto = Quantize.model_validate({"heal": heal})
    assert auto.schemes([cpu, other, cpu]) == ["x86-u8s8", "trt-s8s8"]
    assert auto.check(two)[1] == []
    assert Quantize.model_validate({"heal": heal, "scheme": "trt-s8s8"}).check(two)[1] == []
    _, [problem] = Quantize.model_validate({"heal": heal, "scheme": "x86-u8s9"}).check(context())
    assert (problem.where, problem.hint) == ("stage[2].scheme", "did you mean 'x86-u8s8'?")


def test_a_quantized_network_depends_on_the_profiles_that_decide_about_it(cpu: Profile) -> None:
    def inputs(profile: Profile = cpu, **config: Any) -> dict[str, str]:
        return Quantize.model_validate({"heal": {"epochs": 0}, **config}).resolved([profile], NOTHING).inputs()

    slow = cpu.model_copy(update={"threads": 4})
    told = cpu.model_copy(update={"description": "another", "budgets": {"accuracy": {"min": 0.5}}})
    newer = cpu.model_copy(update={"opset": 20})
    assert set(inputs()) == {"profiles"}
    assert inputs() == inputs(told)
    assert inputs(slow) != inputs() != inputs(newer)
    # Without a measurement the device decides nothing; a backend's file has the opset of the profiles anyway.
    assert inputs(keep_float=False) == {}
    assert inputs(slow, keep_float=False, mixed={"max_drop": 0.1}) != inputs(keep_float=False, mixed={"max_drop": 0.1})
    elsewhere = {"backend": "onnxruntime", "keep_float": False}
    assert inputs(**elsewhere) == inputs(slow, **elsewhere) == {"opset": "18"}
    assert inputs(newer, **elsewhere) == {"opset": "20"}


def test_a_finished_run_stays_finished_on_another_machine(cpu: Profile, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = Quantize.model_validate({"heal": {"epochs": 0}})
    here = stage.resolved([cpu], NOTHING).inputs()
    monkeypatch.setattr("edgekd.stages.paying.not_here", lambda profile, environment: "another machine")
    assert stage.resolved([cpu], NOTHING).inputs() == here


def pruning(context: Context, **config: Any) -> list[Problem]:
    stage = {"channel_multiple": 2, "heal": {"epochs": 0}, **config}
    return Prune.model_validate(stage).check(context)[1]


class Untraceable(nn.Module):
    """It wants as many images as a batch of a plan's check has."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(256, 10)

    def forward(self, image: Tensor) -> Tensor:
        if len(image) == 1:
            raise ValueError("one image is not enough")
        return self.head(image.flatten(1))


def test_what_pruning_would_refuse_is_told_before_anything_is_trained(
    context: Any, own: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert pruning(context(), target={"macs": 0.5}, protected=["layer1"]) == []
    (unknown,) = pruning(context(), target={"latency": {"speedup": 2.0}}, protected=["layr1.*"])
    assert (unknown.where, unknown.what) == ("stage[2].protected", "no module matches 'layr1.*'")
    assert "layer1" in (unknown.hint or "")
    for measure in ("macs", "parameters", "size"):
        (far,) = pruning(context(), target={measure: 1e-4})
        assert far.where == f"stage[2].target.{measure}"
        assert far.what.startswith("0.0001 cannot be reached: at least 0.")
        nearest = float(far.what.split("at least ")[1].split(" ")[0])
        assert pruning(context(), target={measure: nearest}) == []
        assert pruning(context(), target={measure: nearest - 2e-4}) != []
    monkeypatch.setattr(sys.modules["own_networks"], "untraceable", Untraceable, raising=False)
    strange = specify("own_networks:untraceable", {}, classes=10, size=[1, 16, 16], where="model")
    (untraced,) = pruning(context(source=strange), target={"macs": 0.5})
    assert untraced.where == "stage[2]"
    assert "cannot trace this network" in untraced.what


def test_what_an_earlier_pruning_leaves_is_not_known_yet(context: Any) -> None:
    twice = made_recipe().model_copy(update={"stage": [Component(use="prune"), Component(use="prune")]})
    first, second = (context(recipe=twice, where=f"stage[{i}]") for i in range(2))
    assert pruning(first, target={"macs": 1e-4}) != []
    assert pruning(second, target={"macs": 1e-4}) == []
    assert pruning(context(source=spec().model_copy(update={"removed": ["layer1.0"]})), target={"macs": 1e-4}) == []


def test_a_pruning_that_is_done_needs_no_device(context: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgekd.stages.timing.not_here", lambda profile, environment: "it is elsewhere")
    latency = {"latency": {"speedup": 2.0}}
    (problem,) = pruning(context(), target=latency)
    assert problem.where == "stage[2].target.latency.profile"
    assert problem.what == "cannot be measured here: it is elsewhere"
    assert pruning(context(done=True), target=latency) == []
    (unknown,) = pruning(context(done=True), target={"latency": {"speedup": 2.0, "profile": "cpu-x68"}})
    assert "no profile 'cpu-x68'" in unknown.what
