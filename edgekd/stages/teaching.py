"""Who teaches a stage's network and what for, checked before anything runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
from pydantic import BeforeValidator, Field
from torch import Tensor, nn

from ..artifact import Artifact, ModelSpec, digest, file_sha256
from ..attack import Attack, AttackSpec
from ..data import Dataset, Stream, augmentations
from ..data.augment import Mixture
from ..errors import ArtifactError, EdgekdError, Problem, UsageError
from ..learner import Learner, Student, objectives_of
from ..models import build, load_state, outputs
from ..precision import precision_of
from ..profile import Profile
from ..recipe import Component, ComponentField, Recipe, Training
from ..registry import source_digests
from ..teachers import Cached, Placed, source_of
from ..teachers.cached import differs

__all__ = ["Context", "Expert", "Heal", "Names", "Teaching", "cache_key", "expert_of", "experts_of", "healing_problems"]
__all__ += ["learner_problems", "load_network"]

#: One name, or a list of them.
Names = Annotated[
    list[str], BeforeValidator(lambda v: [v] if isinstance(v, str) else v, json_schema_input_type=list[str] | str)
]


class Teaching(NamedTuple):
    """What later stages carry over from a distillation."""

    objectives: list[Any]
    source: Component
    teacher: list[str] | None = None
    attack: AttackSpec | None = None


class Heal(Training):
    """Training that heals what a stage broke; what is left open is that of the last distillation."""

    epochs: int = Field(3, ge=0)
    lr: float = Field(0.05, gt=0)
    objectives: list[Any] = Field(default=[], description="as in distill; empty: those of the last distillation")
    source: ComponentField | None = Field(None, description="as in distill; default: that of the last distillation")
    teacher: Names | None = Field(None, description="as in distill; default: that of the last distillation")
    attack: AttackSpec | None = Field(None, description="as in distill; default: that of the last distillation")

    def after(self, distilled: Teaching) -> Heal:
        """The same, with what it leaves open taken from the last distillation."""
        update = {
            "objectives": self.objectives or distilled.objectives,
            "source": self.source or distilled.source,
            "teacher": self.teacher or distilled.teacher,
            "attack": self.attack or (None if self.objectives else distilled.attack),
        }
        return self.model_copy(update=update)


def teaching(heal: Heal) -> Teaching:
    """What a healing asks of teachers."""
    return Teaching(heal.objectives, heal.source or Component(use="frozen"), heal.teacher, heal.attack)


@dataclass(frozen=True)
class Expert:
    """A teacher as a plan knows it. `accuracy` is that on the validation split, None where it may have seen it."""

    spec: ModelSpec
    key: str
    classes: list[str]
    accuracy: float | None


@dataclass(frozen=True)
class Context:
    """What a plan knows when it checks a stage, before anything has run."""

    recipe: Recipe
    data: Dataset
    profiles: Sequence[Profile]
    teachers: Sequence[Expert]
    source: ModelSpec | None
    where: str
    starts: dict[str, ModelSpec]
    finished: bool = False  # the source is an ONNX file: no network that trains or can be exported
    scheme: str | None = None  # that the source is quantized by; None: float, or not known
    done: bool = False  # the artifact is there: what only running it needs does not matter


def load_network(artifact: Artifact) -> nn.Module:
    """The float network of an artifact. Raises ArtifactError when it holds another kind of weights."""
    if artifact.manifest.quantization is not None or artifact.manifest.kind == "export":
        raise ArtifactError(
            f"a {artifact.manifest.kind} artifact holds no float network",
            where=str(artifact.path),
            hint="use the stage before it",
        )
    network = build(artifact.manifest.model)
    load_state(network, artifact.file("model.safetensors"))
    return network


def experts_of(artifacts: Sequence[Artifact], run: Path) -> list[tuple[Expert, nn.Module]]:
    """Teachers from their artifacts, with their networks. Accuracies are those of teachers of this run."""
    # Where the run finds it, not where a link leads to: the trials of a search share their teachers.
    own = [a.path.parent.resolve() == run.resolve() for a in artifacts]
    experts = [expert_of(a) if o else replace(expert_of(a), accuracy=None) for a, o in zip(artifacts, own, strict=True)]
    return [(expert, load_network(a)) for expert, a in zip(experts, artifacts, strict=True)]


def expert_of(artifact: Artifact) -> Expert:
    """A teacher from its artifact."""
    manifest = artifact.manifest
    config = manifest.config
    # Weights from elsewhere may have been trained on what is the validation split here.
    apart = config.get("weights") is None or bool(config.get("held_out"))
    accuracy = manifest.metrics.get("accuracy") if apart else None
    return Expert(manifest.model, artifact.key, manifest.classes, accuracy)


def placed(experts: Sequence[tuple[Expert, nn.Module]], data: Dataset) -> list[nn.Module]:
    """Teachers' networks; several, or one of some classes only, with their place among the data's classes."""
    if len(experts) == 1 and experts[0][0].classes == data.classes:
        return [experts[0][1]]
    return [Placed(network, e.classes, data.classes, e.accuracy) for e, network in experts]


def cache_key(
    recipe: Recipe, data: Dataset, teachers: Sequence[str], of: Component, top: int | None, settings: Training
) -> dict[str, Any]:
    """What a teacher cache depends on, part by part; `teachers` are their keys.

    The precision is the one that `settings` come to on this machine. Raises UsageError where it has none such.
    """
    combination, augmentation = of.model_dump(mode="json"), [a.model_dump(mode="json") for a in recipe.data.augment]
    code = [file_sha256(Path(plugin)) for plugin in recipe.plugins if Path(plugin).is_file()]
    code += sorted(source_digests([combination, augmentation]))
    return {
        "teacher": list(teachers),
        "combination": combination,
        "data": digest([data.fingerprint, data.mean, data.std]),
        "augmentation": augmentation,
        "seed": recipe.seed,
        "top": top,
        "images": len(data.train),
        "precision": precision_of(settings),
        **({"code": code} if code else {}),
    }


def learner_of(
    students: Sequence[Student],
    teachers: Sequence[nn.Module],
    teaching: Teaching,
    data: Dataset,
    example: Tensor,
    images: int,
    where: str = "",
    tap: Callable[..., nn.Module] | None = None,
) -> Learner:
    """Students, teachers and objectives as one module. Raises UsageError or RecipeError."""
    attack = Attack(teaching.attack, data.mean, data.std) if teaching.attack is not None else None
    more = {} if tap is None else {"tap": tap}
    source = source_of(teaching.source, f"{where}.source".lstrip("."))
    return Learner.fleet(students, teachers, example=example, source=source, images=images, attack=attack, **more)


def healing_problems(spec: ModelSpec, heal: Heal, context: Context) -> list[Problem]:
    """What is wrong with healing a network by these objectives: found by putting the learner together once."""
    where = f"{context.where}.heal"
    if heal.epochs == 0:
        return []
    one = [("student", spec, heal.objectives, f"{where}.objectives")]
    return learner_problems(one, teaching(heal), heal, context, where)


def learner_problems(
    students: Sequence[tuple[str, ModelSpec, Sequence[Any], str]],
    teaching: Teaching,
    settings: Training,
    context: Context,
    where: str,
    streams: Sequence[Stream] = (),
) -> list[Problem]:
    """Put students (name, spec, objectives, place), teachers and objectives together on a blank image and collect what
    does not fit."""
    data, problems = context.data, _setting_problems(settings, context.data, where)
    try:
        teachers = placed([(e, build(e.spec)) for e in context.teachers], data)
        example = torch.zeros(2, *data.size)
        made = []
        several = bool(getattr(settings, "students", ()))
        for i, (name, spec, objectives, place) in enumerate(students):
            network = build(spec)
            model = f"{where}.students[{i}].model" if several else f"{where}.model"
            _check_answers(network, spec, example, len(data.classes), model)
            made.append(Student(network, objectives, name, place))
        try:
            source_of(teaching.source, f"{where}.source")
        except EdgekdError as error:
            problems += error.problems
            objectives_of(made, teachers[:1])  # tell at once what else is wrong
            return problems
        images = len(data.train) + sum(len(stream.data.train) for stream in streams)
        learner = learner_of(made, teachers, teaching, data, example, images, where)
        problems += [p for objectives in learner.weighted for p in objectives.too_long(settings.epochs)]
        problems += _input_problems(learner, settings, context, where)
        if not problems:
            _try_step(learner, example, _last_labels(data, streams), where)
    except EdgekdError as error:
        problems += [_placed(problem, where) for problem in error.problems]
    return list(dict.fromkeys(problems))


def _setting_problems(settings: Training, data: Dataset, where: str) -> list[Problem]:
    if settings.epochs == 0:
        return []
    problems = []
    try:
        precision_of(settings)
    except EdgekdError as error:
        problems += [_placed(problem, where) for problem in error.problems]
    if settings.patience is not None and not len(data.validation):
        what = "there is no validation split to judge by"
        problems.append(Problem(f"{where}.patience", what, "data.validation = 0.1"))
    return problems


def _last_labels(data: Dataset, streams: Sequence[Stream]) -> dict[str, int]:
    """The largest label that each head will meet."""
    last = {head: int(labels.max()) for head, labels in data.train.targets.items() if len(labels)}
    for stream in streams:
        if stream.labelled:
            last[stream.head] = max(last.get(stream.head, 0), len(stream.data.classes) - 1)
    return {**last, "logits": len(data.classes) - 1}


def _try_step(learner: Learner, example: Tensor, last: dict[str, int], where: str) -> None:
    """Compute the loss once. Raises UsageError where an objective cannot, which may be a user's own."""
    rows = torch.arange(len(example))
    labels = {head: torch.full_like(rows, label) for head, label in last.items()}
    batch = {"image": example, "label": labels.pop("logits"), "labels": labels, "index": rows, "view": 0}
    batch |= {"epoch": 0.0, "epochs": 1}
    try:
        with torch.no_grad():
            learner.eval()(batch)
    except EdgekdError:
        raise
    except Exception as error:
        first = (str(error).splitlines() or [""])[0]
        raise UsageError(
            f"the loss of two blank images fails: {type(error).__name__}: {first}",
            where=f"{where}.objectives",
            hint="do these objectives suit what student and teacher give?",
        ) from error


