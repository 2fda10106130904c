"""Post-training quantization by other tools: each makes integers of a float network that edgekd exports and measures.

They are imported when a stage wants one: ONNX Runtime's works on files, Neural Compressor's on traced networks.
"""

__all__ = []  # type: ignore[var-annotated]
