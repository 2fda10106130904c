"""NumPy archives of arrays."""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path

import numpy as np

from ..errors import UsageError
from ..registry import register
from .arrays import Layout, image_tensor, label_tensor
from .source import Source, Split

__all__ = ["npz"]


@register("data", "npz")
def npz(file: Path, layout: Layout = "NHWC", classes: list[str] | None = None) -> Source:
    """A .npz file with x_train, y_train, x_test, y_test (and x_val, y_val): images as `layout` says, integer labels.

    Images are uint8, or floating point in [0, 1]; grey ones may be [N, H, W].
    """
    file = file.expanduser()
    arrays = _read(file)
    pairs = [("x_train", "y_train"), ("x_test", "y_test"), ("x_val", "y_val")][: 3 if "x_val" in arrays else 2]
    splits = [
        Split(image_tensor(arrays[x], layout, f"{file}, {x}"), label_tensor(arrays[y], f"{file}, {y}"))
        for x, y in pairs
    ]
    if classes is None:
        count = max((int(split.labels.max()) + 1 for split in splits if len(split)), default=0)
        classes = [str(label) for label in range(max(count, 1))]
    return Source(splits[0], splits[1], classes, splits[2] if len(splits) == 3 else None)


def _read(file: Path) -> dict[str, np.ndarray]:
    hint = "write it with np.savez or np.savez_compressed"
    try:
        loaded = np.load(file, allow_pickle=False)
        if not isinstance(loaded, np.lib.npyio.NpzFile):
            raise UsageError("holds one array, expected an archive (.npz)", where=str(file), hint=hint)
        with loaded as archive:
            known = archive.files
            wanted = ["x_train", "y_train", "x_test", "y_test"]
            if "x_val" in known or "y_val" in known:
                wanted += ["x_val", "y_val"]
            missing = [name for name in wanted if name not in known]
            if missing:
                there = f"it has: {', '.join(known) or 'nothing'}"
                raise UsageError(f"has no array {', '.join(missing)}", where=str(file), hint=there)
            return {name: archive[name] for name in wanted}
    except FileNotFoundError as error:
        raise UsageError("no such file", where=str(file), hint="data.file is relative to here") from error
    except OSError as error:
        raise UsageError(f"cannot be read: {error.strerror or error}", where=str(file), hint=hint) from error
    except (ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        objects = "Object arrays" in str(error)
        raise UsageError(
            "holds Python objects, which need pickle: edgekd does not run code from files"
            if objects
            else "is damaged, or no .npz file",
            where=str(file),
            hint="convert the arrays to numbers of one shape and type" if objects else hint,
        ) from error
