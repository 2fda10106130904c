"""Whether int8 pays on a profile, and in which layers: measured before a network is healed.

A network's weights do not change its latency, so the calibrated one tells what the healed one will take.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx
from pydantic import BaseModel, ConfigDict, Field
from torch import nn

from .. import quant
from ..artifact import Preprocessing
from ..bench import environment, not_here, side_by_side, speedup
from ..data import Split
from ..errors import StageError
from ..onnx_file import export_onnx
from ..profile import Profile, lowest_opset
from ..quant import mixed
from ..quant.mixed import Candidate, Found, LayerPrecision, Measured, PrecisionRecord
from ..quant.stripping import in_float, integer_layers
from ..train import predict
from .workspace import Workspace

__all__ = ["Mixed", "Pricing", "compared", "judged", "measuring_profile", "priced", "recorded"]

#: Files opened at once beside the float one.
TOGETHER = 12
#: Images for the divergence of single layers, and at most for an accuracy.
SENSITIVITY_IMAGES, JUDGED_IMAGES = 128, 1000


ACCURACY = "int8 costs too much accuracy here"


class Mixed(BaseModel):
    """Layers whose int8 loses time on the profile, or too much accuracy, stay float."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    max_drop: float | None = Field(
        None, ge=0, lt=1, description="of the headline metric, before healing: 0.005 is half a point of accuracy"
    )
    speedup: float | None = Field(
        None, gt=1, description="over the float network on the profile; without max_drop, accuracy decides beyond it"
    )


@dataclass(frozen=True)
class Pricing:
    """A float network that is to become int8. `quantized(paths)`: calibrated, untrained, these layers in float."""

    workspace: Workspace
    network: nn.Module
    preprocessing: Preprocessing
    quantized: Callable[[Collection[str]], nn.Module]


def measuring_profile(profiles: Sequence[Profile]) -> tuple[Profile | None, str]:
    """The first profile whose device is this machine; or None and why there is none."""
    here, why = environment(), "" if profiles else "no profile wants this scheme"
    for profile in profiles:
        other = not_here(profile, here)
        if other is None:
            return profile, ""
        why = why or other
    return None, why


def judged(workspace: Workspace, network: nn.Module) -> tuple[float, int, str]:
    """The headline metric on some validation images, or training images where there are none; how many, and which."""
    data, task = workspace.data, workspace.task
    name, split = ("validation", data.validation) if len(data.validation) else ("training", data.train)
    split = Split(split.images[:JUDGED_IMAGES], split.labels[:JUDGED_IMAGES])
    return task.metrics(predict(network, split, data, 250), split.labels.numpy())[task.headline], len(split), name


def compared(float_file: Path, own_file: Path, profile: Profile) -> Measured:
    """The latencies of two files side by side."""
    found = side_by_side({"float": float_file, "own": own_file}, profile).latencies
    return Measured(
        profile=profile.name,
        float_ms=found["float"].p50.value,
        own_ms=found["own"].p50.value,
        speedup=speedup(found["float"], found["own"]),
    )


def priced(pricing: Pricing, scheme: str, *, wanted: Mixed | None, floats: Collection[str] = ()) -> PrecisionRecord:
    """What is to be int8, and its latency beside the float network's on the first profile that is here.

    All layers but `floats` (module paths), or those of them that are `wanted`. Raises StageError where that cannot be
    met, with the nearest that can.
    """
    profile, why = measuring_profile(pricing.workspace.profiles)
    prepared = pricing.quantized(floats)
    record = recorded(prepared, scheme, floats).model_copy(update={"not_measured": why or None})
    if all(layer.precision == "float" for layer in record.layers):
        return record.model_copy(update={"kept_float": "there is no layer to quantize"})
    if profile is None and wanted is None:
        return record
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        files = []
        if profile is not None:
            files = [_export(pricing, pricing.network.eval(), directory / "float.onnx")]
            files += [_export(pricing, quant.convert(prepared), directory / "int8.onnx")]
        if wanted is not None:
            record = _mixture(pricing, prepared, record, wanted, floats, profile, directory)
            if profile is None or record.kept_float:
                return record
            made = pricing.quantized(record.float_layers)
            files[1] = _export(pricing, quant.convert(made), directory / "mixed.onnx")
        assert profile is not None
        measured = compared(files[0], files[1], profile)
    if wanted is not None and wanted.speedup is not None and measured.speedup.value < wanted.speedup:
        limited = any(layer.reason == ACCURACY for layer in record.layers)
        raise _too_slow(wanted, profile, measured.speedup.value, limited)
    return record.model_copy(update={"measured": measured})


def recorded(prepared: nn.Module, scheme: str, floats: Collection[str]) -> PrecisionRecord:
    """What became of every product of a network, without any measurement."""
    layers = [
        LayerPrecision(
            path=place.path,
            precision="int8" if place.quantized else "float",
            reason=place.reason or "the scheme quantizes it",
        )
        for place in {place.path: place for place in quant.placements(prepared)}.values()
    ]
    return PrecisionRecord(scheme=scheme, float_layers=sorted(floats), layers=layers)


def _export(pricing: Pricing, module: nn.Module, path: Path) -> Path:
    data = pricing.workspace.data
    opset = lowest_opset(pricing.workspace.profiles)
    export_onnx(module, path, size=data.size, opset=opset, classes=data.classes, preprocessing=pricing.preprocessing)
    return path


