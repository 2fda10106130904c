"""The exceptions a caller may meet, each with the process exit code it maps to.

    EdgekdError            3
    ├── UsageError         2   arguments, recipe, profile, or data that the user named
    │   └── RecipeError    2   every problem of a recipe at once
    ├── StageError         3   a stage, runtime or device failed while working
    │   ├── ArtifactError  3   an artifact on disk is incomplete or corrupted
    │   └── Diverged       3   a training became NaN or infinite
    └── MissingExtra       3   an optional dependency is not installed

Exit codes 0 (ok), 1 (gate failed), 4 (inconclusive), 70 (a bug) and 130 (interrupted) are set by the CLI.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

__all__ = [
    "ArtifactError",
    "Diverged",
    "EdgekdError",
    "MissingExtra",
    "Problem",
    "RecipeError",
    "StageError",
    "UsageError",
    "nearest",
]


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong: where (file or key), what (with what was expected), and how to mend it."""

    where: str
    what: str
    hint: str | None = None

    def __str__(self) -> str:
        line = f"{self.where}: {self.what}" if self.where else self.what
        return f"{line}\n  hint: {self.hint}" if self.hint else line


class EdgekdError(Exception):
    """Something a user can cause or mend: shown as one message with a hint, without a traceback."""

    exit_code = 3

    def __init__(self, what: str, *, where: str = "", hint: str | None = None) -> None:
        self.problem = Problem(where, what, hint)
        super().__init__(str(self.problem))

    @property
    def problems(self) -> Sequence[Problem]:
        return [self.problem]


class UsageError(EdgekdError):
    """Wrong arguments, profile, path or data."""

    exit_code = 2


class RecipeError(UsageError):
    """All problems of one recipe."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        self._problems = list(problems)
        Exception.__init__(self, "\n".join(map(str, self._problems)))

    @property
    def problems(self) -> Sequence[Problem]:
        return self._problems


class StageError(EdgekdError):
    """A stage, runtime or device failed."""


class ArtifactError(StageError):
    """An artifact is incomplete, corrupted or of another format."""


class Diverged(StageError):
    """A training became NaN or infinite: another setting may not."""


class MissingExtra(EdgekdError):
    """An optional dependency is missing: the hint says which extra brings it."""


def nearest(word: str, known: Iterable[str]) -> str | None:
    """A `did you mean` hint for a misspelt `word`, or the list of what is known."""
    names = sorted(known)
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.6)
    if close:
        return f"did you mean {close[0]!r}?"
    return f"known: {', '.join(names)}" if names else None
