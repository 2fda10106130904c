"""Networks in ONNX Runtime on the device's CPU."""

from __future__ import annotations

import os
from typing import Any, Callable, Dict, List

from .contents import Arrays
from .errors import Failed
from .rounds import Block, WarmUp, timed_block, warmed_up

__all__ = ["OnnxRuntime"]


class OnnxRuntime:
    """One network's file, opened; calls run on preallocated inputs and outputs."""

    name = "onnxruntime"
    timed = "host clock around a call on preallocated inputs and outputs"

    def __init__(self, directory: str, network: Dict[str, Any], profile: Dict[str, Any], out: str) -> None:
        self.facts: Dict[str, Any] = {}
        self.network = network
        self.path, self.threads = os.path.join(directory, network["file"]), int(profile["threads"])
        self.native = self._opened()
        self.call: Callable[[], None] = lambda: None
        self.kept = 0

    @staticmethod
    def version() -> str:
        try:
            import onnxruntime
        except ImportError as error:
            raise Failed("ONNX Runtime does not import: %s" % error, "pip install onnxruntime")
        return str(onnxruntime.__version__)

    @staticmethod
    def device() -> Dict[str, str]:
        return {}

    def _opened(self) -> Any:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self.threads
        options.inter_op_num_threads = 1
        options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
        options.log_severity_level = 4
        options.add_session_config_entry("session.force_spinning_stop", "1")
        try:
            return onnxruntime.InferenceSession(self.path, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # ONNX Runtime's exceptions have no common base class
            raise Failed("ONNX Runtime does not open it: %s" % str(error).strip().split("\n")[0])

    def run(self, fed: Arrays) -> Arrays:
        names = [output.name for output in self.native.get_outputs()]
        try:
            return dict(zip(names, self.native.run(names, fed)))
        except Exception as error:
            raise Failed("ONNX Runtime failed: %s" % str(error).strip().split("\n")[0])

    #: All rows are compared.
    compared_batches = None

    def prepare(self, fed: Arrays, protocol: Dict[str, Any]) -> WarmUp:
        self._bind(fed)
        self.fed = fed
        found = warmed_up(self.call, protocol)
        self.kept = found[0]
        return found

    def _bind(self, fed: Arrays) -> None:
        import onnxruntime

        value = onnxruntime.OrtValue.ortvalue_from_numpy
        binding = self.native.io_binding()
        # The binding holds addresses only: the arrays behind them must live as long as it does.
        self.held = [value(array) for array in fed.values()] + [value(array) for array in self.run(fed).values()]
        names = [*fed, *(output.name for output in self.native.get_outputs())]
        for i, (name, held) in enumerate(zip(names, self.held)):
            (binding.bind_ortvalue_input if i < len(fed) else binding.bind_ortvalue_output)(name, held)
        native = self.native
        self.call = lambda: native.run_with_iobinding(binding)

    def reopen(self) -> None:
        self.native = self._opened()
        self._bind(self.fed)

    def block(self) -> Block:
        return {"ns": timed_block(self.call, self.kept)}

    def warnings(self) -> List[str]:
        return []

    def close(self) -> None:
        self.held = []
        self.native = None
