"""The graph that ONNX Runtime really computes: what is left of a file after its own optimisation."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from ..errors import StageError

__all__ = ["FLOAT_KERNELS", "INTEGER_KERNELS", "optimised_graph"]

INTEGER_KERNELS = {
    *("QLinearConv", "ConvInteger", "QLinearMatMul", "MatMulInteger", "QGemm", "MatMulIntegerToFloat"),
    *("DynamicQuantizeMatMul", "QAttention", "NhwcConvInteger"),
}
FLOAT_KERNELS = {
    *("Conv", "FusedConv", "NhwcFusedConv", "ConvTranspose", "Gemm", "FusedGemm", "MatMul", "FusedMatMul"),
    *("Attention", "MultiHeadAttention", "TransposeMatMul"),
}


def optimised_graph(path: Path) -> Any:
    """The onnx.GraphProto of a file as ONNX Runtime optimises it for this machine's CPU, without its weights' values.

    Raises StageError when ONNX Runtime cannot load the file.
    """
    import onnx
    import onnxruntime

    with tempfile.TemporaryDirectory() as directory:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.optimized_model_filepath = str(Path(directory) / "optimised.onnx")
        try:
            onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # ONNX Runtime's exceptions have no common base class
            raise StageError(f"ONNX Runtime cannot load it: {error}", where=str(path)) from error
        return onnx.load(options.optimized_model_filepath, load_external_data=False).graph
