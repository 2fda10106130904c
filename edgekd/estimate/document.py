"""What `edgekd estimate` finds, as one document."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from ..bench.results import Estimate
from .fitted import Fit
from .roofline import Roofline

__all__ = ["Estimated", "Estimates"]

SCHEMA = 1


class Estimated(BaseModel):
    """One file."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    name: str
    roofline: Roofline
    estimate: Estimate


class Estimates(BaseModel):
    """Every time in it is estimated; measured are only the `known` networks of the fit."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    schema_version: int = SCHEMA
    origin: Literal["estimated"] = "estimated"
    profile: str
    device: str
    power_mode: str | None
    source: str = Field(description="of the datasheet's figures")
    caches_known: bool = Field(description="whether lower bounds count bytes")
    files: list[Estimated]
    fit: Fit | None = None
