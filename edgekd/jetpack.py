"""Which CUDA, cuDNN, TensorRT and Python a JetPack brings, on which boards, and what its TensorRT takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .errors import UsageError

__all__ = [
    "JETPACKS",
    "JetPack",
    "closest",
    "highest_opset",
    "numbers",
    "of_l4t",
    "of_tensorrt",
    "release",
    "same_line",
]

XAVIER, ORIN, THOR = "7.2", "8.7", "11.0"
#: JetPack 6.1 and later 6.x: TensorRT for the same CUDA that NVIDIA lists for JetPack beside what is flashed.
#: Sources: NVIDIA, "TensorRT Support Matrix" of 10.6 (JetPack 10.6.x, CUDA 12.6 update 2) and of 10.14.1 (JetPack
#: 10.7.x, CUDA 12.6 update 3).
LATER_10 = ("10.6", "10.7")


@dataclass(frozen=True)
class JetPack:
    """One release; versions as NVIDIA writes them, in as many numbers as could be found."""

    version: str
    l4t: tuple[str, ...]
    cuda: str
    #: None where no source was found.
    cudnn: str | None
    #: What it installs.
    tensorrt: str
    python: str
    #: Compute capabilities of the GPUs of the boards that it runs on.
    boards: tuple[str, ...]
    source: str
    #: Lines of TensorRT that NVIDIA supports on it beside the one that it installs.
    also: tuple[str, ...] = ()
    #: Lines of TensorRT that run networks on the DLA of a board that has one, with this JetPack; empty: none.
    dla: tuple[str, ...] = ()


def _five(version: str, *l4t: str) -> JetPack:
    # cuDNN: Jetson-AI-task's table of JetPacks (5.1.1, 5.1.2). DLA: TensorRT 8.5's operator tables of Orin's DLA.
    source = 'NVIDIA, "JetPack 5.1.4 Release Notes" and "JetPack Archive"; L4T: dusty-nv/jetson-containers'
    return JetPack(
        version, l4t, "11.4", "8.6.0", "8.5.2", "3.8", (XAVIER, ORIN), source, dla=("8.5",)
    )  # fmt: skip


def _six(version: str, *l4t: str, source: str) -> JetPack:
    lines = ("10.3", *LATER_10)
    return JetPack(version, l4t, "12.6", "9.3.0", "10.3.0", "3.10", (ORIN,), source, LATER_10, lines)


#: Oldest first. What runs on the DLA follows NVIDIA, "Working with DLA" (TensorRT 11.4.1): 10.7 was the last 10.x with
#: it, 11.0 to 11.3 have none, 11.4.1 has it on Jetson AGX Orin from JetPack 7.2.2 on; Thor has no DLA.
JETPACKS: tuple[JetPack, ...] = (
    _five("5.1", "35.2.1"),
    _five("5.1.1", "35.3.1"),
    _five("5.1.2", "35.4.1"),
    _five("5.1.3", "35.5.0"),
    _five("5.1.4", "35.6.0"),
    _five("5.1.5", "35.6.1", "35.6.2"),
    JetPack(
        "6.0",
        ("36.3.0",),
        "12.2",
        "8.9.4",
        "8.6.2",
        "3.10",
        (ORIN,),
        "Debian packages of a flashed board (libnvinfer8 8.6.2.3-1+cuda12.2, libcudnn8 8.9.4.25-1+cuda12.2)",
        dla=("8.6",),
    ),
    _six(
        "6.1", "36.4.0", source='Torch-TensorRT, "Torch-TensorRT in JetPack 6.1": CUDA 12.6, TensorRT 10.3, cuDNN 9.3'
    ),
    _six("6.2", "36.4.3", source='Torch-TensorRT, "Torch-TensorRT in JetPack": CUDA 12.6, TensorRT 10.3, cuDNN 9.3'),
    _six(
        "6.2.1",
        "36.4.4",
        "36.4.7",
        source='NVIDIA, "Introduction to NVIDIA JetPack SDK" (L4T 36.4.4); Debian packages of boards with 36.4.7',
    ),
    _six("6.2.2", "36.5.0", source="Debian packages of flashed boards (libnvinfer10 10.3.0.30, libcudnn9 9.3.0.75)"),
    # Of 6.2.3 only its L4T was found; the rest is that of all 6.2.x.
    _six("6.2.3", "36.5.2", source="NVIDIA's JetPack archive as others' tables of 2026 have it: not verified"),
    JetPack(
        "7.0",
        ("38.2.0", "38.2.1", "38.2.2"),
        "13.0",
        "9.12.0",
        "10.13.3",
        "3.12",
        (THOR,),
        'NVIDIA, "JetPack SDK Downloads and Notes" of 7.0 (L4T); CUDA: TensorRT Edge-LLM, "Official Support Matrix"; '
        "TensorRT and cuDNN as in 7.1, not verified",
    ),
    JetPack(
        "7.1",
        ("38.4.0",),
        "13.0",
        "9.12.0",
        "10.13.3",
        "3.12",
        (THOR,),
        'NVIDIA, "JetPack SDK Downloads and Notes" of 7.1, quoted in NVIDIA/IsaacTeleop pull request 1050',
    ),
    JetPack(
        "7.2",
        ("39.2.0",),
        "13.2",
        None,
        "10.16.2",
        "3.12",
        (ORIN, THOR),
        "NVIDIA-ISAAC-ROS/isaac-ros-cli issue 22 (L4T R39.2.0, CUDA 13.2.1, TensorRT 10.16.2.10)",
    ),
    JetPack(
        "7.2.1",
        ("39.2.1",),
        "13.2",
        None,
        "10.16.2",
        "3.12",
        (ORIN, THOR),
        'TensorRT Edge-LLM, "Official Support Matrix" (7.2.x: CUDA 13.2); a flashed board (L4T 39.2.1, 10.16.2.10)',
    ),
    # What 7.2.2 itself installs was not found: taken as in 7.2.1.
    JetPack(
        "7.2.2",
        (),
        "13.2",
        None,
        "10.16.2",
        "3.12",
        (ORIN, THOR),
        'NVIDIA, "Migrating TensorRT from 10.x to 11.x on Jetson/JetPack" (11.4.1: JetPack 7.2.2 or later)',
        also=("11.4",),
        dla=("11.4",),
    ),
)

#: The highest opset of a TensorRT's ONNX parser, from this version on. Sources: onnx-tensorrt's docs/operators.md
#: ("8.5 supports operators up to Opset 17", the same for 8.6; "10.15 ... inclusive range of opset 9 to opset 24"),
#: NVIDIA/TensorRT issue 4336 ("10.0 ... opset 9 to opset 20"), NVIDIA/TensorRT release v11.5 ("support for ONNX opset
#: 25"). Between 10.0 and 10.15 it may be higher than 20: not verified, and nobody needs it.
OPSETS = (("8.5", 17), ("10.0", 20), ("10.15", 24), ("11.5", 25))


def numbers(version: str) -> tuple[int, ...]:
    """`"10.3"` as (10, 3), to be compared."""
    return tuple(map(int, version.split(".")))


def release(jetpack: str) -> JetPack:
    """The JetPack of that version. Raises UsageError with the nearest one."""
    for known in JETPACKS:
        if known.version == jetpack:
            return known
    raise UsageError(f"no JetPack {jetpack!r} is known", where="jetpack", hint=f"the nearest is {closest(jetpack)}")


def closest(jetpack: str) -> str:
    """The newest known JetPack that is not newer than `jetpack`; the oldest where it is older than all."""
    older = [p.version for p in JETPACKS if numbers(p.version) <= numbers(jetpack)]
    return older[-1] if older else JETPACKS[0].version


def of_l4t(l4t: str) -> JetPack | None:
    """The JetPack that an L4T release (`36.4.3`) belongs to; None for one that is not in the table."""
    return next((p for p in JETPACKS if l4t in p.l4t), None)


def of_tensorrt(tensorrt: str, board: str | None = None) -> JetPack | None:
    """The newest JetPack with this TensorRT, for boards of this compute capability; None where there is none."""
    fitting = (p for p in reversed(JETPACKS) if board is None or board in p.boards)
    return next((p for p in fitting if same_line(tensorrt, (p.tensorrt, *p.also))), None)


def same_line(version: str, lines: Sequence[str]) -> bool:
    """Whether a version is of one of these lines: two are of one where major and minor number are."""
    return numbers(version)[:2] in [numbers(line)[:2] for line in lines]


def highest_opset(tensorrt: str) -> int | None:
    """The highest ONNX opset that this TensorRT's parser takes; None for versions before 8.5."""
    older = [opset for first, opset in OPSETS if numbers(first) <= numbers(tensorrt)]
    return older[-1] if older else None
