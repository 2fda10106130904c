"""Folders of pictures, one sub-folder per class."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from pydantic import Field

from ..errors import UsageError
from ..registry import register
from .files import directory
from .source import Source, Split

__all__ = ["image_folder"]

_ENDINGS = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"}
_TREE = "expected ROOT/train/CLASS/*.png, ROOT/test/CLASS/*.png, and optionally ROOT/validation/CLASS/*.png"


@register("data", "image-folder")
def image_folder(root: Path, size: Annotated[int, Field(gt=0)]) -> Source:
    """Pictures in ROOT/train/CLASS and ROOT/test/CLASS (and ROOT/val or ROOT/validation), read as RGB.

    The shorter side is resized to `size` pixels (bilinear, antialiased) and the centre is cut out. Every picture is
    kept in memory: 3 * size * size bytes each.
    """
    root = directory(root, _TREE)
    held = [root / name for name in ("val", "validation") if (root / name).is_dir()]
    if len(held) == 2:
        raise UsageError("has both val and validation", where=str(root), hint="keep one of the two")
    train, test = directory(root / "train", _TREE), directory(root / "test", _TREE)
    classes = [folder.name for folder in _class_folders(train)]
    splits = [_split(folder, classes, size) for folder in (train, test, *held)]
    return Source(splits[0], splits[1], classes, splits[2] if held else None)


def _class_folders(folder: Path) -> list[Path]:
    found = sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    if not found:
        raise UsageError("has no class folders", where=str(folder), hint=_TREE)
    return found


def _split(folder: Path, classes: list[str], size: int) -> Split:
    files: list[Path] = []
    labels: list[int] = []
    for class_folder in _class_folders(folder):
        if class_folder.name not in classes:
            raise UsageError(
                f"the class {class_folder.name!r} is in {folder.name}, but training never saw it",
                where=str(class_folder),
                hint=f"there is no train/{class_folder.name}; training has: {', '.join(classes[:10])}",
            )
        pictures = sorted(p for p in class_folder.iterdir() if p.suffix.lower() in _ENDINGS and p.name[0] != ".")
        if not pictures:
            raise UsageError(
                "has no pictures", where=str(class_folder), hint=f"endings read: {', '.join(sorted(_ENDINGS))}"
            )
        files += pictures
        labels += [classes.index(class_folder.name)] * len(pictures)
    images = torch.empty((len(files), 3, size, size), dtype=torch.uint8)

    def read(row: int) -> None:
        images[row] = torch.from_numpy(_picture(files[row], size)).permute(2, 0, 1)

    pool = ThreadPoolExecutor()  # Pillow decodes without holding the interpreter lock
    try:
        for _ in pool.map(read, range(len(files))):
            pass
    finally:
        pool.shutdown(cancel_futures=True)
    return Split(images, torch.tensor(labels, dtype=torch.int64))


def _picture(file: Path, size: int) -> np.ndarray:
    """uint8 [size, size, 3]. Raises UsageError naming the file."""
    try:
        with Image.open(file) as opened:
            mode = opened.mode
            picture = ImageOps.exif_transpose(opened).convert("RGB")
    except Exception as error:  # Pillow's decoders raise many kinds on damaged files
        what = "not a picture Pillow knows" if isinstance(error, UnidentifiedImageError) else str(error)
        raise UsageError(f"cannot be read as a picture: {what}", where=str(file), hint="mend or delete it") from error
    if mode[0] in "IF":  # converting these to RGB clips them to white without a word
        raise UsageError(
            f"more than 8 bits per channel (mode {mode})", where=str(file), hint="convert it to 8 bits, or use npz"
        )
    width, height = picture.size
    scale = size / min(width, height)
    wide, high = max(size, round(width * scale)), max(size, round(height * scale))
    left, top = (wide - size) // 2, (high - size) // 2
    resized = picture.resize((wide, high), Image.Resampling.BILINEAR)
    return np.array(resized.crop((left, top, left + size, top + size)))
