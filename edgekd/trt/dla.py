"""What the deep learning accelerators (DLA) beside a Jetson's GPU can build, and what they cannot."""

from __future__ import annotations

from ..errors import Problem
from ..jetpack import JETPACKS, numbers, same_line
from ..profile import Profile

__all__ = ["dla_problems"]

#: The only board whose DLA TensorRT 11 builds for. Source: NVIDIA, "Working with DLA" (TensorRT 11.4.1).
BOARD_OF_11 = "Jetson AGX Orin"


def dla_problems(profile: Profile, *, precision: str, dynamic_batch: bool) -> list[Problem]:
    """Everything that keeps a file of this precision from a DLA of the profile's device; empty: nothing does.

    fp16 with static shapes only. Up to TensorRT 10.7 a DLA computes int8 too, but from ranges that a calibrator sets,
    and edgekd's int8 files say theirs with Q/DQ; in 11.4 types come from the file, and NVIDIA's way there is fp16.
    TensorRT 10.8 to 11.3 has no DLA at all. Sources: NVIDIA, "TensorRT Developer Guide", "Working with DLA" (no
    explicit quantization); of TensorRT 11.4.1 "Working with DLA", "Strongly Typed Networks for DLA" and "DLA Supported
    Layers and Restrictions" (dynamic dimensions).
    """
    where = f"profile {profile.name}"
    tensorrt = profile.tensorrt
    if tensorrt is None:
        return [Problem(f"{where}: tensorrt", "no DLA without TensorRT", 'runtime = "tensorrt" and a table [tensorrt]')]
    if tensorrt.dla_cores == 0:
        what = "the device has no DLA: tensorrt.dla_cores is 0"
        return [Problem(f"{where}: tensorrt.dla", what, "leave it out to build for the GPU")]
    found = []
    if (why := _not_built(profile)) is not None:
        hint = f"TensorRT up to 10.7 (JetPack 5 and 6), 11.4.1 with JetPack 7.2.2 on {BOARD_OF_11}, or the GPU"
        found.append(Problem(f"{where}: tensorrt.version", why, hint))
    if precision != "fp16":
        calibrated = precision == "int8" and not tensorrt.strongly_typed
        beside = ": its int8 wants a calibrator, not the Q/DQ of our files" if calibrated else ""
        found.append(Problem(f"{where}: tensorrt.dla", f"the DLA takes fp16 only{beside}, got {precision}", "use fp16"))
    if dynamic_batch:
        hint = "dynamic_batch = false in the stage export"
        found.append(Problem(f"{where}: tensorrt.dla", "the DLA takes static shapes only, got a dynamic batch", hint))
    return found


def _not_built(profile: Profile) -> str | None:
    """Why this TensorRT, or this JetPack, has no DLA."""
    assert profile.tensorrt is not None
    version, jetpack = profile.tensorrt.version, profile.tensorrt.jetpack
    line = numbers(version)[:2]
    if (10, 7) < line < (11, 4):
        return f"TensorRT {version} has no DLA: 10.7 was the last before 11.4"
    if line >= (11, 4) and profile.product != BOARD_OF_11:
        return f"TensorRT {version} has the DLA of {BOARD_OF_11} only, got {profile.product}"
    known = next((p for p in JETPACKS if p.version == jetpack), None)
    if known is not None and not same_line(version, known.dla):
        return f"JetPack {jetpack} has no DLA with TensorRT {version}"
    return None
