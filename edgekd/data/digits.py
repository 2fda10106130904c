"""scikit-learn's real handwritten digits: the data set that needs no download."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field

from ..registry import register
from .source import Source, Split, stratified

__all__ = ["digits"]


@register("data", "digits")
def digits(size: Annotated[int, Field(ge=8)] = 32, channels: Literal[1, 3] = 3) -> Source:
    """1,797 real 8x8 digits (Alpaydin, Kaynak 1998), enlarged bilinearly; a fixed stratified fifth is for testing."""
    from sklearn.datasets import load_digits  # here: it takes a second to import

    bunch = load_digits()
    grey = torch.from_numpy(bunch.images).float()[:, None] * (255 / 16)
    large = torch.nn.functional.interpolate(grey, (size, size), mode="bilinear", align_corners=False)
    everything = Split(
        large.round().to(torch.uint8).repeat(1, channels, 1, 1), torch.from_numpy(bunch.target).to(torch.int64)
    )
    train, test = stratified(everything.labels, 0.2, torch.Generator().manual_seed(0))
    return Source(everything.take(train), everything.take(test), [str(digit) for digit in range(10)])
