"""The steps of a run: each file is one stage, a frozen config with `run(workspace) -> Artifact`."""

from .average import AverageStage
from .distill import Distill
from .export import Export
from .fuse import Fuse
from .prune import Prune
from .quantize import Quantize
from .teacher import Teacher
from .teaching import Context, Expert, Teaching
from .workspace import Stage, Workspace

__all__ = [
    "AverageStage",
    "Context",
    "Distill",
    "Expert",
    "Export",
    "Fuse",
    "Prune",
    "Quantize",
    "Stage",
    "Teacher",
    "Teaching",
    "Workspace",
]
