"""CUDA's runtime by ctypes: a Jetson has no CUDA package for Python."""

from __future__ import annotations

import ctypes
import glob
from typing import Any, Callable, Dict, List, Optional, Tuple

import numpy as np

from .device import UNKNOWN
from .errors import Failed

__all__ = ["Cuda", "described_gpu"]

TO_DEVICE, TO_HOST = 1, 2
#: cudaDevAttrComputeCapabilityMajor and Minor (CUDA runtime API reference, enum cudaDeviceAttr).
MAJOR, MINOR = 75, 76
#: cudaStreamNonBlocking; cudaStreamCaptureModeThreadLocal.
NON_BLOCKING, THREAD_LOCAL = 1, 1
NAMES = ("libcudart.so", "libcudart.so.13", "libcudart.so.12", "libcudart.so.11.0")
PLACES = (
    "/usr/local/cuda*/lib64/libcudart.so*",
    "/usr/local/cuda*/targets/*/lib/libcudart.so*",
    "/usr/lib/*-linux-gnu/libcudart.so*",
)
P, SIZE = ctypes.c_void_p, ctypes.c_size_t
SIGNATURES: Dict[str, Any] = {
    "cudaMalloc": (ctypes.POINTER(P), SIZE),
    "cudaFree": (P,),
    "cudaHostAlloc": (ctypes.POINTER(P), SIZE, ctypes.c_uint),
    "cudaFreeHost": (P,),
    "cudaMemcpyAsync": (P, P, SIZE, ctypes.c_int, P),
    "cudaStreamCreateWithFlags": (ctypes.POINTER(P), ctypes.c_uint),
    "cudaStreamSynchronize": (P,),
    "cudaStreamDestroy": (P,),
    "cudaEventCreate": (ctypes.POINTER(P),),
    "cudaEventDestroy": (P,),
    "cudaEventRecord": (P, P),
    "cudaEventElapsedTime": (ctypes.POINTER(ctypes.c_float), P, P),
    "cudaStreamBeginCapture": (P, ctypes.c_int),
    "cudaStreamEndCapture": (P, ctypes.POINTER(P)),
    "cudaGraphInstantiateWithFlags": (ctypes.POINTER(P), P, ctypes.c_ulonglong),
    "cudaGraphLaunch": (P, P),
    "cudaGraphExecDestroy": (P,),
    "cudaGraphDestroy": (P,),
    "cudaGetDeviceCount": (ctypes.POINTER(ctypes.c_int),),
    "cudaDeviceGetAttribute": (ctypes.POINTER(ctypes.c_int), ctypes.c_int, ctypes.c_int),
    "cudaDriverGetVersion": (ctypes.POINTER(ctypes.c_int),),
}


