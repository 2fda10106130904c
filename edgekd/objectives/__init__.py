"""What a student is trained for: small modules that turn outputs of student and teacher into one scalar."""

from . import feature as _feature
from . import logit as _logit
from .spec import Objectives, ObjectiveSpec, bind_objective

__all__ = ["ObjectiveSpec", "Objectives", "bind_objective"]
