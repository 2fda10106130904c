"""The stage `quantize`: int8 by calibration, or by training with fake quantization."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Sequence
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, field_validator
from torch import Tensor, nn

from .. import quant, ranks
from ..artifact import Artifact, ModelSpec, digest
from ..bench import environment
from ..errors import EdgekdError, Problem
from ..learner import Learner, Student, parse_objectives
from ..models import Tapped
from ..objectives import Objectives
from ..profile import Profile, lowest_opset
from ..quant import scheme_named
from ..registry import register
from .backends import Backend, Mode, Tuning, backend_problems, quantize_elsewhere
from .mixing import DOCUMENT, calibration_problems, decided, matching, precision_problems, save_float, verdict
from .paying import Mixed, Pricing
from .saturating import SEVEN_BITS, saturation
from .teaching import Context, Heal, Teaching, healing_problems, load_network, teaching
from .workspace import Workspace

__all__ = ["Quantize"]


class QuantizationHeal(Heal):
    """Quantization-aware training; 0 epochs is post-training quantization."""

    lr: float = Field(0.01, gt=0)


@register("stages", "quantize")
class Quantize(BaseModel):
    """Quantize to int8 where the profile's runtime fuses it, then heal (`heal.epochs = 0`: calibration only)."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    kind: ClassVar[str] = "quantize"
    follows: ClassVar[tuple[str, ...]] = ("teacher", "distill", "prune", "fuse", "average")

    scheme: str | Annotated[list[str], Field(min_length=1)] = Field(
        "auto", description="auto: what each profile's runtime fuses; a scheme; or several, each a step of its own"
    )
    calibration: int = Field(512, gt=0, description="training images that set the first ranges")
    ranges: Literal["min-max", "percentile", "entropy", "mse"] = Field(
        "min-max", description="what of the calibration images' activations a range covers"
    )
    percentile: float = Field(
        99.99, gt=50, le=100, description="of ranges = 'percentile': (100 - this) % are left out at each end"
    )
    learned: bool = Field(False, description="scales that train while healing (LSQ) instead of observed ranges")
    warmup: float = Field(
        0.0, ge=0, le=0.5, description="the share of healing with int8 weights only; the last epoch is kept then"
    )
    corrections: list[Literal["equalise", "bias", "round"]] = Field(
        default=[],
        description="equalise: channel ranges across layers, before training too; bias and round (AdaRound): without",
    )
    backend: Backend = Field("edgekd", description="what quantizes; the others work without training and yield a file")
    mode: Mode = Field(
        "static",
        description="dynamic: ranges at every call, matrix products only; weight-only: a smaller file, float's speed",
    )
    tune: Tuning | None = Field(None, description="neural-compressor: other configurations until accuracy is kept")
    float_layers: list[str] = Field(default=[], description="module path patterns that stay float")
    mixed: Mixed | None = Field(
        None, description="which layers stay float: latency (the fastest), max_drop, speedup; none: only float_layers"
    )
    keep_float: bool = Field(
        True, description="compare with the float network on the profile, and keep that one where int8 is no better"
    )
    heal: QuantizationHeal = QuantizationHeal()
    after: str | None = Field(None, description="the stage to go on from; default: the one before")
    _profiles: Sequence[Profile] = PrivateAttr(())

    @field_validator("scheme")
    @classmethod
    def _each_once(cls, value: str | list[str]) -> str | list[str]:
        for name in value if isinstance(value, list) else []:
            if name == "auto":
                raise ValueError("auto stands alone: it is what the profiles want")
            if value.count(name) > 1:
                raise ValueError(f"names {name!r} twice")
        return value

    @field_validator("mixed", mode="before")
    @classmethod
    def _fastest(cls, value: Any) -> Any:
        return {} if value == "latency" else value

    def schemes(self, profiles: Sequence[Profile]) -> list[str]:
        """Those to make: each becomes a step, which has it as its only `scheme`."""
        if self.scheme == "auto":
            return list(dict.fromkeys(p.scheme for p in profiles))
        return [self.scheme] if isinstance(self.scheme, str) else self.scheme

    @property
    def _scheme(self) -> str:
        """The only one, of a stage that is resolved."""
        assert isinstance(self.scheme, str)
        return self.scheme

    def check(self, context: Context) -> tuple[ModelSpec | None, list[Problem]]:
        """Known schemes."""
        problems: list[Problem] = []
        for name in self.schemes(context.profiles):
            try:
                scheme = scheme_named(name, f"{context.where}.scheme")
                problems += backend_problems(self, scheme, context)
            except EdgekdError as error:
                problems.extend(error.problems)
        if context.source is not None:
            problems.extend(healing_problems(context.source, self.heal, context))
        problems += [*calibration_problems(self, context), *precision_problems(self, context)]
        return context.source, problems

    def inputs(self) -> dict[str, str]:
        """The profiles that may be measured on, where measuring decides, and the opset of a backend's file."""
        found = {}
        # Not whether this machine is their device: that would undo a finished run wherever it is carried to, and a
        # result says what it was measured on. All profiles, since which one measures is a matter of the machine.
        if self.keep_float or self.mixed is not None:
            told = {"description", "budgets"}  # to people and to the gate
            found["profiles"] = digest([p.model_dump(mode="json", exclude=told) for p in self._profiles])
        if self.backend != "edgekd":
            found["opset"] = str(lowest_opset(self._profiles))
        return found

    def resolved(self, profiles: Sequence[Profile], distilled: Teaching) -> Quantize:
        """The scheme from the profiles."""
        update = {"scheme": self.schemes(profiles)[0], "heal": self.heal.after(distilled)}
        stage = self.model_copy(update=update)
        stage._profiles = tuple(profiles)
        return stage

    def run(self, workspace: Workspace) -> Artifact:
        """Prepare, calibrate, heal with frozen ranges in the second half, and store the fake-quantized network."""
        torch.manual_seed(workspace.recipe.seed)
        scheme = scheme_named(self._scheme, "quantize.scheme")
        why = saturation(scheme, environment())
        if why is not None and self.mode != "weight-only":
            workspace.emit({"event": "saturation", "stage": workspace.name, "why": why, "hint": SEVEN_BITS})
        if self.backend != "edgekd":
            return quantize_elsewhere(self, scheme, workspace)
        source = workspace.parents["source"]
        network = load_network(source)
        shapes = {name: list(value.shape) for name, value in network.state_dict().items()}
        training = self.heal.epochs > 0
        even = network
        if "equalise" in self.corrections:
            even = copy.deepcopy(network)
            quant.equalise(even, workspace.example)
        objectives = self.heal.objectives if training else ["ce"]
        taps = Objectives(parse_objectives(objectives)).taps("student")

        def prepared_as(student: nn.Module, taps: Sequence[str], floats: Collection[str], qat: bool) -> nn.Module:
            made = Tapped(student, taps)
            learned = qat and self.learned
            prepared = quant.prepare(made, workspace.example, scheme, qat=qat, float_layers=floats, learned=learned)
            quant.calibrate(prepared, self._drawn(workspace), method=self.ranges, percentile=self.percentile)
            quant.enable_fake_quant(prepared)
            return prepared

        def untrained(floats: Collection[str]) -> nn.Module:
            return prepared_as(even, [], floats, False)

        pricing = Pricing(workspace, network, source.manifest.preprocessing, untrained)
        record = decided(self, pricing, matching(self.float_layers, network))
        if record.kept_float is not None:
            return save_float(workspace, network, record)
        torch.manual_seed(workspace.recipe.seed)

        def quantized(student: nn.Module, taps: Sequence[str]) -> nn.Module:
            return prepared_as(student, taps, record.float_layers, training)

        metrics: dict[str, Any] = {}
        if training:
            learner = workspace.learner([Student(even, objectives)], teaching(self.heal), tap=quantized)
            prepared = learner.student
            # Epochs of a gradual start are judged with float activations: the best of them would be no int8 network.
            settings = self.heal.model_copy(update={"keep": "last"}) if self.warmup else self.heal
            metrics = workspace.train(learner, settings, self._on_epoch)[0].metrics
            quant.enable_fake_quant(prepared)  # all of it, wherever training stopped
        else:
            prepared = quantized(even, taps)
            for name in self.corrections:
                if name == "bias":
                    quant.correct_bias(prepared, self._drawn(workspace))
                elif name == "round":
                    quant.adapt_rounding(prepared, self._drawn(workspace), seed=workspace.recipe.seed)
        quant.freeze(prepared)
        if self.keep_float:
            record = ranks.from_first(lambda: verdict(record, workspace, network, prepared))
            if record.kept_float is not None:
                return save_float(workspace, network, record)
        made = {"scheme": scheme.name, "qat": training, "taps": taps, "shapes": shapes}
        made |= {"float_layers": record.float_layers, "learned": training and self.learned}
        documents = {DOCUMENT: record.model_dump(mode="json")}
        spec = source.manifest.model
        return workspace.save(prepared, spec, metrics=metrics, quantization=made, documents=documents)

    def _drawn(self, workspace: Workspace) -> Iterator[Tensor]:
        """Batches of images to calibrate with."""
        return (batch["image"] for batch in workspace.calibration(self.calibration))

    def _on_epoch(self, epoch: int, learner: Learner) -> None:
        """Weights are quantized first, activations after them; ranges settle before the last weights do.

        So do batch norms' statistics, but only where the learning rate has fallen to a tenth: without the statistics
        of each batch, a network may fall apart at the rate that heals.
        """
        done = epoch / self.heal.epochs
        quant.enable_fake_quant(learner.student, activations=done >= self.warmup)
        if done >= 0.5:
            quant.freeze(learner.student, batch_norm=done >= 0.9 and self.heal.schedule != "constant")
