"""What every stage works with: its sources, the data, and where the result goes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from pydantic import Field
from safetensors.torch import load_file
from torch import Tensor, nn

from .. import quant
from ..artifact import Artifact, Manifest, ModelSpec, Preprocessing, TensorInfo, digest, finish, writing
from ..bench import environment
from ..data import Dataset, augmentations, batches
from ..data.augment import Mixture
from ..errors import ArtifactError, EdgekdError, Problem, RecipeError, UsageError
from ..learner import Learner, parse_objectives
from ..models import Tapped, build, count, load_state, outputs, save_state
from ..profile import Profile
from ..quant import scheme_named
from ..recipe import Component, ComponentField, Recipe, Training
from ..registry import bind
from ..tasks import Task
from ..teachers import Cached
from ..train import METRICS, Fit, Job, autocast, fit

__all__ = ["Context", "Heal", "Stage", "Teaching", "Workspace", "healing_problems", "load_network", "load_prepared"]


class Teaching(NamedTuple):
    """Objectives and teacher source: what later stages carry over from a distillation."""

    objectives: list[Any]
    source: Component


class Heal(Training):
    """Training that heals what a stage broke; objectives default to those of the last distillation."""

    epochs: int = Field(3, ge=0)
    lr: float = Field(0.05, gt=0)
    objectives: list[Any] = Field(default=[], description="as in distill; empty: those of the last distillation")

    source: ComponentField | None = Field(None, description="as in distill; default: that of the last distillation")

    def after(self, distilled: Teaching) -> Heal:
        """The same, with what it leaves open taken from the last distillation."""
        update = {"objectives": self.objectives or distilled.objectives, "source": self.source or distilled.source}
        return self.model_copy(update=update)


@dataclass(frozen=True)
class Context:
    """What a plan knows when it checks a stage, before anything has run."""

    recipe: Recipe
    data: Dataset
    profiles: Sequence[Profile]
    teacher: ModelSpec | None
    source: ModelSpec | None
    where: str


class Stage(Protocol):
    """A frozen pydantic config with these beside its fields."""

    kind: ClassVar[str]
    follows: ClassVar[tuple[str, ...]]

    def check(self, context: Context) -> tuple[ModelSpec | None, list[Problem]]:
        """The network that this stage will leave behind (as far as known) and what is wrong with the config."""

    def inputs(self) -> dict[str, str]:
        """Digests of files that the result depends on beside data and parents."""

    def resolved(self, profiles: Sequence[Profile], distilled: Teaching) -> Stage:
        """The same stage with every default from the profiles and from the last distillation written out."""

    def run(self, workspace: Workspace) -> Artifact: ...


@dataclass(frozen=True)
class Workspace:
    """One stage at work. `parents` maps roles (`source`, `teacher`) to artifacts."""

    recipe: Recipe
    data: Dataset
    task: Task
    profiles: Sequence[Profile]
    name: str
    key: str
    destination: Path
    parents: Mapping[str, Artifact]
    config: Mapping[str, Any]
    emit: Callable[[dict[str, Any]], None]

    @property
    def partial(self) -> Path:
        """Where checkpoints live until the artifact is complete."""
        return self.destination.parent / ".partial" / self.destination.name

    @property
    def example(self) -> Tensor:
        """Two real, normalised images [2, C, H, W] (one would let export fix the batch size)."""
        return next(self.calibration(2, 2))["image"]

    def calibration(self, images: int, batch: int = 64) -> Iterator[dict[str, Any]]:
        """Batches of training images without augmentation, drawn by the recipe's seed."""
        stream = batches(
            self.data.train,
            batch=min(batch, images),
            mean=self.data.mean,
            std=self.data.std,
            seed=self.recipe.seed,
            epoch=0,
        )
        for index, drawn in enumerate(stream):
            if index * min(batch, images) >= images:
                return
            yield drawn

    def learner(
        self,
        student: nn.Module,
        objectives: Sequence[Any],
        source: Component | None = None,
        *,
        tap: Callable[..., nn.Module] = Tapped,
    ) -> Learner:
        """The student with its objectives and, where they want one, the teacher artifact's network."""
        teacher = self.parents.get("teacher")
        learner = Learner.of(
            student,
            objectives=parse_objectives(objectives),
            teacher=load_network(teacher) if teacher is not None else None,
            example=self.example,
            source=source_of(source, "source"),
            tap=tap,
        )
        if isinstance(learner.source, Cached):
            assert teacher is not None
            self._fill(learner.source, teacher)
        return learner

    def _fill(self, source: Cached, teacher: Artifact) -> None:
        data, batch = self.data, self.recipe.data
        augment = [a.model_dump() for a in batch.augment]
        name = digest([teacher.key, data.fingerprint, data.mean, data.std, augment, self.recipe.seed])[:12]

        def stream(view: int) -> Iterator[dict[str, Any]]:
            return batches(
                data.train,
                batch=batch.batch,
                mean=data.mean,
                std=data.std,
                seed=self.recipe.seed,
                epoch=0,
                view=view,
                augment=augmentations(batch),
                shuffle=False,
                channels_last=True,
            )

        def progress(done: int, total: int) -> None:
            self.emit({"event": "cache", "stage": f"{self.name}: teacher cache", "done": done, "total": total})

        with autocast(Training()):
            source.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            source.fill(self.destination.parent / ".cache" / f"teacher-{name}", stream, len(data.train), progress)

    def train(
        self, learner: Learner, settings: Training, on_epoch: Callable[[int, Learner], None] | None = None
    ) -> Fit:
        """Run the one training loop, resuming what a killed run left in `partial`."""
        job = Job(
            name=self.name,
            data=self.data,
            task=self.task,
            settings=settings,
            batch=self.recipe.data.batch,
            augment=augmentations(self.recipe.data),
            seed=self.recipe.seed,
            directory=self.partial,
            emit=self.emit,
            on_epoch=on_epoch,
            trackers=self.recipe.trackers,
            project=self.recipe.name,
            log_directory=self.destination.parent / "trackers",
        )
        return fit(learner, job)

    def save(
        self,
        network: nn.Module,
        spec: ModelSpec,
        *,
        metrics: Mapping[str, Any],
        quantization: dict[str, Any] | None = None,
        documents: Mapping[str, Any] | None = None,
    ) -> Artifact:
        """Write the artifact: weights, metrics.jsonl and JSON documents by name, then the manifest."""
        with writing(self.destination) as directory:
            save_state(network, directory / "model.safetensors")
            if (self.partial / METRICS).exists():
                shutil.copy(self.partial / METRICS, directory / METRICS)
            for name, content in (documents or {}).items():
                (directory / name).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
            finish(directory, self.manifest(spec, metrics=metrics, quantization=quantization))
        shutil.rmtree(self.partial, ignore_errors=True)
        return Artifact.open(self.destination)

    def manifest(
        self, spec: ModelSpec, *, metrics: Mapping[str, Any], quantization: dict[str, Any] | None = None
    ) -> Manifest:
        """The manifest of this stage's result, without its files."""
        channels, height, width = self.data.size
        parameters, macs = count(build(spec), self.data.size)
        return Manifest(
            kind=self.name_of_kind,
            key=self.key,
            parents={role: artifact.key for role, artifact in self.parents.items()},
            config=dict(self.config),
            model=spec,
            quantization=quantization,
            inputs=[TensorInfo(name="image", dtype="float32", axes=["batch", channels, height, width])],
            outputs=[TensorInfo(name="logits", dtype="float32", axes=["batch", len(self.data.classes)])],
            preprocessing=Preprocessing(
                size=self.data.size,
                mean=self.data.mean,
                std=self.data.std,
                colour="RGB" if channels == 3 else "grey",
            ),
            classes=self.data.classes,
            metrics={**metrics, "parameters": parameters, "macs": macs},
            environment=environment(),
        )

    @property
    def name_of_kind(self) -> str:
        return str(self.config["use"])


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


