"""What profiles consist of: how a device is measured, the TensorRT that it has, and its maker's figures."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

__all__ = ["Datasheet", "Protocol", "TensorRT"]


class Protocol(BaseModel):
    """How latency is measured on this device."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    batch: int = Field(1, gt=0)
    rounds: int = Field(12, ge=3, description="at least; each variant is measured once per round, in random order")
    precision: float = Field(
        0.01, gt=0, description="rounds go on until every median and ratio is known within this share of it"
    )
    block_s: float = Field(0.15, gt=0, description="seconds of consecutive calls per variant and round")
    warmup_s: float = Field(0.3, ge=0, description="at least so many seconds of calls, and then until they are steady")
    cap_s: float = Field(60.0, gt=0, description="no further round is begun after so many seconds")
    scenarios: list[Literal["single-stream", "batch", "offline"]] = Field(
        default=["single-stream", "batch"],
        description="latency of single calls is always measured; throughput per batch size; a whole set at once",
    )
    batches: list[Annotated[int, Field(gt=0)]] = Field(
        default=[1, 8, 32], min_length=1, description="batch sizes of the scenarios batch and offline"
    )


class TensorRT(BaseModel):
    """The TensorRT that a device has, and how engines are built with it."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    version: str = Field(pattern=r"^\d+\.\d+(\.\d+)*$", description="as on the device: 8.6, 10.3, 11.0")
    jetpack: str | None = Field(
        None, pattern=r"^\d+\.\d+(\.\d+)*$", description="the JetPack that brings it, on a Jetson: 6.2, 7.2.1"
    )
    dla_cores: int = Field(0, ge=0, description="deep learning accelerators beside the GPU")
    dla: int | None = Field(None, ge=0, description="the accelerator to build engines for; none: for the GPU")
    optimization_level: int = Field(3, ge=0, le=5, description="how long the builder searches for kernels")
    workspace_mb: int | None = Field(None, gt=0, description="memory the builder may use; none: as much as there is")
    version_compatible: bool = Field(
        False, description="engines that later versions of the same major TensorRT run, too; larger, may be slower"
    )
    hardware_compatibility: Literal["none", "same-compute-capability", "ampere-plus"] = Field(
        "none", description="which other GPUs run the engines, too; may be slower"
    )

    @property
    def strongly_typed(self) -> bool:
        """Whether it takes types from the file only: version 11 has no other builds."""
        return int(self.version.partition(".")[0]) >= 11


class Datasheet(BaseModel):
    """A device's peak figures, dense (no structured sparsity), as its maker gives them."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    int8_tops: float | None = Field(None, gt=0)
    fp16_tflops: float | None = Field(None, gt=0)
    bf16_tflops: float | None = Field(None, gt=0)
    fp32_tflops: float | None = Field(None, gt=0)
    bandwidth_gb_s: float = Field(gt=0, description="of the memory, in 10^9 bytes a second")
    cache_mb: float | None = Field(None, gt=0, description="all caches: what fits need not come from the memory")
    source: str = Field(description="where the figures stand")