class Cuda:
    """One stream on the first GPU."""

    def __init__(self) -> None:
        self.library = _library()
        #: What is to be destroyed: the function's name, and its argument.
        self.made: List[Tuple[str, Any]] = []
        self.stream = P()
        self.call("cudaStreamCreateWithFlags", ctypes.byref(self.stream), NON_BLOCKING)

    def call(self, name: str, *arguments: Any) -> None:
        """Call the runtime. Raises Failed with CUDA's own words."""
        called(self.library, name, *arguments)

    def memory(self, size: int) -> int:
        """The address of new memory on the GPU."""
        pointer = P()
        self.call("cudaMalloc", ctypes.byref(pointer), max(1, size))
        return int(pointer.value or 0)

    def free(self, address: int) -> None:
        self.library.cudaFree(address)

    def pinned(self, shape: Tuple[int, ...], dtype: str) -> "np.ndarray[Any, Any]":
        """An array in memory of the host that the GPU copies from and to by itself."""
        size = max(1, int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize)
        pointer = P()
        self.call("cudaHostAlloc", ctypes.byref(pointer), size, 0)
        memory = (ctypes.c_char * size).from_address(int(pointer.value or 0))
        return np.frombuffer(memoryview(memory), dtype, count=int(np.prod(shape, dtype=np.int64))).reshape(shape)

    def unpin(self, array: "np.ndarray[Any, Any]") -> None:
        self.library.cudaFreeHost(array.ctypes.data)

    def copy(self, target: int, source: int, size: int, kind: int) -> None:
        self.call("cudaMemcpyAsync", target, source, size, kind, self.stream)

    def synchronize(self) -> None:
        self.call("cudaStreamSynchronize", self.stream)

    def event(self) -> Any:
        event = P()
        self.call("cudaEventCreate", ctypes.byref(event))
        self.made.append(("cudaEventDestroy", event))
        return event

    def record(self, event: Any) -> None:
        self.call("cudaEventRecord", event, self.stream)

    def elapsed_ms(self, begin: Any, end: Any) -> float:
        value = ctypes.c_float()
        self.call("cudaEventElapsedTime", ctypes.byref(value), begin, end)
        return float(value.value)

    def graph_of(self, launch: Callable[[], None]) -> Optional[Callable[[], None]]:
        """`launch` as a CUDA graph, whose kernels one call starts; None where it cannot be captured."""
        graph, executable = P(), P()
        try:
            self.call("cudaStreamBeginCapture", self.stream, THREAD_LOCAL)
            try:
                launch()
            finally:
                self.call("cudaStreamEndCapture", self.stream, ctypes.byref(graph))
                if graph:
                    self.made.append(("cudaGraphDestroy", graph))
            self.call("cudaGraphInstantiateWithFlags", ctypes.byref(executable), graph, 0)
            self.made.append(("cudaGraphExecDestroy", executable))
        except Failed:
            return None
        run, stream = self.library.cudaGraphLaunch, self.stream

        def replay() -> None:
            if run(executable, stream) != 0:
                raise Failed("a captured CUDA graph failed")

        return replay

    def forget(self) -> None:
        """Destroy graphs and events, the last made first."""
        while self.made:
            name, handle = self.made.pop()
            getattr(self.library, name)(handle)

    def close(self) -> None:
        """Destroy the stream, too: nothing may be called afterwards."""
        self.forget()
        self.library.cudaStreamDestroy(self.stream)


def described_gpu() -> Dict[str, str]:
    """Name, compute capability and driver of the first GPU: what an engine belongs to. Takes no memory there."""
    library, numbers = _library(), [ctypes.c_int() for _ in range(3)]
    for number, attribute in zip(numbers, (MAJOR, MINOR)):
        called(library, "cudaDeviceGetAttribute", ctypes.byref(number), attribute, 0)
    called(library, "cudaDriverGetVersion", ctypes.byref(numbers[2]))
    version = numbers[2].value
    return {
        "gpu": _name(),
        "compute_capability": "%d.%d" % (numbers[0].value, numbers[1].value),
        "cuda_driver": "%d.%d" % (version // 1000, version % 1000 // 10),
    }


def called(library: Any, name: str, *arguments: Any) -> None:
    """Call the runtime. Raises Failed with CUDA's own words."""
    code = getattr(library, name)(*arguments)
    if code != 0:
        text = library.cudaGetErrorString(code).decode("utf-8", "replace")
        raise Failed("%s failed: %s (%d)" % (name, text, code), "does `nvidia-smi` or `tegrastats` see a GPU?")


def _library() -> Any:
    """The first CUDA runtime that has all functions and whose first call the driver, which may be older, takes."""
    names = list(NAMES)
    for place in PLACES:
        names += sorted(glob.glob(place), reverse=True)
    refused: Optional[Failed] = None
    for name in names:
        try:
            library = ctypes.CDLL(name)
            for function_name, arguments in SIGNATURES.items():
                function = getattr(library, function_name)
                function.argtypes, function.restype = list(arguments), ctypes.c_int
            library.cudaGetErrorString.restype = ctypes.c_char_p
            called(library, "cudaGetDeviceCount", ctypes.byref(ctypes.c_int()))
            return library
        except (OSError, AttributeError):
            continue
        except Failed as error:
            refused = refused or error
    if refused is not None:
        raise refused
    raise Failed(
        "CUDA's runtime (libcudart.so) is not found",
        "put its directory into LD_LIBRARY_PATH; on a Jetson: sudo apt install nvidia-jetpack",
    )


def _name() -> str:
    try:
        driver = ctypes.CDLL("libcuda.so.1")
        text = ctypes.create_string_buffer(256)
        if driver.cuInit(0) == 0 and driver.cuDeviceGetName(text, 256, 0) == 0:
            return text.value.decode("utf-8", "replace")
    except (OSError, AttributeError):
        pass
    return UNKNOWN