def load_prepared(artifact: Artifact) -> nn.Module:
    """The fake-quantized network of a `quantize` artifact, exactly as it was healed."""
    quantization = artifact.manifest.quantization
    if quantization is None:
        raise ArtifactError("not a quantized artifact", where=str(artifact.path))
    size = artifact.manifest.preprocessing.size
    state = load_file(artifact.file("model.safetensors"))
    network = build(artifact.manifest.model)
    _resize(network, quantization["shapes"])
    prepared = quant.prepare(
        Tapped(network, quantization["taps"]),
        torch.zeros(2, *size),
        scheme_named(quantization["scheme"], str(artifact.path)),
        qat=quantization["qat"],
    )
    prepared.load_state_dict(state)
    return prepared


def _resize(network: nn.Module, shapes: Mapping[str, Sequence[int]]) -> None:
    """Give parameters and buffers the stored shapes, so that a pruned network can be traced before it is loaded."""
    for name, shape in shapes.items():
        path, _, leaf = name.rpartition(".")
        module = network.get_submodule(path)
        tensor = getattr(module, leaf)
        if list(tensor.shape) != list(shape):
            fresh = tensor.new_zeros(shape)
            setattr(module, leaf, nn.Parameter(fresh) if isinstance(tensor, nn.Parameter) else fresh)


