"""The exceptions: their exit codes, how they read, and did-you-mean hints."""

from __future__ import annotations

import pytest

from edgekd.errors import (
    ArtifactError,
    Diverged,
    EdgekdError,
    MissingExtra,
    Problem,
    RecipeError,
    StageError,
    UsageError,
    nearest,
)
from edgekd.screen import show_error


@pytest.mark.parametrize(
    ("kind", "parent", "code"),
    [
        (UsageError, EdgekdError, 2),
        (StageError, EdgekdError, 3),
        (ArtifactError, StageError, 3),
        (Diverged, StageError, 3),
        (MissingExtra, EdgekdError, 3),
    ],
)
def test_exit_codes_and_the_tree(kind: type[EdgekdError], parent: type[EdgekdError], code: int) -> None:
    error = kind("what", where="here", hint="mend it")
    assert error.exit_code == code
    assert isinstance(error, parent)
    assert error.problems == [Problem("here", "what", "mend it")]
    assert str(error) == "here: what\n  hint: mend it"


def test_a_recipe_error_is_a_usage_error_with_all_its_problems() -> None:
    problems = [Problem("a", "one"), Problem("b", "two", "three")]
    error = RecipeError(problems)
    assert isinstance(error, UsageError)
    assert error.exit_code == 2
    assert error.problems == problems
    assert str(error) == "a: one\nb: two\n  hint: three"


def test_a_problem_without_a_place_is_only_its_words() -> None:
    assert str(Problem("", "what")) == "what"


@pytest.mark.parametrize(
    ("word", "known", "hint"),
    [
        ("distil", ["distill", "prune"], "did you mean 'distill'?"),
        ("xyz", ["prune", "distill"], "known: distill, prune"),
        ("xyz", [], None),
        ("cifar-resnet", ["cifar-resnet"], "did you mean 'cifar-resnet'?"),
    ],
)
def test_nearest(word: str, known: list[str], hint: str | None) -> None:
    assert nearest(word, known) == hint


def test_one_problem_and_several_on_the_screen(capsys: pytest.CaptureFixture[str]) -> None:
    show_error(UsageError("what", where="here", hint="mend it"))
    assert capsys.readouterr().err == "error: here: what\nhint: mend it\n"
    show_error(RecipeError([Problem("a", "one"), Problem("b", "two", "three")]))
    shown = capsys.readouterr()
    assert shown.err == "error: 2 problems\n  a: one\n  b: two\n  hint: three\n"
    assert shown.out == ""
