"""Networks as engines of TensorRT's Python package on the GPU."""

from __future__ import annotations

import os
from typing import Any, Callable, Dict, List

import numpy as np

from .building import ENGINES, build_in_child, bytes_of, engine_settings, imported, input_shape, kept_engine, logger_of
from .contents import Arrays, write_json
from .cuda import TO_DEVICE, TO_HOST, Cuda, described_gpu
from .errors import Failed
from .rounds import Block, WarmUp, timed_block, warmed_up

__all__ = ["TensorRT"]

#: TensorRT's DataType -> NumPy's; `trt.nptype` of 8.6 fails with newer NumPy.
NUMPY_TYPES = {
    "FLOAT": "float32", "HALF": "float16", "INT8": "int8", "INT32": "int32", "INT64": "int64", "UINT8": "uint8",
    "BOOL": "bool",
}  # fmt: skip


class TensorRT:
    """One network's engine on the GPU."""

    name = "tensorrt"
    timed = "host clock around copying in, the engine and copying out; parts by CUDA events"

    def __init__(self, directory: str, network: Dict[str, Any], profile: Dict[str, Any], out: str) -> None:
        self.trt = imported()
        self.network = network
        version = str(self.trt.__version__)
        settings = engine_settings(network, profile, version)
        self.identity = dict(settings, tensorrt=version, sha256=network["sha256"], **described_gpu())
        path = os.path.join(out, ENGINES, network["name"] + ".engine")
        if not kept_engine(path, self.identity):
            os.makedirs(os.path.dirname(path), exist_ok=True)
            build_in_child(["--build", network["name"], "--out", out], network["name"])
            write_json(path + ".json", self.identity)
        runtime = self.trt.Runtime(logger_of(self.trt))
        self.engine = runtime.deserialize_cuda_engine(bytes_of(path))
        if self.engine is None:
            os.unlink(path + ".json")
            raise Failed("TensorRT does not load the engine it built: %s" % logger_of(self.trt).last(), "run it again")
        self.facts: Dict[str, Any] = {"engine": dict(self.identity, bytes=os.path.getsize(path))}
        self.call: Callable[[], None] = lambda: None
        self.launch: Callable[[], None] = self.call
        self.host: Arrays = {}
        self.device_addresses: Dict[str, int] = {}
        self.cuda = Cuda()
        try:
            self.bind()
        except Failed:
            self.close()
            raise

    @staticmethod
    def version() -> str:
        return str(imported().__version__)

    @staticmethod
    def device() -> Dict[str, str]:
        return described_gpu()

    def bind(self) -> None:
        """A context with memory for the measured shapes."""
        self.release()
        self.context = self.engine.create_execution_context()
        if self.context is None:
            raise Failed("no execution context: %s" % logger_of(self.trt).last(), "is the GPU's memory full?")
        for info in self.network["inputs"]:
            fed = input_shape(info, self.network["batch"])
            if not self.context.set_input_shape(info["name"], fed):
                raise Failed("the engine refuses %s as %s: %s" % (fed, info["name"], logger_of(self.trt).last()))
        for i in range(self.engine.num_io_tensors):
            name = self.engine.get_tensor_name(i)
            kind = self.engine.get_tensor_dtype(name).name
            shape = tuple(self.context.get_tensor_shape(name))
            if kind not in NUMPY_TYPES:
                raise Failed("%s of the engine is %s, which NumPy has not" % (name, kind))
            if any(size < 0 for size in shape):
                raise Failed("the shape of %s depends on its values: %s" % (name, list(shape)))
            self.host[name] = self.cuda.pinned(shape, NUMPY_TYPES[kind])
            self.device_addresses[name] = self.cuda.memory(self.host[name].nbytes)
            if not self.context.set_tensor_address(name, self.device_addresses[name]):
                raise Failed("the engine takes no memory for %s: %s" % (name, logger_of(self.trt).last()))
        self.inputs = [info["name"] for info in self.network["inputs"]]
        self.outputs = [name for name in self.host if name not in self.inputs]
        context, stream = self.context, self.cuda.stream.value

        def enqueue() -> None:
            if not context.execute_async_v3(stream):
                raise Failed("TensorRT refused to run the engine: %s" % logger_of(self.trt).last())

        self.launch = enqueue

    def release(self) -> None:
        """Give back all but the engine: closures hold the context, which a new one must not lie beside."""
        self.call = self.launch = lambda: None
        self.context = None
        self.cuda.forget()
        for address in self.device_addresses.values():
            self.cuda.free(address)
        for array in self.host.values():
            self.cuda.unpin(array)
        self.host, self.device_addresses = {}, {}

    def _copy(self, names: List[str], kind: int) -> None:
        for name in names:
            pair = (self.device_addresses[name], self.host[name].ctypes.data)
            target, source = pair if kind == TO_DEVICE else pair[::-1]
            self.cuda.copy(target, source, self.host[name].nbytes, kind)

    def run(self, fed: Arrays) -> Arrays:
        for name, array in fed.items():
            np.copyto(self.host[name], array, casting="same_kind")
        self._copy(self.inputs, TO_DEVICE)
        self.launch()
        self._copy(self.outputs, TO_HOST)
        self.cuda.synchronize()
        return {name: self.host[name].copy() for name in self.outputs}

    #: All rows are compared.
    compared_batches = None

    def prepare(self, fed: Arrays, protocol: Dict[str, Any]) -> WarmUp:
        self.fed = fed
        self.capture()
        found = warmed_up(self.call, protocol)
        self.kept = found[0]
        return found

    def capture(self) -> None:
        """A call copies in, launches a CUDA graph where the engine can be captured, and copies out."""
        self.run(self.fed)
        graph = self.cuda.graph_of(self.launch)
        self.facts["cuda_graph"] = graph is not None
        start, cuda = graph or self.launch, self.cuda
        begin, ready, done, end = self.events = [cuda.event() for _ in range(4)]

        def call() -> None:
            cuda.record(begin)
            self._copy(self.inputs, TO_DEVICE)
            cuda.record(ready)
            start()
            cuda.record(done)
            self._copy(self.outputs, TO_HOST)
            cuda.record(end)
            cuda.synchronize()

        self.call = call

    def reopen(self) -> None:
        self.bind()
        self.capture()

    def block(self) -> Block:
        """Host times of calls, and by CUDA events what of them is compute and what transfers."""
        begin, ready, done, end = self.events
        parts: Block = {"compute_ns": [], "transfers_ns": []}

        def told() -> None:
            elapsed = self.cuda.elapsed_ms
            parts["compute_ns"].append(int(elapsed(ready, done) * 1e6))
            parts["transfers_ns"].append(int((elapsed(begin, ready) + elapsed(done, end)) * 1e6))

        return dict(parts, ns=timed_block(self.call, self.kept, told))

    def warnings(self) -> List[str]:
        return (
            [] if self.facts["cuda_graph"] else ["the engine was not captured as a CUDA graph: launches are timed too"]
        )

    def close(self) -> None:
        self.release()
        self.engine = None
        self.cuda.close()
