"""Which files a name stands for, each estimated on a device that is not here."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from .bench import Results
from .errors import UsageError
from .estimate import Estimated, Estimates, Precision, estimate_of, fit, roofline
from .profile import Profile, load_profile
from .verdicts import results_at

__all__ = ["estimate_paths", "write_estimates"]


def estimate_paths(
    paths: Sequence[str], profile: str, results: Sequence[Path] = (), *, precision: Precision | None = None
) -> Estimates:
    """Lower bounds of ONNX files, artifacts and runs on a profile with a datasheet.

    `results` were measured on that device: with them there is an interval, too. Raises UsageError.
    """
    device = load_profile(profile, "--profile")
    named = [pair for text in paths for pair in _files(text, device)]
    bounds = [(name, roofline(file, device, precision=precision)) for name, file in named]
    fitted = fit({path: results_at(path) for path in results}, device, precision=precision) if results else None
    assert device.datasheet is not None
    return Estimates(
        profile=device.name,
        device=device.description,
        power_mode=device.power_mode,
        source=device.datasheet.source,
        caches_known=device.datasheet.cache_mb is not None,
        files=[Estimated(name=n, roofline=r, estimate=estimate_of(r, device, fitted)) for n, r in bounds],
        fit=fitted,
    )


def write_estimates(run: Path, profile: str, results: Sequence[Path]) -> None:
    """Put estimates fitted to `results` into a run's results.json, in place of bare bounds. Raises UsageError.

    Only of a profile whose device is elsewhere: what was measured stays.
    """
    device = load_profile(profile, "--profile")
    document = Results.read(run / "results.json")
    here = next((p for p in document.profiles if p.profile == device.name), None)
    if here is None or here.elsewhere is None:
        what = f"{device.name} was measured in this run" if here else f"{run} has nothing on {device.name}"
        hint = "its latencies need no estimate" if here else f"edgekd bench {run} --profile {profile}"
        raise UsageError(what, where="--write", hint=hint)
    fitted = fit({path: results_at(path) for path in results}, device) if results else None
    variants = [
        v.model_copy(update={"estimate": estimate_of(roofline(_there(v.file, run), device), device, fitted)})
        for v in here.variants
    ]
    changed = here.model_copy(update={"variants": variants})
    profiles = [changed if p is here else p for p in document.profiles]
    document.model_copy(update={"profiles": profiles}).write(run / "results.json")


def _files(text: str, profile: Profile) -> Iterator[tuple[str, Path]]:
    """(what it is called, the file): of a run what it measured, of an artifact every ONNX file in it."""
    path = Path(text)
    if path.suffix == ".onnx" or path.is_file():
        yield path.name, path
        return
    if (path / "results.json").is_file():
        measured = [p for p in Results.read(path / "results.json").profiles if p.variants]
        own = next((p for p in measured if p.profile == profile.name), measured[0] if measured else None)
        for variant in own.variants if own is not None else []:
            yield variant.name, _there(variant.file, path)
        return
    from .runs import find_source  # here: it imports torch, and files do without

    artifact = find_source(text, ("export",)).artifact
    files = sorted(name for name in artifact.manifest.files if name.endswith(".onnx"))
    if not files:
        raise UsageError(f"{artifact.path} holds no ONNX file", where=text, hint=f"edgekd export {text}")
    yield from ((name, artifact.file(name)) for name in files)


def _there(file: str, run: Path) -> Path:
    """A file that a run's results name: as they do, or inside the run where that was moved."""
    named = Path(file)
    inside = run.joinpath(*named.parts[-2:])
    if not named.is_file() and not inside.is_file():
        raise UsageError(f"{file}, which was measured, is gone", where=str(run), hint=f"edgekd bench {run}")
    return named if named.is_file() else inside
