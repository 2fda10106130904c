"""Why a network is as fast, and as exact, as it is: layer by layer, from files alone."""

from __future__ import annotations

from .document import Explanation, explain_file
from .table import explanation_text

__all__ = ["Explanation", "explain_file", "explanation_text"]
