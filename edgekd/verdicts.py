"""Judge and render what was measured: from files alone, without torch."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError

from .artifact import write_atomically
from .bench import Results
from .bench.devices import with_devices
from .errors import ArtifactError, RecipeError, UsageError, nearest
from .gate import Baseline, RuleFor, Verdict, judge, parse_rules, read, write_gate
from .profile import Profile, load_profile
from .recipe import load_recipe
from .report import FORMATS, render

__all__ = [
    "as_baseline",
    "gate_results",
    "gate_stored",
    "judge_results",
    "judge_stored",
    "read_rules",
    "report_of",
    "results_at",
    "rules_of",
    "stored",
]


def rules_of(rules: dict[str, Any], profiles: Sequence[Profile], others: Sequence[str] = ()) -> list[RuleFor]:
    """The recipe's rules and the profiles' budgets, as one list for `profiles`. Raises RecipeError.

    `others` are names of profiles that the rules may name too, and that are not judged here.
    """
    names = [p.name for p in profiles]
    budgets = {p.name: p.budgets for p in profiles if p.budgets}
    merged = {**rules, **{n: {**b, **rules.get(n, {})} for n, b in budgets.items()}}
    parsed, problems = parse_rules(merged, [*names, *others])
    if problems:
        raise RecipeError(problems)
    return [rule for rule in parsed if rule.profile in names]


def judge_results(
    results: Results,
    rules: dict[str, Any],
    profiles: Sequence[Profile],
    others: Sequence[str] = (),
    baseline: Baseline | None = None,
) -> list[Verdict]:
    """Verdicts of the recipe's rules and of the profiles' budgets. Raises RecipeError when rules are wrong."""
    return judge(results, rules_of(rules, profiles, others), baseline=baseline)


class Stored(NamedTuple):
    """What a run on disk is judged by. `others` are profiles that rules may name and that are not judged now."""

    results: Results
    rules: dict[str, Any]
    profiles: list[Profile]
    others: list[str]


def stored(directory: Path, rules: dict[str, Any] | None, profiles: Sequence[str]) -> Stored:
    """A run's measurements, and `rules` or its recipe's. Raises UsageError or RecipeError."""
    recipe = load_recipe(directory / "recipe.toml")
    results = results_at(directory)
    known = [load_profile(name) for name in recipe.profiles]
    loaded = [load_profile(name, "--profile") for name in profiles] or known
    others = sorted({p.name for p in known} - {p.name for p in loaded})
    return Stored(results, recipe.gate if rules is None else rules, loaded, others)


def gate_stored(
    directory: Path, rules: dict[str, Any] | None, profiles: Sequence[str]
) -> tuple[Results, list[Verdict]]:
    """Verdicts on a run's results.json, without a baseline; renews gate.json and the report."""
    found = stored(directory, rules, profiles)
    return found.results, judge_stored(directory, *found, None)


def gate_results(
    file: Path, rules: dict[str, Any], profiles: Sequence[str], baseline: str | None, *, other_machine: bool = False
) -> tuple[Results, list[Verdict]]:
    """Verdicts on a results JSON, of a device elsewhere for example; a `baseline` is another one.

    Raises UsageError, RecipeError or ArtifactError.
    """
    results = results_at(file)
    try:
        loaded = [load_profile(name, "--profile") for name in profiles]
        loaded = loaded or [Profile.model_validate(p.settings) for p in results.profiles]
    except ValidationError as error:
        what = f"its profile is damaged: {error.errors()[0]['loc']}"
        raise ArtifactError(what, where=str(file), hint="measure again, or name the profile: --profile") from error
    against = None
    if baseline is not None:
        if Path(baseline).suffix != ".json":
            hint = "edgekd bench FILES --host NAME -o baseline.json, or name the files themselves to measure them here"
            raise UsageError("measurements are compared with a JSON of others", where="--baseline", hint=hint)
        against = Baseline(results_at(Path(baseline)), baseline, other_machine=other_machine)
    return results, judge_results(results, rules, loaded, baseline=against)


def judge_stored(
    directory: Path,
    results: Results,
    rules: dict[str, Any],
    profiles: Sequence[Profile],
    others: Sequence[str],
    baseline: Baseline | None,
) -> list[Verdict]:
    """Judge, and write what came out into the run."""
    verdicts = judge_results(results, rules, profiles, others, baseline)
    write_gate(directory / "gate.json", verdicts)
    write_atomically(directory / "report.html", render(results, verdicts, "html"))
    return verdicts


def read_rules(file: Path) -> dict[str, Any]:
    """The `[gate]` table of a TOML file, or the whole file where it has none. Raises UsageError."""
    try:
        table = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"no rules at {file}", where="--rules", hint="expected a TOML file with [gate]") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        hint = "texts need quotes, tables need { } and lists need [ ]"
        raise UsageError(f"not valid TOML: {error}", where=str(file), hint=hint) from error
    rules = table.get("gate", table)
    if not isinstance(rules, dict) or not rules:
        raise UsageError(
            "no rules in it", where=str(file), hint="for example: [gate] latency = { p50 = { max = 2.0 } }"
        )
    return rules


def results_at(path: Path) -> Results:
    """The measurements of a run, its devices' too, of a results JSON, or of what a bundle's run.py wrote.

    Raises UsageError or ArtifactError.
    """
    if path.is_dir():
        return with_devices(Results.read(path / "results.json"), path)
    try:
        return Results.read(path)
    except ArtifactError:
        from .bundle import is_runners, read_results

        if not is_runners(path):
            raise
        return read_results(path)


def as_baseline(results: Results) -> Results:
    """What a later run needs to be compared with: figures and rounds, without what only drawings show."""
    drawn: dict[str, Any] = {"classes": [], "confusion": [], "layer_times": []}
    profiles = []
    for profile in results.profiles:
        variants = []
        for v in profile.variants:
            latency = v.latency.model_copy(update={"curve": [], "histogram": None}) if v.latency else None
            variants.append(v.model_copy(update={**drawn, "latency": latency}))
        profiles.append(profile.model_copy(update={"variants": variants}))
    return results.model_copy(update={"profiles": profiles, "lineage": []})


def report_of(path: Path, format: str) -> str:
    """A rendering of a run's results.json, or of one given by path. Raises UsageError."""
    known = next((f for f in FORMATS if f == format), None)
    if known is None:
        raise UsageError(f"no format {format!r}", where="--format", hint=nearest(format, FORMATS))
    results = results_at(path)
    beside = (path if path.is_dir() else path.parent) / "gate.json"
    return render(results, read(beside) if beside.is_file() else [], known)
