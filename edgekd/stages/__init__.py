"""The steps of a run: each file is one stage, a frozen config with `run(workspace) -> Artifact`."""

from . import distill as _distill
from . import export as _export
from . import prune as _prune
from . import quantize as _quantize
from . import teacher as _teacher
from .workspace import Context, Stage, Workspace

__all__ = ["Context", "Stage", "Workspace"]