def _input_problems(learner: Learner, settings: Training, context: Context, where: str) -> list[Problem]:
    problems = []
    source = learner.source
    mixtures = _mixtures(context.recipe)
    for place in _told_by_labels(learner) if mixtures else ():
        what = f"{mixtures[0]} mixes the labels of the head 'logits', not this head's"
        problems.append(Problem(f"{place}.on", what, "an objective that asks a teacher, or leave out the mixture"))
    if isinstance(source, Cached):
        if mixtures:
            what = f"a cached teacher has not seen the images that {mixtures[0]} makes"
            problems.append(Problem(f"{where}.source", what, "use source = 'frozen', or leave out the mixture"))
        problems += _cache_problems(source, settings, context, where)
    asked = any("adversarial" in o.inputs for o in learner.weighted)
    if asked and learner.attack is None:
        what = "objectives want adversarial input, and no attack makes it"
        problems.append(Problem(f"{where}.attack", what, 'attack = { use = "pgd" }'))
    if learner.attack is not None and not asked:
        what = "no objective looks at what the attack makes"
        problems.append(Problem(f"{where}.attack", what, 'input = "adversarial" in an objective'))
    return problems


def _mixtures(recipe: Recipe) -> list[str]:
    try:
        return [type(a).__name__ for a in augmentations(recipe.data) if isinstance(a, Mixture)]
    except EdgekdError:  # told by the plan
        return []


