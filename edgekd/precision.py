"""What a training computes in, and where its memory comes from."""

from __future__ import annotations

import contextlib
import ctypes

import torch

from .errors import UsageError
from .recipe import Training

__all__ = ["autocast", "keep_freed_memory", "precision_of"]


def precision_of(settings: Training) -> str:
    """`bf16` where the GPU has it or the CPU multiplies it in tiles (AMX), else `fp32`; or what the settings ask for.

    Raises UsageError for fp16 without a GPU.
    """
    if settings.precision == "fp16" and not torch.cuda.is_available():
        raise UsageError("fp16 trains on GPUs only", where="precision", hint="use 'auto', 'bf16' or 'fp32'")
    if settings.precision != "auto":
        return settings.precision
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    # The vector instructions alone (AVX512-BF16) are no reason: with them bf16 steps take longer than fp32's.
    return "bf16" if torch.cpu._is_amx_tile_supported() else "fp32"


def autocast(settings: Training) -> torch.autocast:
    """The mixed precision that training by these settings uses, as a context."""
    precision = precision_of(settings)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.float16 if precision == "fp16" else torch.bfloat16
    return torch.autocast(device, dtype, enabled=precision != "fp32")


def keep_freed_memory() -> None:
    """Let glibc keep big blocks that are freed: page faults of fresh ones cost a tenth of a training step on a CPU."""
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        m_trim_threshold, m_mmap_threshold = -1, -3
        libc.mallopt(m_mmap_threshold, 32 << 20)
        libc.mallopt(m_trim_threshold, (2 << 30) - 1)
