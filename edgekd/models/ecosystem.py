"""Networks of timm, torchvision and Transformers by name, always offline; weights come from the user's own files."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from ..errors import MissingExtra, UsageError, nearest
from ..registry import register

__all__ = ["hf", "timm", "torchvision", "with_config"]

#: Kept for the life of the process: torch forgets an operator when the library object that defined it goes.
_libraries: list[torch.library.Library] = []
#: Left out of a Transformers configuration: class names travel in the manifest, versions in its environment.
_NOT_ARCHITECTURE = ("id2label", "label2id", "transformers_version", "_name_or_path", "dtype")


@register("models", "timm:")
def timm(name: str, num_classes: int = 1000, in_channels: int = 3, **options: Any) -> nn.Module:
    """Any network of timm, randomly initialised; further keys go to timm.create_model (for example img_size = 32)."""
    library = _library("timm", "timm")
    place = f"model timm:{name}"
    if not library.is_model(name):
        raise UsageError(f"timm has no network {name!r}", where=place, hint=_close(name, library.list_models()))
    _no_downloads(options, ("pretrained", "pretrained_cfg"), place)
    return _create(
        place,
        lambda: library.create_model(name, pretrained=False, num_classes=num_classes, in_chans=in_channels, **options),
    )


@register("models", "torchvision:")
def torchvision(name: str, num_classes: int = 1000, in_channels: int = 3, **options: Any) -> nn.Module:
    """Any classification network of torchvision, randomly initialised; further keys go to its builder."""
    models = _library("torchvision.models", "timm")
    place = f"model torchvision:{name}"
    known = models.list_models(module=models)
    if name not in known:
        raise UsageError(f"torchvision has no classifier {name!r}", where=place, hint=_close(name, known))
    _no_downloads(options, ("weights", "weights_backbone"), place)
    network = _create(place, lambda: models.get_model(name, weights=None, num_classes=num_classes, **options))
    if in_channels != 3:
        _replace_stem(network, in_channels, place)
    return network


@register("models", "hf:")
def hf(
    name: str,
    num_classes: int = 1000,
    in_channels: int = 3,
    image_size: int | None = None,
    config: dict[str, Any] | None = None,
) -> nn.Module:
    """A Transformers image classifier: a model type (`hf:resnet`, sizes in `config`) or a local directory.

    From a directory its weights are loaded too (safetensors, or `.bin` with weights_only=True).
    """
    place = f"model hf:{name}"
    transformers = _library("transformers", "hf")
    settings = with_config(
        {
            "name": name,
            "num_classes": num_classes,
            "in_channels": in_channels,
            "image_size": image_size,
            "config": config,
        },
        place,
    )["config"]
    model_type = settings["model_type"]
    cfg = _create(place, lambda: transformers.AutoConfig.for_model(**settings))
    classifier = transformers.AutoModelForImageClassification
    if not _has_weights(Path(name)):
        return _create(place, lambda: classifier.from_config(cfg, dtype=torch.float32))
    progress = transformers.utils.logging
    shown = progress.is_progress_bar_enabled()
    progress.disable_progress_bar()
    try:
        network, report = _create(
            place,
            lambda: classifier.from_pretrained(
                name,
                config=cfg,
                local_files_only=True,
                weights_only=True,
                dtype=torch.float32,
                output_loading_info=True,
            ),
        )
    finally:
        if shown:
            progress.enable_progress_bar()
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise UsageError(
            f"the directory lacks {len(missing)} tensors of a {model_type} classifier: {', '.join(missing[:8])}",
            where=place,
            hint="save a network that has its classifier: AutoModelForImageClassification",
        )
    return network


def with_config(bound: dict[str, Any], where: str) -> dict[str, Any]:
    """The arguments of `hf` with the complete configuration in `config`, so that a spec outlives the directory.

    Raises UsageError for an unknown model type, key, or a directory whose classes or channels do not fit.
    """
    if {"model_type", "num_labels"} <= (bound["config"] or {}).keys():
        return bound  # complete already: this is a spec that comes back from JSON
    transformers = _library("transformers", "hf")
    name, given = bound["name"], dict(bound["config"] or {})
    wanted = {
        "num_labels": bound["num_classes"],
        "num_channels": bound["in_channels"],
        "image_size": bound["image_size"],
    }
    if Path(name).is_dir():
        if given:
            raise UsageError("a directory brings its own configuration", where=f"{where}.config", hint="leave it out")
        cfg = _create(where, lambda: transformers.AutoConfig.from_pretrained(name, local_files_only=True))
        _check_directory(cfg, wanted, name, where)
    else:
        known = transformers.models.auto.modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES
        if name not in known:
            download = f"edgekd downloads nothing: hf download {name} --local-dir DIR, then use hf:DIR"
            raise UsageError(
                f"{name!r} is neither a directory nor a type of Transformers image classifier",
                where=where,
                hint=download if "/" in name else _close(name, known),
            )
        defaults = transformers.AutoConfig.for_model(name)
        for key in given:
            if not hasattr(defaults, key):
                raise UsageError("unknown key", where=f"{where}.config.{key}", hint=_close(key, vars(defaults)))
        filled = {k: v for k, v in wanted.items() if v is not None and hasattr(defaults, k)}
        cfg = _create(where, lambda: transformers.AutoConfig.for_model(name, **{**filled, **given}))
    complete = {key: value for key, value in cfg.to_dict().items() if key not in _NOT_ARCHITECTURE}
    return {**bound, "config": {**complete, "model_type": cfg.model_type, "num_labels": cfg.num_labels}}


def _check_directory(cfg: Any, wanted: dict[str, Any], name: str, where: str) -> None:
    for key, value in wanted.items():
        has = getattr(cfg, key, None)
        if key == "image_size" or has is None or has == value:
            continue
        raise UsageError(
            f"the network in {name} has {key} {has}, here {value} are needed",
            where=where,
            hint=f"save it with a new head first: AutoModelForImageClassification.from_pretrained(DIR, {key}={value}, "
            "ignore_mismatched_sizes=True).save_pretrained(NEW)",
        )


def _has_weights(directory: Path) -> bool:
    return any(True for pattern in ("*.safetensors", "*.bin") for _ in directory.glob(pattern))


def _replace_stem(network: nn.Module, channels: int, place: str) -> None:
    """torchvision's builders know RGB only: give the first convolution the data set's number of channels."""
    for path, module in network.named_modules():
        if isinstance(module, nn.Conv2d) and module.in_channels == 3:
            stem = nn.Conv2d(
                channels,
                module.out_channels,
                module.kernel_size,  # type: ignore[arg-type]
                module.stride,  # type: ignore[arg-type]
                module.padding,  # type: ignore[arg-type]
                bias=module.bias is not None,
            )
            network.set_submodule(path, stem)
            return
    raise UsageError(f"cannot give this network {channels} input channels", where=place, hint="use a timm: network")


def _no_downloads(options: dict[str, Any], keys: tuple[str, ...], place: str) -> None:
    for key in keys:
        if key in options:
            raise UsageError(
                "edgekd downloads nothing", where=f"{place}.{key}", hint="give the path of a file as weights instead"
            )


def _create(place: str, make: Any) -> Any:
    try:
        return make()
    except Exception as error:  # the library's own complaint about the user's names, arguments and files
        what = " ".join(str(error).split())[:300]
        raise UsageError(f"{type(error).__name__}: {what}", where=place) from error


def _close(name: str, known: Any) -> str:
    hint = nearest(name, known)
    return (
        hint
        if hint and hint.startswith("did you")
        else f"there are {len(list(known))}, such as {', '.join(sorted(known)[:5])}"
    )


def _library(module: str, extra: str) -> ModuleType:
    root = module.partition(".")[0]
    try:
        _import_torchvision(required=root == "torchvision")
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingExtra(
            f"{root} is not installed: {error}", where=f"model {root}", hint=f"pip install 'edgekd[{extra}]'"
        ) from error


def _import_torchvision(required: bool) -> None:
    """Import torchvision, also a build whose compiled operators do not load beside the installed torch.

    PyPI's torchvision is made for PyPI's CUDA build of torch. Beside the CPU build its library does not load, and
    the import ends with "operator torchvision::nms does not exist", because it describes that operator to the
    tracer. Classifiers never call it, so declaring it is enough for them, and for timm and Transformers.
    """
    try:
        importlib.import_module("torchvision")
    except ImportError:
        if required:
            raise
    except RuntimeError as error:
        if "operator torchvision::" not in str(error):
            raise
        library = torch.library.Library("torchvision", "DEF")
        for operator in ("nms", "qnms"):
            library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _libraries.append(library)
        for name in [n for n in sys.modules if n.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        importlib.import_module("torchvision")