def _mixture(
    pricing: Pricing,
    prepared: nn.Module,
    record: PrecisionRecord,
    wanted: Mixed,
    floats: Collection[str],
    profile: Profile | None,
    directory: Path,
) -> PrecisionRecord:
    """The layers of `record` sorted into int8 and float, with what that is worth."""
    order = [place.path for place in quant.placements(prepared) if place.quantized]
    grouped = mixed.groups(order)
    drawn = [batch["image"] for batch in pricing.workspace.calibration(SENSITIVITY_IMAGES)]
    harm = quant.harms(prepared, drawn)
    found = Found(frozenset(order), 1.0, {}, {})
    if profile is not None:
        time = _timer(pricing, directory, order, profile)
        found = mixed.fastest(mixed.candidates(pricing.network, order), grouped, time)
        if wanted.speedup is not None and (found.speedup < wanted.speedup or not found.int8):
            what = f"{found.speedup:.2f}x is the most that {len(found.tried)} choices of int8 layers reach"
            raise _too_slow(wanted, profile, found.speedup, False, what)
    chosen = found.int8
    if chosen and wanted.max_drop is not None:
        chosen = mixed.within(found, grouped, harm, _dropping(pricing, order, floats), wanted.max_drop)
    elif chosen and wanted.speedup is not None:
        chosen = mixed.least_harm(found, grouped, harm, time, wanted.speedup)
    kept_float = None
    if not chosen and profile is not None and wanted.speedup is not None:
        raise _too_slow(wanted, profile, 1.0, True)
    if not chosen:
        kept_float = (
            f"no choice of layers is faster than float on {profile.name}"
            if profile and not found.int8
            else (f"no choice of layers loses at most {wanted.max_drop:.2%}")
        )
    group_of = {path: name for name, paths in grouped.items() for path in paths}
    layers = []
    for layer in record.layers:
        if layer.path in group_of:
            gain = found.gains.get(group_of[layer.path])
            update = {"group": group_of[layer.path], "harm": harm[layer.path], "gain": gain}
            update |= _decided(layer.path, chosen, found, gain)
            layer = layer.model_copy(update=update)
        layers.append(layer)
    tried = [Candidate(name=name, int8=len(paths), speedup=value) for paths, (name, value) in found.tried.items()]
    tried.sort(key=lambda candidate: -candidate.speedup)
    kept = sorted({*floats, *order} - chosen)
    update = {"layers": layers, "float_layers": kept, "tried": tried, "kept_float": kept_float}
    return record.model_copy(update=update)


def _decided(path: str, chosen: Collection[str], found: Found, gain: float | None) -> dict[str, str]:
    """Precision and reason of one layer."""
    if path in chosen:
        return {"precision": "int8", "reason": "the answers allow it" if gain is None else "int8 saves time here"}
    if path in found.int8:
        return {"precision": "float", "reason": ACCURACY}
    if not found.int8:
        return {"precision": "float", "reason": "int8 is slower than float, in all layers and in any of the sets tried"}
    return {"precision": "float", "reason": "int8 saves no time here"}


def _timer(pricing: Pricing, directory: Path, order: Sequence[str], profile: Profile) -> mixed.Timer:
    """Speed-ups over the float file of sets of layers, by files made from the one in which all are int8."""
    model = onnx.load(directory / "int8.onnx")
    if integer_layers(model) != len(order):
        what = f"{len(order)} layers were quantized and the exported file has {integer_layers(model)}"
        raise StageError(what, where="quantize.mixed", hint="please report this network; leave out mixed")
    timed = 0

    def time(sets: Mapping[str, frozenset[str]]) -> dict[str, float]:
        nonlocal timed
        found: dict[str, float] = {}
        names = list(sets)
        for start in range(0, len(names), TOGETHER):
            files = {"float": directory / "float.onnx"}
            for name in names[start : start + TOGETHER]:
                files[name] = directory / f"candidate-{len(files)}.onnx"
                floats = {i for i, path in enumerate(order) if path not in sets[name]}
                onnx.save(in_float(model, floats), files[name])
            latencies = side_by_side(files, profile).latencies
            found |= {name: speedup(latencies["float"], latencies[name]).value for name in files if name != "float"}
            timed += len(files) - 1
            event = {"event": "bench", "profile": f"int8 or float, layer by layer, on {profile.name}"}
            pricing.workspace.emit({**event, "done": timed, "total": timed + len(names) - len(found)})
        return found

    return time


def _dropping(pricing: Pricing, order: Sequence[str], floats: Collection[str]) -> Callable[[frozenset[str]], float]:
    """What the headline metric loses with a set of layers in int8, as a fraction."""
    workspace = pricing.workspace
    sign = 1 if workspace.task.direction == "max" else -1
    before, _, _ = judged(workspace, pricing.network)

    def drop(chosen: frozenset[str]) -> float:
        return sign * (before - judged(workspace, pricing.quantized({*floats, *order} - chosen))[0])

    return drop


def _too_slow(wanted: Mixed, profile: Profile, found: float, limited: bool, most: str = "") -> StageError:
    """`found`: the speed-up that was reached; `limited`: layers that would save time left for the answers' sake."""
    bound = f" within a loss of {wanted.max_drop:.2%}" if limited and wanted.max_drop is not None else ""
    hint = f"ask for {max(found - 0.01, 1.0):.2f}" if found > 1.01 else "keep this network float on this device"
    if bound:
        hint = f"ask for {found - 0.01:.2f}, or a larger max_drop" if found > 1.01 else "allow a larger max_drop"
    return StageError(
        f"{wanted.speedup:g}x over float cannot be had on {profile.name}{bound}: "
        + (most or f"{found:.2f}x is what the chosen layers reach"),
        where="quantize.mixed.speedup",
        hint=hint,
    )
