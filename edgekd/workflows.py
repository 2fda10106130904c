"""CI files: what `edgekd init --ci` writes, and the action for other repositories. One set of scripts serves all."""

from __future__ import annotations

from textwrap import indent

__all__ = ["ACTION", "CI_FILES"]

#: The gate judges later, with the baseline beside it: here a failed or open gate is no failure.
HEAD = """\
set -euo pipefail
code=0
edgekd run "$RECIPE" -o runs/head || code=$?
case "$code" in 0|1|4) ;; *) exit "$code" ;; esac
"""

#: Stages are kept by their content, so a base that was once a head costs nothing.
BASE = """\
set -euo pipefail
rm -rf .edgekd-base runs/no-base
git worktree prune
git worktree add --quiet --force --detach .edgekd-base "$BASE_SHA"
if [ ! -f ".edgekd-base/$RECIPE" ]; then
  echo "the base has no $RECIPE: nothing to compare with yet"
  rm -rf runs/base
  exit 0
fi
if [ -d data ] && [ ! -e .edgekd-base/data ]; then ln -s "$PWD/data" .edgekd-base/data; fi
if [ ! -d runs/base ]; then cp -r runs/head runs/base; fi
out="$PWD/runs/base"
code=0
(cd .edgekd-base && edgekd run "$RECIPE" -o "$out") || code=$?
case "$code" in 0|1|4) ;; *) exit "$code" ;; esac
"""

GATE = """\
set -euo pipefail
set -- edgekd gate runs/head --junit runs/junit.xml
if [ -n "${PROFILE:-}" ]; then set -- "$@" --profile "$PROFILE"; fi
if [ -f gate.toml ]; then set -- "$@" --rules gate.toml; fi
if [ -n "${BASELINE:-}" ]; then
  set -- "$@" --baseline "$BASELINE" --on-inconclusive "$ON_INCONCLUSIVE"
elif [ -d runs/base ]; then
  set -- "$@" --baseline runs/base --on-inconclusive "$ON_INCONCLUSIVE"
else
  echo "no baseline: rules with regress are shown as inconclusive, and pass"
  set -- "$@" --on-inconclusive pass
fi
code=0
"$@" || code=$?
case "$code" in 0|1|4) edgekd report runs/head --format md -o runs/comment.md ;; esac
"""

GITHUB_GATE = (
    GATE
    + """\
echo "code=$code" >> "$GITHUB_OUTPUT"
if [ -f runs/comment.md ]; then cat runs/comment.md >> "$GITHUB_STEP_SUMMARY"; fi
"""
)

#: One comment a pull request, found again by the report's first line.
COMMENT = """\
set -euo pipefail
if [ -z "${GH_TOKEN:-}" ] || [ -z "${PR_NUMBER:-}" ] || [ ! -f runs/comment.md ]; then
  echo "no token, pull request or report: no comment"
  exit 0
fi
comments="repos/$GITHUB_REPOSITORY/issues"
mine='.[] | select(.body | startswith("<!-- edgekd -->")) | .id'
id=$(gh api --paginate "$comments/$PR_NUMBER/comments" --jq "$mine" | sed -n 1p)
if [ -n "$id" ]; then
  set -- gh api --method PATCH "$comments/comments/$id"
else
  set -- gh api --method POST "$comments/$PR_NUMBER/comments"
fi
"$@" --field body=@runs/comment.md > runs/comment.log 2>&1 \\
  || echo "the comment was refused (a fork's token may only read)"
"""

END = """\
exit "$CODE"
"""

GITLAB_NOTE = """\
if [ -z "${EDGEKD_TOKEN:-}" ] || [ -z "${CI_MERGE_REQUEST_IID:-}" ] || [ ! -f runs/comment.md ]; then
  echo "no EDGEKD_TOKEN, merge request or report: no note"
  exit "$code"
fi
notes="$CI_API_V4_URL/projects/$CI_PROJECT_ID/merge_requests/$CI_MERGE_REQUEST_IID/notes"
token="PRIVATE-TOKEN: $EDGEKD_TOKEN"
mine='
import json, sys
found = [note["id"] for note in json.load(sys.stdin) if note["body"].startswith("<!-- edgekd -->")]
print(*found[:1])
'
id=$(curl --silent --fail --header "$token" "$notes?per_page=100" | python3 -c "$mine") || id=""
if [ -n "$id" ]; then set -- --request PUT "$notes/$id"; else set -- --request POST "$notes"; fi
curl --silent --fail --header "$token" "$@" --data-urlencode body@runs/comment.md > /dev/null \\
  || echo "the note was refused"
exit "$code"
"""


def _run(script: str, by: int) -> str:
    return indent(script, " " * by)


