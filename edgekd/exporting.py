"""What follows an export for TensorRT: whether it takes the files, a bundle for the device, engines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from shlex import quote
from typing import Any, Literal

from .artifact import MANIFEST, Artifact
from .bundle import bundle_of
from .data import Dataset, load
from .errors import UsageError
from .profile import Profile, load_profile
from .report.verification import verdict, verification_text
from .runs import find_source
from .screen import note
from .single import recipe_beside
from .stages.export import as_fed
from .stages.teaching import load_network
from .trt import Engine, TrtFile, Verification, build_engines, files_of, verify
from .trt.build import keeping
from .trt.files import suited
from .trt.torch_tensorrt import build_program, build_with_torch_tensorrt

__all__ = ["Delivered", "deliver", "profile_with_tensorrt"]

#: Images that engines are compared on where they are built.
IMAGES = 64


@dataclass(frozen=True)
class Delivered:
    """What was made of one artifact beside its files."""

    artifact: Artifact
    files: list[TrtFile]
    verified: list[Verification] = field(default_factory=list)
    bundle: Path | None = None
    engines: list[Engine] = field(default_factory=list)
    programs: list[Path] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether no file was found wrong."""
        return all(v.ok for v in self.verified)

    @property
    def document(self) -> dict[str, Any]:
        """For JSON: what was found of each file, and where bundle and engines are."""
        return {
            "verified": [{**v.model_dump(mode="json"), "ok": v.ok} for v in self.verified],
            "bundle": None if self.bundle is None else str(self.bundle),
            "engines": [str(engine.path) for engine in self.engines],
            "programs": [str(path) for path in self.programs],
        }


def profile_with_tensorrt(name: str) -> Profile:
    """The profile of that name. Raises UsageError where it does not run TensorRT."""
    profile = load_profile(name, "--profile")
    if profile.tensorrt is None:
        what = f"profile {profile.name} runs {profile.runtime}, not TensorRT"
        raise UsageError(what, where="--profile", hint="`edgekd profiles list` has those of GPUs and Jetsons")
    return profile


def deliver(
    artifact: Artifact,
    *,
    profile: str | None = None,
    data: str | None = None,
    verified: bool = True,
    build: str | None = None,
    bundle: Path | None = None,
) -> Delivered:
    """List the files for TensorRT of an export, judge them, build them where asked, and make a bundle; told on stderr.

    profile: the device's; default: the first one of the artifact's recipe, with TensorRT where there are files for
    it. build: the backend, tensorrt or torch-tensorrt. data: as for `recipe_beside`, of an artifact without recipe. The
    bundle goes to `bundle`; for TensorRT there is always one, beside the artifact if nothing else is said. Engines go
    beside it, too: of every file with the backend tensorrt; with torch-tensorrt, which takes float networks, one in
    half precision, and as a program of PyTorch's.
    Raises UsageError, MissingExtra and StageError as the parts do.
    """
    files = files_of(artifact)
    for file in files:
        note(_described(file))
    source = find_source(str(artifact.path))
    chosen = _chosen(profile, source.recipe.profiles if source.recipe else (), bool(files))
    if chosen is None:
        what = "no profile says which TensorRT is meant" if files else "no profile says which device is meant"
        if build or bundle is not None:
            raise UsageError(what, where="--profile", hint="`edgekd profiles list` has those of GPUs and Jetsons")
        note(f"not verified, and no bundle: {what}; give --profile NAME")
        return Delivered(artifact, files)
    for_tensorrt, dla = bool(files) and chosen.tensorrt is not None, False
    if chosen.tensorrt is not None:
        own = suited({file.name: file.path for file in files}, chosen.tensorrt)
        files = [file for file in files if file.name in own]
        dla = chosen.tensorrt.dla is not None
    if build and not for_tensorrt:
        hint = "--target trt, and --profile NAME of a device with TensorRT"
        raise UsageError("there are no files for TensorRT to build from", where="--build", hint=hint)
    source_network = _network_of(artifact) if build == "torch-tensorrt" else None
    judged = _verified(files, chosen) if verified and for_tensorrt else []
    if dla:
        note("the DLA takes fp16 only: no int8; layers that it does not have run on the GPU")
        note("its engines are what --build makes on the device; run.py has the GPU's")
    if not (build or bundle or (for_tensorrt and not dla)):
        return Delivered(artifact, files, judged)
    # Where the recipe has the data that were named it has their settings, too.
    other = None if source.recipe is not None and source.recipe.data.use == data else data
    recipe = recipe_beside(source, str(artifact.path), other, ())
    loaded = load(recipe.data, recipe.seed)
    made = bundle_of(artifact, chosen, bundle or artifact.path.parent / f"bundle-{chosen.name}", loaded)
    try:
        engines, programs = _built(artifact, files, chosen, loaded, source_network) if build else ([], [])
    finally:  # where nothing can be built here, the bundle is the way
        for line in _ways(made, artifact, chosen):
            note(line)
    return Delivered(artifact, files, judged, made, engines, programs)