def source_of(source: Component | None, where: str) -> Callable[[nn.Module], nn.Module]:
    """What makes a teacher source of a network. Raises UsageError or RecipeError, placed at `where`."""
    source = source or Component(use="frozen")
    component, args, problems = bind("teachers", source.use, source.args, where, skip=("network",))
    if problems:
        raise RecipeError(problems)
    return lambda network: component(network, **args)


def healing_problems(spec: ModelSpec, heal: Heal, context: Context) -> list[Problem]:
    """What is wrong with healing a network by these objectives: found by putting the learner together once."""
    where = f"{context.where}.heal"
    if heal.epochs == 0:
        return []
    return learner_problems(spec, heal.objectives, replace(context, where=where), heal.source)


def learner_problems(
    spec: ModelSpec, objectives: Sequence[Any], context: Context, source: Component | None = None
) -> list[Problem]:
    """Put student, teacher and objectives together on a blank image and collect what does not fit."""
    try:
        teacher = build(context.teacher) if context.teacher is not None else None
        specs = parse_objectives(objectives, f"{context.where}.objectives")
        made = source_of(source, f"{context.where}.source")
        example = torch.zeros(2, *context.data.size)
        student = build(spec)
        _check_answers(student, spec, example, len(context.data.classes))
        learner = Learner.of(student, objectives=specs, teacher=teacher, example=example, source=made)
        mixtures = [type(a).__name__ for a in augmentations(context.recipe.data) if isinstance(a, Mixture)]
        if isinstance(learner.source, Cached) and mixtures:
            what = f"a cached teacher has not seen the images that {mixtures[0]} makes"
            return [Problem(f"{context.where}.source", what, "use source = 'frozen', or leave out the mixture")]
    except EdgekdError as error:
        return [_placed(problem, context.where) for problem in error.problems]
    return []


def _check_answers(network: nn.Module, spec: ModelSpec, example: Tensor, classes: int) -> None:
    try:
        with torch.no_grad():
            logits = outputs(network.eval()(example))["logits"]
    except EdgekdError:
        raise
    except Exception as error:  # the user's network, or one whose arguments do not suit these images
        first = (str(error).splitlines() or [""])[0]
        raise UsageError(
            f"{spec.use} fails on images {list(example.shape)}: {type(error).__name__}: {first}",
            where="model",
            hint="does it take images of this size and number of channels?",
        ) from error
    if logits.shape != (len(example), classes):
        raise UsageError(
            f"{spec.use} gives {list(logits.shape)} for {len(example)} images, expected {[len(example), classes]}",
            where="model",
            hint=f"the data has {classes} classes; edgekd passes num_classes to a function that takes it",
        )


def _placed(problem: Problem, where: str) -> Problem:
    if problem.where.startswith(where):
        return problem
    return Problem(f"{where}.{problem.where}".rstrip("."), problem.what, problem.hint)