GITHUB = f"""\
# Measures the pull request beside its base in one job, gates, and comments once. See edgekd's docs/ci.md.
name: edgekd
on:
  pull_request:
  push:
    branches: [main]   # fills the cache that pull requests start from

permissions:
  contents: read
  pull-requests: write   # for the comment

concurrency:
  group: edgekd-${{{{ github.ref }}}}
  cancel-in-progress: true

env:
  RECIPE: recipe.toml
  ON_INCONCLUSIVE: inconclusive   # or pass, or fail: what a rule counts as that measuring could not settle
  OMP_WAIT_POLICY: PASSIVE

jobs:
  gate:
    runs-on: ubuntu-latest
    timeout-minutes: 120
    steps:
      - uses: actions/checkout@v4
        with:
          fetch-depth: 0
      - uses: actions/setup-python@v5
        with:
          python-version: "3.11"
      - name: Install
        run: python -m pip install edgekd
      - uses: actions/cache@v4
        with:
          path: runs
          key: edgekd-${{{{ runner.os }}}}-${{{{ github.sha }}}}
          restore-keys: edgekd-${{{{ runner.os }}}}-
      - name: Run the recipe
        run: |
{_run(HEAD, 10)}      - name: Run the base's recipe
        if: github.event_name == 'pull_request'
        env:
          BASE_SHA: ${{{{ github.event.pull_request.base.sha }}}}
        run: |
{_run(BASE, 10)}      - name: Measure both interleaved, and gate
        id: gate
        run: |
{_run(GITHUB_GATE, 10)}      - name: Comment
        if: always() && github.event_name == 'pull_request'
        env:
          GH_TOKEN: ${{{{ github.token }}}}
          PR_NUMBER: ${{{{ github.event.pull_request.number }}}}
        run: |
{_run(COMMENT, 10)}      - uses: actions/upload-artifact@v4
        if: always()
        with:
          name: edgekd-report
          path: |
            runs/head/report.html
            runs/head/results.json
            runs/head/gate.json
            runs/junit.xml
      - name: The gate's verdict
        env:
          CODE: ${{{{ steps.gate.outputs.code }}}}
        run: |
{_run(END, 10)}"""

GITLAB = f"""\
# Measures the merge request beside its base in one job, gates, and writes one note. See edgekd's docs/ci.md.
edgekd:
  image: python:3.11
  rules:
    - if: $CI_PIPELINE_SOURCE == "merge_request_event"
    - if: $CI_COMMIT_BRANCH == $CI_DEFAULT_BRANCH
  variables:
    GIT_DEPTH: "0"
    RECIPE: recipe.toml
    ON_INCONCLUSIVE: inconclusive   # or pass, or fail
    OMP_WAIT_POLICY: PASSIVE
  cache:
    key: edgekd
    paths: [runs]
  script:
    - python -m pip install edgekd
    - |
{_run(HEAD, 6)}    - |
      if [ -n "${{CI_MERGE_REQUEST_DIFF_BASE_SHA:-}}" ]; then
      BASE_SHA="$CI_MERGE_REQUEST_DIFF_BASE_SHA" bash <<'SCRIPT'
{_run(BASE, 6)}      SCRIPT
      fi
    - |
{_run(GATE + GITLAB_NOTE, 6)}  artifacts:
    when: always
    paths: [runs/head/report.html, runs/head/results.json, runs/head/gate.json]
    reports:
      junit: runs/junit.xml
"""

#: `action.yml` of edgekd's own repository; a test holds the file to this text.
ACTION = f"""\
name: edgekd
description: Run an edgekd recipe, measure it beside its base in one job, gate, and comment once.
inputs:
  recipe:
    description: The recipe to run.
    default: recipe.toml
  base:
    description: The commit to compare with. Default is the pull request's base; empty on other events, for none.
    default: ${{{{ github.event.pull_request.base.sha }}}}
  baseline:
    description: Instead of a commit, a committed JSON of `edgekd baseline update`, a run or an .onnx file.
    default: ""
  profile:
    description: Only this one of the recipe's profiles is judged.
    default: ""
  on-inconclusive:
    description: What a rule counts as that measuring could not settle (inconclusive, pass or fail).
    default: inconclusive
  comment:
    description: Whether to comment on the pull request (true or false).
    default: "true"
  requirement:
    description: What pip installs.
    default: edgekd
outputs:
  code:
    description: The gate's exit code (0 passed, 1 failed, 4 inconclusive).
    value: ${{{{ steps.gate.outputs.code }}}}
  report:
    description: The HTML report.
    value: runs/head/report.html
runs:
  using: composite
  steps:
    - name: Install
      shell: bash
      env:
        REQUIREMENT: ${{{{ inputs.requirement }}}}
      run: python -m pip install "$REQUIREMENT"
    - name: Run the recipe
      shell: bash
      env:
        RECIPE: ${{{{ inputs.recipe }}}}
      run: |
{_run(HEAD, 8)}    - name: Run the base's recipe
      if: inputs.base != '' && inputs.baseline == ''
      shell: bash
      env:
        RECIPE: ${{{{ inputs.recipe }}}}
        BASE_SHA: ${{{{ inputs.base }}}}
      run: |
{_run(BASE, 8)}    - name: Measure both interleaved, and gate
      id: gate
      shell: bash
      env:
        PROFILE: ${{{{ inputs.profile }}}}
        BASELINE: ${{{{ inputs.baseline }}}}
        ON_INCONCLUSIVE: ${{{{ inputs.on-inconclusive }}}}
      run: |
{_run(GITHUB_GATE, 8)}    - name: Comment
      if: always() && inputs.comment == 'true'
      shell: bash
      env:
        GH_TOKEN: ${{{{ github.token }}}}
        PR_NUMBER: ${{{{ github.event.pull_request.number }}}}
      run: |
{_run(COMMENT, 8)}    - name: The gate's verdict
      shell: bash
      env:
        CODE: ${{{{ steps.gate.outputs.code }}}}
      run: |
{_run(END, 8)}"""

#: --ci's choice -> the file that it writes, and its content.
CI_FILES = {"github": (".github/workflows/edgekd.yml", GITHUB), "gitlab": (".gitlab-ci.yml", GITLAB)}
