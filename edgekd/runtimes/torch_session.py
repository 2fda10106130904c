"""PyTorch itself, on the CPU or on a GPU: what a network costs without leaving the framework."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from ..artifact import TensorInfo
from ..errors import StageError, UsageError
from ..registry import register
from .cuda import CudaCall, need_cuda, run_once
from .session import Feed, check_feed

if TYPE_CHECKING:
    import torch

__all__ = ["Precision", "TorchSession", "open_torch"]

Precision = Literal["fp32", "fp16", "bf16"]
DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


class TorchSession:
    """A `Session` on a network in one precision; inputs and outputs stay float32, and are converted on the device.

    In half precision the memory format is channels last, which its convolution kernels want. On a GPU, fp32 means
    what torch means by it: convolutions may use TF32.
    """

    def __init__(
        self,
        network: torch.nn.Module,
        inputs: Sequence[TensorInfo],
        outputs: Sequence[TensorInfo],
        where: str,
        *,
        device: Literal["cpu", "cuda"] = "cpu",
        precision: Precision = "fp32",
        cuda_graphs: bool = True,
    ) -> None:
        import torch

        self.inputs, self.outputs, self.metadata = list(inputs), list(outputs), dict[str, str]()
        self._where, self._graphs = where, cuda_graphs
        self._device = need_cuda("the runtime torch on a GPU") if device == "cuda" else torch.device("cpu")
        self._type = getattr(torch, DTYPES[precision])
        self._format = torch.preserve_format if precision == "fp32" else torch.channels_last
        move: Any = network.to  # its memory_format is in no annotation
        self._network: torch.nn.Module | None = move(device=self._device, dtype=self._type, memory_format=self._format)
        self._stream = torch.cuda.Stream() if device == "cuda" else None

    def run(self, feed: Feed) -> Feed:
        import torch

        inputs, launch = self._prepared(feed)
        if self._stream is not None:
            return self._guarded(lambda stream: run_once(feed, inputs, launch, stream))
        with torch.inference_mode():
            return {name: value.numpy() for name, value in self._guarded(lambda _: launch()).items()}

    def bound(self, feed: Feed) -> Callable[[], None]:
        import torch

        inputs, launch = self._prepared(feed)
        if self._stream is not None:
            return self._guarded(lambda stream: CudaCall(feed, inputs, launch, stream, graph=self._graphs))
        inference = torch.inference_mode

        def call() -> None:
            with inference():
                launch()

        self._guarded(lambda _: call())
        return call

    def close(self) -> None:
        self._network = None

    def _guarded(self, work: Callable[[Any], Any]) -> Any:
        try:
            return work(self._stream)
        except AssertionError as error:  # an exported program's guards
            what = f"the program was not exported for this input: {error}"
            raise UsageError(what, where=self._where, hint="export it with a dynamic batch") from error
        except (RuntimeError, NotImplementedError) as error:
            hint = "a network that waits for the GPU cannot be a CUDA graph: set cuda_graphs = false in the profile"
            graphs = self._stream is not None and self._graphs
            raise StageError(
                f"torch failed: {str(error).strip().partition(chr(10))[0]}",
                where=self._where,
                hint=hint if graphs else None,
            ) from error

    def _prepared(self, feed: Feed) -> tuple[dict[str, torch.Tensor], Callable[[], Mapping[str, torch.Tensor]]]:
        """Inputs on the device, and what computes the named outputs from them."""
        import torch

        network, wanted, names = self._network, self._type, [info.name for info in self.outputs]
        if network is None:
            raise StageError("this session is closed", where=self._where)
        check_feed(self.inputs, feed, self._where)
        inputs = {
            name: torch.from_numpy(np.ascontiguousarray(array)).to(self._device, copy=True)
            for name, array in feed.items()
        }
        ordered = [inputs[info.name] for info in self.inputs]
        formats = [self._format if value.dim() == 4 else torch.preserve_format for value in ordered]

        def launch() -> Mapping[str, torch.Tensor]:
            converted = [
                value.to(wanted, memory_format=layout) if value.is_floating_point() else value
                for value, layout in zip(ordered, formats, strict=True)
            ]
            return _floats(network(*converted), names)

        return inputs, launch


def _floats(outputs: Any, names: Sequence[str]) -> dict[str, torch.Tensor]:
    """What a network returned, as float32 by name: a dictionary has names, a tensor or a sequence gets them."""
    if not isinstance(outputs, Mapping):
        values = outputs if isinstance(outputs, Sequence) else [outputs]
        outputs = dict(zip(names, values, strict=True))
    return {name: outputs[name].float() for name in names}


@register("runtimes", "torch")
def open_torch(
    file: Path,
    threads: int = 1,
    profile_dir: Path | None = None,
    device: Literal["cpu", "cuda"] = "cpu",
    precision: Precision = "fp32",
    cuda_graphs: bool = True,
) -> TorchSession:
    """Open an exported program (`torch.export.save`, .pt2) with `threads` threads inside an operator.

    `profile_dir` means nothing here. An exported program is code: open only those of people you trust. Programs that
    need pickle to be loaded are refused. Raises UsageError (no such file, or no such program), MissingExtra or
    StageError (device cuda without it).
    """
    import torch

    _refuse_pickle(Path(file))
    torch.set_num_threads(threads)
    try:
        program = torch.export.load(file)
        inputs, outputs = _signature(program)
        network = program.module()
    except Exception as error:  # its exceptions have no common base class
        raise UsageError(
            f"not an exported program that torch {torch.__version__} can open: {str(error).partition(chr(10))[0]}",
            where=str(file),
            hint="programs of another torch may not open: export it again",
        ) from error
    return TorchSession(
        network, inputs, outputs, str(file), device=device, precision=precision, cuda_graphs=cuda_graphs
    )


def _refuse_pickle(file: Path) -> None:
    """torch.export.load unpickles what it finds pickled, without asking: tensor subclasses and script objects."""
    import torch

    where = str(file)
    try:
        with zipfile.ZipFile(file) as archive:
            for name in archive.namelist():
                if name.endswith("_config.json"):
                    entries = json.loads(archive.read(name)).get("config", {}).values()
                    if any(entry.get("use_pickle") for entry in entries):
                        raise UsageError("holds pickled objects, which edgekd does not load", where=where)
                elif "/sample_inputs/" in name:
                    with archive.open(name) as stream:
                        torch.load(stream, weights_only=True)
    except OSError as error:
        raise UsageError(
            f"cannot be read: {error.strerror}", where=where, hint="expected a .pt2, from torch.export.save"
        ) from error
    except UsageError:
        raise
    except Exception as error:  # not a zip archive, or one with something else inside
        raise UsageError(
            f"not an exported program: {str(error).partition(chr(10))[0]}", where=where, hint="torch.export.save"
        ) from error


def _signature(program: Any) -> tuple[list[TensorInfo], list[TensorInfo]]:
    nodes = {node.name: node for node in program.graph.nodes}
    signature = program.graph_signature
    structure = program.call_spec.out_spec
    named = structure.context if structure.type is dict else None
    outputs = [nodes[name] for name in signature.user_outputs]
    names = list(named) if named is not None and len(named) == len(outputs) else list(signature.user_outputs)
    return (
        [_info(name, nodes[name].meta["val"]) for name in signature.user_inputs],
        [_info(name, node.meta["val"]) for name, node in zip(names, outputs, strict=True)],
    )


def _info(name: str, value: Any) -> TensorInfo:
    """Of a fake tensor: symbolic sizes are names."""
    kind = str(value.dtype).removeprefix("torch.")
    axes: list[str | int] = [size if isinstance(size, int) else "batch" if i == 0 else str(size)
                             for i, size in enumerate(value.shape)]  # fmt: skip
    return TensorInfo(name=name, dtype="float32" if value.is_floating_point() else kind, axes=axes)
