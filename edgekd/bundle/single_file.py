"""run.py: the modules of `bundle/runner` joined to one file that needs neither edgekd nor another file."""

from __future__ import annotations

import ast
from pathlib import Path

from .runner import MODULES

__all__ = ["runner_source"]

DIRECTORY = Path(__file__).with_name("runner")
HEADER = '''\
#!/usr/bin/env python3
"""Measures this bundle's networks on this device: python3 run.py

Needs Python 3.8 or newer, NumPy, and the runtime that bundle.json's profile names (TensorRT's Python package or
trtexec, or ONNX Runtime). Writes results.json, which `edgekd report` and `edgekd gate` read, and run.log.
"""
'''


def runner_source() -> str:
    """The text of run.py."""
    plain: set[str] = set()
    origins: dict[str, set[str]] = {}
    bodies = []
    for name in MODULES:
        text = (DIRECTORY / f"{name}.py").read_text(encoding="utf-8")
        tree = ast.parse(text)
        lines = text.splitlines()
        for node in reversed(tree.body):
            if not _left_out(node):
                continue
            del lines[node.lineno - 1 : node.end_lineno or node.lineno]
            if isinstance(node, ast.Import):
                plain.update(alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and not node.level:
                origins.setdefault(node.module or "", set()).update(alias.name for alias in node.names)
        title = (ast.get_docstring(tree) or "").partition("\n")[0]
        body = "\n".join(lines).strip()
        bodies.append(f"# ---- {name}: {title}\n\n{body}\n")
    del origins["__future__"]
    plain.remove("numpy")
    header = ["from __future__ import annotations", "", *(f"import {name}" for name in sorted(plain))]
    header += [f"from {module} import {', '.join(sorted(names))}" for module, names in sorted(origins.items())]
    header += ["", "import numpy as np"]
    return HEADER + "\n" + "\n".join(header) + "\n\n" + "\n\n".join(bodies)


def _left_out(node: ast.stmt) -> bool:
    """Docstrings, imports and `__all__`: one file has them once, or not at all."""
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
        return True
    if isinstance(node, ast.Assign):
        return any(isinstance(target, ast.Name) and target.id == "__all__" for target in node.targets)
    return isinstance(node, ast.Import | ast.ImportFrom)
