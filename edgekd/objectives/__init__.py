"""What a student is trained for: small modules that turn outputs of student and teacher into one scalar."""

from .feature import Hint
from .logit import CrossEntropy, LogitSquares, SoftTargets
from .spec import Objectives, ObjectiveSpec, bind_objective

__all__ = ["CrossEntropy", "Hint", "LogitSquares", "ObjectiveSpec", "Objectives", "SoftTargets", "bind_objective"]
