"""What a student is trained for: small modules that turn outputs of student and teacher into a loss."""

from . import contrast, feature, logit, own, relation, reuse, review, rules, sparsity  # noqa: F401 (importing registers them)
from .spec import Objectives, ObjectiveSpec, bind_objective

__all__ = ["ObjectiveSpec", "Objectives", "bind_objective"]
