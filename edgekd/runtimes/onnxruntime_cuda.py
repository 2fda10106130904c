"""ONNX Runtime on an NVIDIA GPU: inputs and outputs bound to device memory, with or without CUDA graphs."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import MissingExtra, StageError
from ..registry import register
from .onnxruntime import OnnxRuntimeSession, first_line, open_native
from .session import DeviceCall, Feed, Parts

__all__ = ["DeviceSession", "open_onnxruntime_cuda"]

PROVIDER = "CUDAExecutionProvider"
INSTALL = "pip uninstall onnxruntime && pip install 'onnxruntime-gpu[cuda,cudnn]' (needs an NVIDIA GPU)"
#: ONNX Runtime captures a graph once the allocations of its first calls are over.
WARM_UP = 3


class BoundCall:
    """A `DeviceCall`: copies in, the network, copies out. ONNX Runtime waits after each, so the host's clock tells.

    Its copies come from and go to NumPy's memory, which is not pinned: they take longer than those of `CudaCall`.
    """

    def __init__(self, native: Any, feed: Feed, outputs: Feed, device: str) -> None:
        import onnxruntime as ort

        make: Callable[..., Any] = ort.OrtValue.ortvalue_from_numpy
        arrays = {name: np.ascontiguousarray(array) for name, array in feed.items()}
        # A copy, for on the CPU such a value would share the array's memory, and copy nothing.
        self._copies = [(make(array.copy(), device, 0), array) for array in arrays.values()]
        self._results = [make(array, device, 0) for array in outputs.values()]
        binding = native.io_binding()
        for name, (value, _) in zip(arrays, self._copies, strict=True):
            binding.bind_ortvalue_input(name, value)
        for name, value in zip(outputs, self._results, strict=True):
            binding.bind_ortvalue_output(name, value)
        self._run, self._binding, self._times = native.run_with_iobinding, binding, (0, 0, 0, 0)

    def __call__(self) -> None:
        begin = time.perf_counter_ns()
        for value, array in self._copies:
            value.update_inplace(array)
        ready = time.perf_counter_ns()
        self._run(self._binding)
        done = time.perf_counter_ns()
        self.answers = [value.numpy() for value in self._results]
        self._times = begin, ready, done, time.perf_counter_ns()

    def parts(self) -> Parts:
        begin, ready, done, end = self._times
        return {"compute": (done - ready) / 1e6, "transfers": (ready - begin + end - done) / 1e6}


class DeviceSession(OnnxRuntimeSession):
    """A `Session` on an .onnx file whose buffers are on `device`: "cuda", or "cpu" to see that the binding is right.

    With CUDA graphs a session has one graph, of one set of shapes and addresses: each shape gets a session of its own.
    """

    def __init__(self, native: Any, file: Path, device: str, another: Callable[[], Any] | None) -> None:
        super().__init__(native, file, profiling=False)
        self._device, self._another = device, another

    def bound(self, feed: Feed) -> DeviceCall:
        outputs = self.run(feed)
        try:
            native = self._another() if self._another is not None else self._open()
            call = BoundCall(native, feed, outputs, self._device)
            for _ in range(WARM_UP):
                call()
        except Exception as error:  # ONNX Runtime's exceptions have no common base class
            hint = "a node that stays on the CPU prevents CUDA graphs: set cuda_graphs = false in the profile"
            raise StageError(
                f"ONNX Runtime failed: {first_line(error)}",
                where=str(self._file),
                hint=hint if self._another is not None else None,
            ) from error
        return call


@register("runtimes", "onnxruntime-cuda")
def open_onnxruntime_cuda(
    file: Path, threads: int = 1, profile_dir: Path | None = None, cuda_graphs: bool = True
) -> DeviceSession:
    """Open an .onnx file on the GPU; its precision is that of the file.

    `threads` is for what stays on the CPU; `profile_dir` means nothing here. Raises UsageError (no such file, not a
    valid model), MissingExtra (built without CUDA) or StageError (CUDA does not start).
    """
    import onnxruntime as ort

    if PROVIDER not in ort.get_available_providers():
        raise MissingExtra(
            f"ONNX Runtime {ort.__version__} was built without {PROVIDER}",
            where="runtime onnxruntime-cuda",
            hint=INSTALL,
        )
    if hasattr(ort, "preload_dlls"):
        ort.preload_dlls()  # CUDA's libraries from NVIDIA's wheels

    def opened(graphs: bool) -> Any:
        options = {"device_id": "0", "enable_cuda_graph": "1" if graphs else "0"}
        native = open_native(Path(file), threads, [(PROVIDER, options), "CPUExecutionProvider"])
        if PROVIDER not in native.get_providers():  # it falls back to the CPU without an error
            raise StageError(
                f"{PROVIDER} did not start, so ONNX Runtime took the CPU",
                where=str(file),
                hint="is there a GPU (nvidia-smi), and do CUDA and cuDNN have the versions that this release wants? "
                "https://onnxruntime.ai/docs/execution-providers/CUDA-ExecutionProvider.html",
            )
        return native

    return DeviceSession(opened(False), Path(file), "cuda", (lambda: opened(True)) if cuda_graphs else None)
