"""Why a network is as fast, and as exact, as it is: layer by layer, from files alone.

`artifact`, which needs torch, is imported by whoever needs it.
"""

from __future__ import annotations

from .document import Explanation
from .file import explain_file
from .plan import plan_text
from .precision import precision_text
from .table import explanation_text

__all__ = ["Explanation", "explain_file", "explanation_text", "plan_text", "precision_text"]
