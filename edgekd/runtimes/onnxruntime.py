"""ONNX Runtime on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ..artifact import TensorInfo
from ..errors import MissingExtra, StageError, UsageError
from ..registry import register
from .session import Feed, check_feed

__all__ = ["OnnxRuntimeSession", "first_line", "open_native", "open_onnxruntime"]

#: ONNX element types whose NumPy name differs from the one inside `tensor(...)`.
DTYPES = {"float": "float32", "double": "float64"}


class OnnxRuntimeSession:
    """A `Session` on an .onnx file. Threads stop spinning when a call returns: see `open_onnxruntime`."""

    def __init__(self, native: Any, file: Path, profiling: bool) -> None:
        self._native, self._file, self._profiling = native, file, profiling
        self.inputs = [_info(argument) for argument in native.get_inputs()]
        self.outputs = [_info(argument) for argument in native.get_outputs()]
        self.metadata: dict[str, str] = dict(native.get_modelmeta().custom_metadata_map)

    def run(self, feed: Feed) -> Feed:
        native = self._open()
        check_feed(self.inputs, feed, str(self._file))
        names = [info.name for info in self.outputs]
        try:
            values = native.run(names, feed)
        except Exception as error:  # ONNX Runtime's exceptions have no common base class
            raise StageError(f"ONNX Runtime failed: {first_line(error)}", where=str(self._file)) from error
        return dict(zip(names, values, strict=True))

    def bound(self, feed: Feed) -> Callable[[], None]:
        import onnxruntime as ort

        outputs = self.run(feed)  # the sizes of dynamic outputs are known only after a call
        native = self._open()
        binding = native.io_binding()
        try:
            inputs = {n: ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array)) for n, array in feed.items()}
            results = {n: ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array)) for n, array in outputs.items()}
            for name, value in inputs.items():
                binding.bind_ortvalue_input(name, value)
            for name, value in results.items():
                binding.bind_ortvalue_output(name, value)
            call: Callable[[], None] = partial(native.run_with_iobinding, binding)
            # The binding holds addresses only: the arrays behind them must live as long as the call.
            vars(call)["kept"] = (inputs, results)
            call()
        except Exception as error:
            raise StageError(f"ONNX Runtime failed: {first_line(error)}", where=str(self._file)) from error
        return call

    def close(self) -> None:
        if self._native is not None and self._profiling:
            self._native.end_profiling()
        self._native = None

    def _open(self) -> Any:
        if self._native is None:
            raise StageError("this session is closed", where=str(self._file))
        return self._native


@register("runtimes", "onnxruntime")
def open_onnxruntime(file: Path, threads: int = 1, profile_dir: Path | None = None) -> OnnxRuntimeSession:
    """Open an .onnx file on the CPU with `threads` threads inside an operator and one operator at a time.

    `profile_dir` gets ONNX Runtime's own trace (JSON, per operator) when the session is closed.
    Raises UsageError (no such file, not a valid model, unwritable `profile_dir`) or MissingExtra.
    """
    native = open_native(Path(file), threads, ["CPUExecutionProvider"], profile_dir)
    return OnnxRuntimeSession(native, Path(file), profile_dir is not None)


def open_native(file: Path, threads: int, providers: list[Any], profile_dir: Path | None = None) -> Any:
    """An onnxruntime.InferenceSession; raises like `open_onnxruntime`."""
    where = str(file)
    _check_file(file, where)
    try:
        import onnxruntime as ort
    except ImportError as error:
        raise MissingExtra(f"ONNX Runtime does not import: {error}", hint="pip install onnxruntime") from error
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.log_severity_level = 4  # what fails comes as an exception; the log would say it again in C++
    # Idle threads spin for some 40 ms after a call and steal the cores of whatever is measured next.
    # Stopping them at the end of a call was seen to leave the median of consecutive calls as it was.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if profile_dir is not None:
        try:
            profile_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"cannot write profiles there: {error.strerror}", where=str(profile_dir)) from error
        options.enable_profiling = True
        options.profile_file_prefix = str(profile_dir / file.stem)
    try:
        return ort.InferenceSession(where, options, providers=providers)
    except Exception as error:  # ONNX Runtime's exceptions have no common base class
        raise UsageError(
            f"not a model that ONNX Runtime {ort.__version__} can open: {first_line(error)}",
            where=where,
            hint="is the file complete? compare its size with the original, or export it again",
        ) from error


def _check_file(file: Path, where: str) -> None:
    if file.is_dir():
        inside = sorted(p.name for p in file.glob("*.onnx"))
        hint = f"did you mean {file / inside[0]}?" if inside else "it holds no .onnx file"
        raise UsageError("is a directory, expected an .onnx file", where=where, hint=hint)
    try:
        with file.open("rb") as stream:
            empty = not stream.read(1)
    except OSError as error:
        raise UsageError(f"cannot be read: {error.strerror}", where=where, hint="expected an .onnx file") from error
    if empty:
        raise UsageError("is empty, expected an ONNX model", where=where, hint="export it again")


def _info(argument: Any) -> TensorInfo:
    element = argument.type.removeprefix("tensor(").removesuffix(")")
    axes = [axis if isinstance(axis, int) else axis or "?" for axis in argument.shape or []]
    return TensorInfo(name=argument.name, dtype=DTYPES.get(element, element), axes=axes)


def first_line(error: Exception) -> str:
    line = str(error).strip().partition("\n")[0]
    return line if len(line) <= 300 else line[:297] + "..."
