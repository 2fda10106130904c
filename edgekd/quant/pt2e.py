"""The parts of torchao that edgekd stands on, imported in one place and without torchao's notes about its kernels."""

from __future__ import annotations

from .quiet import quiet

with quiet():
    from torchao.quantization.pt2e import FakeQuantizeBase
    from torchao.quantization.pt2e.prepare import prepare as insert_fake_quantization
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e
    from torchao.quantization.pt2e.quantizer import (
        QuantizationAnnotation,
        QuantizationSpec,
        Quantizer,
        SharedQuantizationSpec,
    )
    from torchao.quantization.pt2e.quantizer.quantizer import Q_ANNOTATION_KEY

__all__ = [
    "Q_ANNOTATION_KEY",
    "FakeQuantizeBase",
    "QuantizationAnnotation",
    "QuantizationSpec",
    "Quantizer",
    "SharedQuantizationSpec",
    "convert_pt2e",
    "insert_fake_quantization",
]
