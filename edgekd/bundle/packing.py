"""A directory as one file, the same bytes for the same content."""

from __future__ import annotations

import gzip
import io
import os
import tarfile
from pathlib import Path

import zstandard

__all__ = ["ENDINGS", "packed"]

#: zstd is smaller and faster; gzip is what every device unpacks.
ENDINGS = (".tar.zst", ".tar.gz")


def packed(directory: Path, name: str, destination: Path) -> None:
    """Write the files of `directory`, as directory `name`, to `destination`, whose ending says how. Raises OSError."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for path in sorted(directory.iterdir()):
            info = tarfile.TarInfo(f"{name}/{path.name}")
            info.size, info.mode = path.stat().st_size, 0o755 if path.name == "run.py" else 0o644
            with path.open("rb") as stream:
                tar.addfile(info, stream)
    content = buffer.getvalue()
    if destination.name.endswith(".tar.zst"):
        content = zstandard.ZstdCompressor(level=10).compress(content)
    else:
        content = gzip.compress(content, mtime=0)
    temporary = destination.with_name(f".{destination.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, destination)
    finally:
        temporary.unlink(missing_ok=True)
