"""A user's own weights file into a network, or an exact account of what did not fit."""

from __future__ import annotations

import itertools
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from ..errors import UsageError

__all__ = ["load_weights"]

_PICKLED = (".bin", ".pt", ".pth", ".th")
#: Where training scripts put the state dict; averaged weights first, as timm does, for they are what gets published.
_WRAPPERS = ("state_dict_ema", "state_dict", "model_state_dict", "model")
#: Put before every key by DataParallel, by Lightning-like wrappers and by torch.compile.
_PREFIXES = ("module.", "model.", "_orig_mod.")
_SHOWN = 8


def load_weights(
    module: nn.Module, path: str | Path, *, prefix: str | dict[str, str] = "", where: str = "weights"
) -> None:
    """Load `.safetensors`, or `.pt`, `.pth`, `.th`, `.bin` with `weights_only=True`, into `module`.

    `prefix = "student."` takes only the keys that begin so and strips it; `prefix = {"encoder." = "layers."}`
    replaces beginnings and leaves other keys as they are. Without one, `module.`, `model.` and `_orig_mod.` are
    stripped where that makes more keys fit. Values are cast to the network's dtype.

    Raises UsageError: no such file, damaged, refused (Python objects in a pickle), or keys that do not fit, with
    all missing and unexpected ones and those of a wrong shape.
    """
    path = Path(path)
    stored = _read(path, where)
    expected = module.state_dict()
    if isinstance(prefix, dict):
        stored = _rename(stored, prefix, f"{path} ({where})")
    elif prefix:
        stored = {key.removeprefix(prefix): value for key, value in stored.items() if key.startswith(prefix)}
    else:
        stored = _without_common_prefixes(stored, expected)
    _check(stored, expected, f"{path} ({where})")
    module.load_state_dict({**expected, **stored})


def _read(path: Path, where: str) -> dict[str, Tensor]:
    place = f"{path} ({where})"
    if not path.is_file():
        raise UsageError("no such weights file", where=place, hint="relative paths start at the working directory")
    if path.suffix not in (".safetensors", *_PICKLED):
        raise UsageError(
            f"unknown kind of weights file {path.suffix or path.name!r}",
            where=place,
            hint=f"one of: .safetensors {' '.join(_PICKLED)}",
        )
    damaged = "the file is truncated or corrupted"
    again = "compare its size or checksum with the source's and copy it again"
    try:
        if path.suffix == ".safetensors":
            return dict(safetensors.torch.load_file(str(path)))
        content = torch.load(path, map_location="cpu", weights_only=True)
    except SafetensorError as error:
        raise UsageError(f"{damaged}: {error}", where=place, hint=again) from error
    except pickle.UnpicklingError as error:
        found = re.search(r"(?:Unsupported (?:global|class|type):? ?(?:GLOBAL )?|GLOBAL )([\w.]+)", str(error))
        if found is None:
            raise UsageError(f"{damaged}: {str(error).splitlines()[-1]}", where=place, hint=again) from error
        raise UsageError(
            f"refused: the file holds Python objects ({found[1]}), and unpickling them could run code; "
            "edgekd reads tensors only (weights_only=True)",
            where=place,
            hint="where you trust the file, write its tensors alone: "
            "safetensors.torch.save_file(model.state_dict(), 'weights.safetensors')",
        ) from error
    except Exception as error:  # torch.load fails on damaged files in many ways: RuntimeError, EOFError, KeyError, ...
        raise UsageError(f"{damaged}: {str(error).partition(chr(10))[0]}", where=place, hint=again) from error
    return _unwrap(content, place)


def _unwrap(content: Any, place: str) -> dict[str, Tensor]:
    for name in _WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(name), Mapping):
            content = content[name]
    tensors = {k: v for k, v in content.items() if isinstance(v, Tensor)} if isinstance(content, Mapping) else {}
    if not tensors:
        keys = f" with the keys {sorted(map(str, content))[:_SHOWN]}" if isinstance(content, Mapping) else ""
        raise UsageError(
            f"holds no state dict, but {type(content).__name__}{keys}",
            where=place,
            hint="write one with torch.save(model.state_dict(), path)",
        )
    return tensors


def _rename(stored: dict[str, Tensor], mapping: dict[str, str], place: str) -> dict[str, Tensor]:
    renamed: dict[str, Tensor] = {}
    for key, value in stored.items():
        old = max((p for p in mapping if key.startswith(p)), key=len, default="")
        new = mapping[old] + key.removeprefix(old) if old in mapping else key
        if new in renamed:
            raise UsageError(f"the prefix mapping gives two tensors the name {new!r}", where=place)
        renamed[new] = value
    return renamed


def _without_common_prefixes(stored: dict[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    best, fits = stored, len(stored.keys() & expected.keys())
    for length in (1, 2, 3):
        for parts in itertools.product(_PREFIXES, repeat=length):
            candidate = {key.removeprefix("".join(parts)): value for key, value in stored.items()}
            found = len(candidate.keys() & expected.keys())
            if found > fits and len(candidate) == len(stored):
                best, fits = candidate, found
    return dict(best)


def _check(stored: dict[str, Tensor], expected: Mapping[str, Tensor], place: str) -> None:
    shapes = [
        f"{key} found {list(stored[key].shape)} expected {list(expected[key].shape)}"
        for key in expected
        if key in stored and stored[key].shape != expected[key].shape
    ]
    lists = {
        # Files from before PyTorch 0.4.1 lack that counter; it matters only to a BN with momentum None.
        "missing": [key for key in expected if key not in stored and not key.endswith("num_batches_tracked")],
        "unexpected": [key for key in stored if key not in expected],
        "wrong shape": shapes,
    }
    if not any(lists.values()):
        return
    fitting = len(stored.keys() & expected.keys()) - len(shapes)
    lines = [f"{fitting} of the network's {len(expected)} tensors fit"]
    for what, keys in lists.items():
        if keys:
            more = f", and {len(keys) - _SHOWN} more" if len(keys) > _SHOWN else ""
            lines.append(f"  {len(keys)} {what}: {', '.join(keys[:_SHOWN])}{more}")
    if shapes and len(shapes) < 4 and not lists["missing"] and not lists["unexpected"]:
        hint = "only these layers differ: is it the same number of classes, input channels and width?"
    elif fitting or shapes:
        hint = "is this the right variant (depth, width, number of classes) of the network?"
    else:
        hint = 'rename beginnings of keys with prefix = { "old." = "new." }'
    raise UsageError("\n".join(lines), where=place, hint=hint)
