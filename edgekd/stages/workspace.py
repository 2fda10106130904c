"""What every stage works with: its sources, the data, and where the result goes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from .. import quant, ranks
from ..artifact import Artifact, Manifest, ModelSpec, Preprocessing, TensorInfo, finish, writing
from ..bench import environment
from ..checkpoint import METRICS
from ..data import Dataset, Split, Stream, augmentations, batches
from ..errors import ArtifactError, Problem
from ..learner import Learner, Student
from ..models import Tapped, build, count, save_state
from ..precision import autocast
from ..profile import Profile
from ..quant import scheme_named
from ..recipe import Recipe, Training
from ..tasks import Task
from ..teachers import Cached
from ..train import Fit, Job, fit
from .caches import default_directory
from .teaching import Context, Expert, Teaching, cache_key, experts_of, learner_of, placed

__all__ = ["Stage", "Workspace", "calibration", "load_prepared"]


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
    """One stage at work. `parents` maps roles (`source`, `teacher`, `teacher.2`, `start.NAME`) to artifacts; `siblings`
    are the workspaces of the other students of a fleet."""

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
    siblings: Sequence[Workspace] = ()

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
        return calibration(self.data.train, self.data, self.recipe.seed, images, batch)

    @property
    def teachers(self) -> list[Artifact]:
        """The artifacts that teach, in their order."""
        return [artifact for role, artifact in self.parents.items() if role.startswith("teacher")]

    def learner(
        self,
        students: Sequence[Student],
        teaching: Teaching,
        *,
        tap: Callable[..., nn.Module] = Tapped,
        images: int = 0,
    ) -> Learner:
        """Students with their objectives and, where they want them, the teacher artifacts' networks."""
        experts = experts_of(self.teachers, self.destination.parent)
        teachers = placed(experts, self.data)
        images = images or len(self.data.train)
        learner = learner_of(students, teachers, teaching, self.data, self.example, images, tap=tap)
        if isinstance(learner.source, Cached):
            fill = partial(self._fill, learner.source, [expert for expert, _ in experts])
            ranks.from_first(fill)
            if not ranks.first():
                fill()  # it is all there by now
        return learner

    def _fill(self, source: Cached, teachers: Sequence[Expert]) -> None:
        data, batch = self.data, self.recipe.data
        settings = Training(precision=(self.config.get("heal") or self.config)["precision"])
        keys = [expert.key for expert in teachers]
        key = cache_key(self.recipe, data, keys, source.of, source.top, settings)
        directory = source.directory or default_directory(self.destination.parent, key)

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

        with autocast(settings):
            source.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            device = "cuda" if torch.cuda.is_available() else "cpu"  # that of autocast
            source.fill(directory, stream, len(data.train), progress, key, device)

    def train(
        self,
        learner: Learner,
        settings: Training,
        on_epoch: Callable[[int, Learner], None] | None = None,
        streams: Sequence[Stream] = (),
        part: str = "",
    ) -> list[Fit]:
        """Run the one training loop, resuming what a killed run left in `partial`; one `part` of several has its own
        directory there."""
        job = Job(
            name=self.name,
            data=self.data,
            task=self.task,
            settings=settings,
            batch=self.recipe.data.batch,
            augment=augmentations(self.recipe.data),
            seed=self.recipe.seed,
            directory=self.partial / part,
            emit=self.emit,
            on_epoch=on_epoch,
            streams=streams,
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
        history: Path | None = None,
    ) -> Artifact:
        """Write the artifact: weights, metrics.jsonl and JSON documents by name, then the manifest.

        With several processes the first one's is written, and all wait for it.
        """
        history = history or self.partial / METRICS
        write = partial(self._write, network, spec, metrics, quantization, documents or {}, history)
        return ranks.from_first(write)

    def _write(
        self,
        network: nn.Module,
        spec: ModelSpec,
        metrics: Mapping[str, Any],
        quantization: dict[str, Any] | None,
        documents: Mapping[str, Any],
        history: Path,
    ) -> Artifact:
        with writing(self.destination) as directory:
            save_state(network, directory / "model.safetensors")
            if history.exists():
                shutil.copy(history, directory / METRICS)
            for name, content in documents.items():
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


def calibration(train: Split, data: Dataset, seed: int, images: int, batch: int = 64) -> Iterator[dict[str, Any]]:
    """Batches of a split without augmentation, normalised as the data are, until there are so many images."""
    stream = batches(train, batch=min(batch, images), mean=data.mean, std=data.std, seed=seed, epoch=0)
    for index, drawn in enumerate(stream):
        if index * min(batch, images) >= images:
            return
        yield drawn


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
        float_layers=quantization.get("float_layers", ()),
        learned=quantization.get("learned", False),
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
