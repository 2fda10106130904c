"""The steps of a run: each file is one stage, a frozen config with `run(workspace) -> Artifact`."""

from .distill import Distill
from .export import Export
from .prune import Prune
from .quantize import Quantize
from .teacher import Teacher
from .workspace import Context, Stage, Workspace

__all__ = ["Context", "Distill", "Export", "Prune", "Quantize", "Stage", "Teacher", "Workspace"]
