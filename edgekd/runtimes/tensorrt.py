"""TensorRT: engines that were built on this machine."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..artifact import TensorInfo
from ..errors import MissingExtra, StageError, UsageError
from ..registry import register
from . import doctor
from .cuda import CudaCall, Launch, need_cuda, run_once
from .engine_file import EngineMetadata, Here, check_engine, driver_version, engine_of, read_engine
from .session import DeviceCall, Feed, check_feed

if TYPE_CHECKING:
    import torch

__all__ = ["TensorRTSession", "here", "last_error", "load_tensorrt", "logger_of", "open_tensorrt"]

#: TensorRT's DataType -> NumPy's name.
DTYPES = {
    "FLOAT": "float32", "HALF": "float16", "INT8": "int8", "INT32": "int32", "INT64": "int64", "UINT8": "uint8",
    "BOOL": "bool",
}  # fmt: skip


def load_tensorrt() -> Any:
    """The module `tensorrt`. Raises MissingExtra (not installed) or StageError (it does not work here)."""
    status = doctor.status_of("tensorrt")
    if status.available:
        import tensorrt

        return tensorrt
    error = MissingExtra if status.version is None and status.why == "not installed" else StageError
    raise error(f"TensorRT does not run here: {status.why}", where="runtime tensorrt", hint=status.install)


def here(tensorrt: Any) -> Here:
    """This machine, as engines see it. Raises like `need_cuda`."""
    import torch

    device = need_cuda("TensorRT")
    major, minor = torch.cuda.get_device_capability(device)
    return Here(
        gpu=torch.cuda.get_device_name(device),
        compute_capability=f"{major}.{minor}",
        driver=driver_version(),
        tensorrt=tensorrt.__version__,
        cuda=torch.version.cuda,
    )


@cache
def logger_of(tensorrt: Any) -> Any:
    """The logger, which keeps errors in `.errors`; TensorRT takes the first one of a process only."""

    class Logger(tensorrt.ILogger):
        def __init__(self) -> None:
            tensorrt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (tensorrt.ILogger.Severity.ERROR, tensorrt.ILogger.Severity.INTERNAL_ERROR):
                self.errors.append(message)

    return Logger()


class TensorRTSession:
    """A `Session` on an engine; its first optimisation profile is used."""

    def __init__(self, tensorrt: Any, engine: Any, file: Path, built: EngineMetadata, cuda_graphs: bool) -> None:
        import torch

        self._tensorrt, self._engine, self._file = tensorrt, engine, file
        self._built, self._graphs = built, cuda_graphs
        self._context = self._new_context()
        self._stream = torch.cuda.Stream()
        names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        described = {name: _info(engine, name) for name in names}
        inputs = [name for name in names if engine.get_tensor_mode(name) == tensorrt.TensorIOMode.INPUT]
        self.inputs = [described[name] for name in inputs]
        self.outputs = [info for name, info in described.items() if name not in inputs]
        self.metadata: dict[str, str] = {"edgekd.engine": built.model_dump_json()}

    def run(self, feed: Feed) -> Feed:
        inputs, launch = self._prepared(self._open(), feed)
        try:
            return run_once(feed, inputs, launch, self._stream)
        except RuntimeError as error:
            raise self._failed(error) from error

    def bound(self, feed: Feed) -> DeviceCall:
        self._open()
        context = self._new_context()  # shapes and addresses are a context's: calls must not share one
        inputs, launch = self._prepared(context, feed)
        try:
            return CudaCall(feed, inputs, launch, self._stream, graph=self._graphs)
        except RuntimeError as error:
            raise self._failed(error) from error

    def close(self) -> None:
        self._context = self._engine = None

    def _open(self) -> Any:
        if self._context is None:
            raise StageError("this session is closed", where=str(self._file))
        return self._context

    def _new_context(self) -> Any:
        context = self._engine.create_execution_context()
        if context is None:
            what = f"no execution context: {last_error(self._tensorrt)}"
            raise StageError(what, where=str(self._file), hint="is the GPU's memory full?")
        return context

    def _failed(self, error: RuntimeError) -> StageError:
        return StageError(f"the GPU failed: {str(error).partition(chr(10))[0]}", where=str(self._file))

    def _prepared(self, context: Any, feed: Feed) -> tuple[dict[str, torch.Tensor], Launch]:
        """Buffers on the GPU for a feed's shapes, which `context` knows from now on, and what runs it on them."""
        import torch

        check_feed(self.inputs, feed, str(self._file))
        inputs = {n: torch.empty(a.shape, dtype=_torch_type(a.dtype.name), device="cuda") for n, a in feed.items()}
        for name, tensor in inputs.items():
            if not context.set_input_shape(name, tuple(tensor.shape)):
                span = self._built.inputs.get(name)
                taken = f"{span.smallest} to {span.largest}" if span else "others"
                raise UsageError(
                    f"input {name!r} of shape {list(tensor.shape)} is not among those that the engine takes: {taken}",
                    where=str(self._file),
                    hint="batches come from the profile's protocol; rebuild for others",
                )
            context.set_tensor_address(name, tensor.data_ptr())
        outputs = {}
        for info in self.outputs:
            shape = tuple(context.get_tensor_shape(info.name))
            outputs[info.name] = torch.empty(shape, dtype=_torch_type(info.dtype), device="cuda")
            context.set_tensor_address(info.name, outputs[info.name].data_ptr())
        stream, where = self._stream, str(self._file)

        def launch() -> dict[str, torch.Tensor]:
            if not context.execute_async_v3(stream.cuda_stream):
                raise StageError("TensorRT refused to run the engine", where=where)
            return outputs

        return inputs, launch


