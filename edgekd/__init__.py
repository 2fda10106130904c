"""edgekd: distil, prune, quantize, export, measure and gate a PyTorch network for an edge device.

import edgekd

done = edgekd.run("recipe.toml", overrides=["stage.distill.epochs=3"])
learner = edgekd.Learner.of(student, objectives=["ce", "kl"], teacher=teacher, example=images)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["Learner", "__version__", "run"]

if TYPE_CHECKING:
    from .learner import Learner
    from .runs import run


def __getattr__(name: str) -> Any:
    # Imported when asked for: `edgekd --help` must not wait for torch.
    if name == "run":
        from .runs import run

        return run
    if name == "Learner":
        from .learner import Learner

        return Learner
    raise AttributeError(f"module 'edgekd' has no attribute {name!r}")
