"""What runs on the device. `single_file` joins these modules to the bundle's run.py.

They are written for Python 3.8, NumPy and nothing else, import nothing of edgekd but each other, and no two of them
may define the same name.
"""

__all__ = ["MODULES"]

#: In the order of their imports.
MODULES = (
    "errors", "contents", "device", "sensors", "rounds", "onnx_runtime", "cuda", "building", "engines", "trtexec",
    "work", "main",
)  # fmt: skip