@register("runtimes", "tensorrt")
def open_tensorrt(
    file: Path,
    threads: int = 1,
    profile_dir: Path | None = None,
    cuda_graphs: bool = True,
    engines: str | None = None,
) -> TensorRTSession:
    """Open an engine, or the one that an .onnx file was built into.

    That lies beside the file, or in the directory `engines` beside the file's artifact. `threads` and `profile_dir`
    mean nothing here. Raises UsageError (no engine), ArtifactError (a damaged one), MissingExtra (no TensorRT) or
    StageError (no GPU, another machine's engine, or TensorRT refuses it).
    """
    path = engine_of(Path(file), engines)
    built = read_engine(path)
    tensorrt = load_tensorrt()
    check_engine(built, here(tensorrt), str(path))
    runtime = tensorrt.Runtime(logger_of(tensorrt))
    if built.version_compatible:
        runtime.engine_host_code_allowed = True  # such an engine carries its own runtime; we built it, its hash fits
    engine = runtime.deserialize_cuda_engine(path.read_bytes())
    if engine is None:
        what = f"TensorRT {tensorrt.__version__} does not load it: {last_error(tensorrt)}"
        raise StageError(what, where=str(path), hint="rebuild: edgekd export --target trt --build")
    return TensorRTSession(tensorrt, engine, path, built, cuda_graphs)


def _info(engine: Any, name: str) -> TensorInfo:
    kind = engine.get_tensor_dtype(name).name
    if kind not in DTYPES:
        raise StageError(f"tensor {name!r} is {kind}, which NumPy has not", hint="export inputs and outputs as float32")
    axes = [size if size >= 0 else "batch" if i == 0 else "?" for i, size in enumerate(engine.get_tensor_shape(name))]
    return TensorInfo(name=name, dtype=DTYPES[kind], axes=axes)


def _torch_type(name: str) -> torch.dtype:
    import torch

    return torch.from_numpy(np.empty(0, name)).dtype


def last_error(tensorrt: Any) -> str:
    """What TensorRT last logged as an error."""
    errors = logger_of(tensorrt).errors
    return str(errors[-1])[:300] if errors else "it gave no reason"
