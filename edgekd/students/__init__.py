"""Students chosen by measurement: a family's members on a profile, their front, and the one that a recipe wants."""

from __future__ import annotations

from .choice import Choice, chosen_students
from .fronts import fronts

__all__ = ["Choice", "chosen_students", "fronts"]