def _chosen(name: str | None, others: Sequence[str], for_tensorrt: bool) -> Profile | None:
    if name is not None:
        return load_profile(name, "--profile")
    return next((p for p in map(load_profile, others) if p.tensorrt is not None or not for_tensorrt), None)


def _described(file: TrtFile) -> str:
    compared = file.compared
    typed = "strongly typed" if file.strongly_typed else "the builder chooses types"
    return (
        f"{file.path.name}: opset {file.opset}, {typed}; {compared['argmax_agreement']:.1%} equal answers with "
        f"{compared['with']} on {compared['images']} images, largest difference {compared['max_abs_difference']:.3g} "
        f"of {compared['max_abs_logit']:.3g}"
    )


def _verified(files: Sequence[TrtFile], profile: Profile) -> list[Verification]:
    """Every file judged: a table of layers where there are integers, one line elsewhere."""
    found = []
    for file in files:
        judged = verify(file.path, profile)
        whole = "int8" in file.name or not judged.ok
        note(verification_text(judged).rstrip() if whole else f"{file.path.name}: {verdict(judged)}")
        found.append(judged)
    return found


def _network_of(export: Artifact) -> Artifact:
    """The artifact with the float network that an export was written from. Raises UsageError."""
    what = "Torch-TensorRT builds from the float network"
    if export.manifest.quantization is not None:
        hint = "--backend tensorrt builds the int8 files; or export the stage before quantize"
        raise UsageError(f"{what}, this one is quantized", where="--backend", hint=hint)
    if export.manifest.inputs[0].dtype != "float32":
        what += f", which takes float32, and this export takes {export.manifest.inputs[0].dtype}"
        raise UsageError(what, where="--backend", hint="--set input=float32, or --backend tensorrt")
    keys = set(export.manifest.parents.values())
    for manifest in sorted(export.path.parent.glob(f"*/{MANIFEST}")):
        if Artifact.open(manifest.parent, verify=False).key in keys:
            return Artifact.open(manifest.parent)
    hint = "export into the run (without -o), or --backend tensorrt"
    raise UsageError(f"{what}, and it does not lie beside the export", where="--backend", hint=hint)


def _built(
    artifact: Artifact, files: Sequence[TrtFile], profile: Profile, data: Dataset, network: Artifact | None
) -> tuple[list[Engine], list[Path]]:
    """Engines and programs: from the files, or with Torch-TensorRT where there is a network."""
    directory = artifact.path.parent / f"engines-{profile.name}"
    directory.mkdir(exist_ok=True)
    inputs = {"image": as_fed(data.test.images[:IMAGES], data, artifact.manifest.inputs[0].dtype)}
    try:
        if network is None:
            return build_engines(files, profile, directory, inputs), []
        made: list[Engine] = []
        plain = artifact.file("model.fp32.onnx")
        precision: Literal["fp16", "fp32"] = "fp16" if "fp16" in profile.precisions else "fp32"
        with keeping([file.path for file in files], made):
            given = (plain, profile, directory, inputs, precision)
            made.append(build_with_torch_tensorrt(load_network(network), *given))  # which converts its network
            program, _ = build_program(load_network(network), *given)
        return made, [program]
    finally:
        if not any(directory.iterdir()):
            directory.rmdir()


def _ways(bundle: Path, artifact: Artifact, profile: Profile) -> list[str]:
    """Three lines that lead to a number measured on the device."""
    name = bundle.name.removesuffix(".tar.zst").removesuffix(".tar.gz")
    unpacked = "" if name == bundle.name else f"tar -xf {quote(bundle.name)} && "
    there, results = f"{unpacked}cd {quote(name)} && python3 run.py", f"USER@DEVICE:{name}/results.json"
    return [
        f"on the device: scp -r {quote(str(bundle))} USER@DEVICE: && ssh USER@DEVICE {quote(there)}",
        f"and back here: scp {quote(results)} . && edgekd report results.json --format text",
        f"or all of it:  edgekd bench {quote(str(artifact.path))} --host USER@DEVICE --profile {quote(profile.name)}",
    ]
