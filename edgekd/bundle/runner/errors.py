"""What a user of the runner can mend."""

from __future__ import annotations

__all__ = ["FAILED", "INTERRUPTED", "USAGE", "Failed"]

USAGE, FAILED, INTERRUPTED, BUG = 2, 3, 130, 70


class Failed(Exception):
    """Shown as one message with a hint; `code` is the exit code."""

    def __init__(self, what: str, hint: str = "", code: int = FAILED) -> None:
        super().__init__(what)
        self.what, self.hint, self.code = what, hint, code
