"""The student that a recipe leaves to measurement: `edgekd.students` chooses it when a run is planned."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field
from torch import nn

from ..errors import UsageError
from ..registry import register

__all__ = ["auto"]


@register("models", "auto")
def auto(
    family: Annotated[
        Literal["cifar-resnet", "mobilenet", "vit"], Field(description="what `edgekd students` measures")
    ],
    profile: Annotated[str | None, Field(description="where it must be fast; default: the recipe's first")] = None,
    p50_ms: Annotated[float | None, Field(gt=0, description="its median latency at most, in ms")] = None,
    speedup: Annotated[
        float | None, Field(gt=0, description="instead: how many times faster than the first teacher in fp32 at least")
    ] = None,
    precision: Annotated[Literal["fp32", "int8"], Field(description="the precision it will be deployed in")] = "int8",
) -> nn.Module:
    """The member of a family with the most MACs that is fast enough on a profile, by measurement.

    For the `model` of a distillation or of one of its `students`.
    """
    raise UsageError("auto stands for a student: it builds nothing by itself", hint="only in a distill stage")