def _told_by_labels(learner: Learner) -> Iterator[str]:
    """The places of objectives on labels of other heads than `logits`."""
    for one in learner.weighted:
        for place, head, objective in zip(one.places, one.heads, one.modules_list, strict=True):
            if head != "logits" and not getattr(objective, "needs_teacher", True):
                yield place


def _cache_problems(source: Cached, settings: Training, context: Context, where: str) -> Iterator[Problem]:
    """What lies already in the directory that a recipe names."""
    if source.directory is None:
        return
    keys = [expert.key for expert in context.teachers]
    wanted = cache_key(context.recipe, context.data, keys, source.of, source.top, settings)
    other = differs(source.directory, wanted)
    if other:
        what = f"this teacher cache was made with another {', '.join(other)}"
        yield Problem(f"{where}.source.directory", what, "name another directory, or leave it out")


def _check_answers(network: nn.Module, spec: ModelSpec, example: Tensor, classes: int, where: str) -> None:
    try:
        with torch.no_grad():
            logits = outputs(network.eval()(example))["logits"]
    except UsageError as error:
        raise UsageError(error.problem.what, where=error.problem.where or where, hint=error.problem.hint) from error
    except Exception as error:  # the user's network, or one whose arguments do not suit these images
        first = (str(error).splitlines() or [""])[0]
        raise UsageError(
            f"{spec.use} fails on images {list(example.shape)}: {type(error).__name__}: {first}",
            where=where,
            hint="does it take images of this size and number of channels?",
        ) from error
    if logits.shape != (len(example), classes):
        raise UsageError(
            f"{spec.use} gives {list(logits.shape)} for {len(example)} images, expected {[len(example), classes]}",
            where=where,
            hint=f"the data has {classes} classes; edgekd passes num_classes to a function that takes it",
        )


def _placed(problem: Problem, where: str) -> Problem:
    if problem.where.startswith(where):
        return problem
    return Problem(f"{where}.{problem.where}".rstrip("."), problem.what, problem.hint)
