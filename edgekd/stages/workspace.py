"""What every stage works with: its sources, the data, and where the result goes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from pydantic import Field
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..artifact import Artifact, Manifest, ModelSpec, Preprocessing, TensorInfo, finish, writing
from ..bench import environment
from ..data import Dataset, augmentations, batches
from ..errors import ArtifactError, EdgekdError, Problem
from ..learner import Learner, parse_objectives
from ..models import Tapped, build, count, load_state, save_state
from ..profile import Profile
from ..quant import prepare, scheme_named
from ..recipe import Recipe, Training
from ..tasks import Task
from ..train import METRICS, Fit, Job, fit

__all__ = ["Context", "Heal", "Stage", "Workspace", "healing_problems", "load_network", "load_prepared"]


class Heal(Training):
    """Training that heals what a stage broke; objectives default to those of the last distillation."""

    epochs: int = Field(3, ge=0)
    lr: float = Field(0.05, gt=0)
    objectives: list[Any] = Field(default=[], description="as in distill; empty: those of the last distillation")

    def with_objectives(self, objectives: list[Any]) -> Heal:
        return self if self.objectives else self.model_copy(update={"objectives": objectives})


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

    def resolved(self, profiles: Sequence[Profile], objectives: list[Any]) -> Stage:
        """The same stage with every default from the profiles, and the objectives to heal with, written out."""

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

    def calibration(self, images: int, batch: int = 64) -> Any:
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
        self, student: nn.Module, objectives: Sequence[Any], *, tap: Callable[..., nn.Module] = Tapped
    ) -> Learner:
        """The student with its objectives and, where they want one, the teacher artifact's network."""
        teacher = self.parents.get("teacher")
        specs = parse_objectives(objectives)
        network = load_network(teacher) if teacher is not None else None
        return Learner.of(student, objectives=specs, teacher=network, example=self.example, tap=tap)

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
            if quantization is None:
                save_state(network, directory / "model.safetensors")
            else:
                state = {name: value.detach().contiguous().clone() for name, value in network.state_dict().items()}
                save_file(state, directory / "model.safetensors")
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
    prepared = prepare(
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


def healing_problems(spec: ModelSpec, heal: Heal, context: Context) -> list[Problem]:
    """What is wrong with healing a network by these objectives: found by putting the learner together once."""
    where = f"{context.where}.heal"
    if heal.epochs == 0:
        return []
    return learner_problems(spec, heal.objectives, replace(context, where=where))


def learner_problems(spec: ModelSpec, objectives: Sequence[Any], context: Context) -> list[Problem]:
    """Put student, teacher and objectives together on a blank image and collect what does not fit."""
    try:
        teacher = build(context.teacher) if context.teacher is not None else None
        specs = parse_objectives(objectives, f"{context.where}.objectives")
        Learner.of(build(spec), objectives=specs, teacher=teacher, example=torch.zeros(2, *context.data.size))
    except EdgekdError as error:
        return [
            p if p.where.startswith(context.where) else Problem(f"{context.where}.{p.where}".rstrip("."), p.what, p.hint)
            for p in error.problems
        ]
    return []
