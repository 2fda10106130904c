"""How the stage `prune` measures latency: candidates are exported as they will be deployed, and run side by side."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn

from .. import quant
from ..artifact import Preprocessing
from ..bench import Interval, environment, not_here, others_busy, paired_ratio, round_medians, side_by_side
from ..data import Dataset
from ..errors import EdgekdError, Problem, UsageError
from ..models import Tapped
from ..onnx_file import export_onnx
from ..profile import Profile, load_profile
from ..pruning import Compared, LatencyTarget, Timing
from ..pruning.costs import Layer
from ..pruning.latency import LatencyTable, timed_layers
from ..pruning.one_layer import TOGETHER, Precision, Shape, measure_layers
from ..pruning.progress import Progress
from ..pruning.search import Candidate
from ..quant import scheme_named

__all__ = ["profile_of", "profile_problems", "timing"]

#: Seconds that one comparison of two networks may take, and what each further network adds.
CAP_S, EACH_S = 8.0, 1.0
#: The smallest file that tells whether a runtime works here.
TRIAL = Shape("linear", 1, 1, ())


def profile_of(target: LatencyTarget, profiles: Sequence[Profile], where: str) -> Profile:
    """The profile that a target names, or the first. Raises UsageError or RecipeError where there is no such."""
    if target.profile is not None:
        return load_profile(target.profile, f"{where}.profile")
    if not profiles:
        raise UsageError("no profile to measure on", where=f"{where}.profile", hint='profile = "cpu-x86"')
    return profiles[0]


def profile_problems(
    target: LatencyTarget, profiles: Sequence[Profile], where: str, *, probe: bool = True
) -> list[Problem]:
    """Why latency on this profile cannot be measured; with `probe`, why not here, found by measuring one tiny layer."""
    try:
        profile = profile_of(target, profiles, where)
        if probe and (elsewhere := not_here(profile, environment())):
            hint = "prune on that device, or to a share of the MACs"
            return [Problem(f"{where}.profile", f"cannot be measured here: {elsewhere}", hint)]
        if target.precision not in profile.precisions:
            what = f"{profile.name} has {', '.join(profile.precisions)}"
            return [Problem(f"{where}.precision", what, "name one of these")]
        if probe:
            measure_layers([TRIAL], profile, target.precision)
    except EdgekdError as error:
        return [p if p.where.startswith(where) else Problem(f"{where}.profile", p.what, p.hint) for p in error.problems]
    return []


@contextlib.contextmanager
def timing(
    profile: Profile,
    precision: Precision,
    data: Dataset,
    images: Tensor,
    multiple: int,
    progress: Progress = lambda what, done, total: None,
) -> Iterator[Timing]:
    """Prediction and measurement on a profile, in fp32, or quantized after training (its speed is what counts here).

    images: [N, C, H, W], what ranges are set by. progress: told of networks timed, whose number is known in the end.
    Files live as long as the context.
    """
    timed = 0
    with TemporaryDirectory(prefix="edgekd-prune-") as directory:
        write = partial(_write, profile=profile, precision=precision, data=data, images=images)
        files: dict[int, tuple[nn.Module, Path]] = {}

        def file_of(network: nn.Module) -> Path:
            # The network is kept, so that nothing else gets its identity.
            if id(network) not in files:
                path = Path(directory) / f"{len(files)}.onnx"
                write(network, path)
                files[id(network)] = network, path
            return files[id(network)][1]

        def measured(shapes: Sequence[Shape], profile: Profile, precision: Precision) -> list[float]:
            found: list[float] = []
            for start in range(0, len(shapes), TOGETHER // 2):
                progress("layers timed", start, len(shapes))
                found += measure_layers(shapes[start : start + TOGETHER // 2], profile, precision)
            progress("layers timed", len(shapes), len(shapes))
            return found

        def layers(network: nn.Module, example: Tensor, candidates: Sequence[Candidate]) -> list[Layer]:
            alone = side_by_side({"whole": file_of(network)}, profile, rounds=3, cap_s=CAP_S)
            whole = alone.latencies["whole"].p50.value
            table = LatencyTable(profile, precision, measure=measured)
            return timed_layers(network, example, candidates, table, whole, multiple)

        def compare(original: nn.Module, pruned: nn.Module) -> Compared:
            nonlocal timed
            progress("networks timed", timed, timed + 1)
            files = {"original": file_of(original), "pruned": file_of(pruned)}
            since = others_busy()
            measured = side_by_side(files, profile, cap_s=CAP_S)
            medians = round_medians(measured.samples)
            before, after = (measured.latencies[name].p50 for name in files)
            timed += 1
            progress("networks timed", timed, timed)
            ratio = paired_ratio(medians["original"], medians["pruned"])
            return Compared(before, after, ratio, len(medians["pruned"]), since())

        def savings(pruned: nn.Module, longer: Mapping[str, nn.Module]) -> dict[str, Interval]:
            files = {"": file_of(pruned)}
            for i, (name, network) in enumerate(longer.items()):
                progress("savings timed", i, len(longer))
                files[name] = file_of(network)
            measured = side_by_side(files, profile, cap_s=CAP_S + EACH_S * len(longer))
            progress("savings timed", len(longer), len(longer))
            medians, now = round_medians(measured.samples), measured.latencies[""].p50.value
            ratios = {name: paired_ratio(medians[name], medians[""]) for name in longer}
            return {
                name: Interval(**{k: (v - 1) * now for k, v in ratio.model_dump().items()})
                for name, ratio in ratios.items()
            }

        here = environment()
        runtime = f"{profile.runtime} {here['versions'].get(profile.runtime, '')}".strip()
        yield Timing(profile.name, layers, compare, savings, here["cpu"], runtime, profile.threads)


def _write(
    network: nn.Module, path: Path, *, profile: Profile, precision: Precision, data: Dataset, images: Tensor
) -> None:
    if precision == "int8":
        scheme = scheme_named(profile.scheme, "profile.scheme")
        prepared = quant.prepare(Tapped(network, []), images[:2], scheme, qat=False)
        quant.calibrate(prepared, [images])
        quant.freeze(prepared)
        network = quant.convert(prepared)
    with torch.no_grad():
        export_onnx(
            network,
            path,
            size=data.size,
            opset=profile.opset,
            classes=data.classes,
            preprocessing=Preprocessing(size=data.size, mean=data.mean, std=data.std),
        )
