"""The same recipe in two processes (Gloo, on this machine): what comes out, what is written, and when one is killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import PROFILE, Finished, Outcome, environ
from safetensors.torch import load_file
from torch import Tensor

from edgekd.data import load
from edgekd.recipe import DataSpec

TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
ACCELERATE = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines", "1"]
ACCELERATE += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]

#: No batch norm, so that a shard is normalised as the whole batch is.
EQUAL = """\
version = 1
name = "equal"
data = { use = "digits", size = 16, batch = %d, augment = "crop-flip" }

[teacher]
model = { use = "vit", patch = 4, dim = 16, depth = 1, heads = 2 }
epochs = 1
precision = "fp32"

[[stage]]
use = "distill"
students = [
  { name = "a", model = { use = "vit", patch = 4, dim = 16, depth = 1, heads = 2 } },
  { name = "b", model = { use = "vit", patch = 8, dim = 16, depth = 1, heads = 2 } },
]
objectives = ["ce", { use = "kl", tau = 2.0 }]
epochs = 3
lr = 0.05
clip_norm = 0.5
ema = 0.9
precision = "fp32"

[[stage]]
use = "distill"
epochs = 9
lr = 1e-9
patience = 1
precision = "fp32"

[[stage]]
use = "export"
"""

#: All that a process could hold for itself: batch norms, a memory, a moving average that teaches.
KILLED = """\
version = 1
name = "killed"
data = { use = "digits", size = 16, batch = 24 }

[teacher]
model = { use = "cifar-resnet", depth = 8, width = 4 }
epochs = 1

[[stage]]
use = "distill"
model = { use = "cifar-resnet", depth = 8, width = 4 }
source = "ema"
objectives = ["ce", { use = "kl", tau = 2.0 }, { use = "crd", negatives = 32, size = 8, weight = 0.1 }]
epochs = 3
ema = 0.9
checkpoint_s = 0.0

[[stage]]
use = "export"
"""

#: One step of a linear classifier behind a batch norm; then each process writes down all it holds.
ONE_STEP = """\
import sys
from pathlib import Path
import torch
from torch import nn
from edgekd import ranks
from edgekd.data import load
from edgekd.learner import Learner
from edgekd.recipe import DataSpec, Training
from edgekd.tasks import Classification
from edgekd.teachers import MovingAverage
from edgekd.train import Job, fit

out = Path(sys.argv[1])
data = load(DataSpec(use="digits"), 0)
with ranks.together():
    torch.manual_seed(ranks.rank())  # the first one's weights count
    network = nn.Sequential(nn.BatchNorm2d(data.size[0]), nn.Flatten(), nn.LazyLinear(10))
    network(torch.zeros(2, *data.size))
    network[0].reset_running_stats()
    objectives = ["ce", {"use": "crd", "size": 4, "negatives": 8}]
    learner = Learner.of(network, objectives=objectives, example=torch.zeros(2, *data.size), source=MovingAverage,
                         images=len(data.train))
    settings = Training(epochs=1, lr=0.1, precision="fp32", warmup=0.0)
    half = len(data.train) // 2
    [done] = fit(learner, Job("distill", data, Classification(), settings, half, [], 0, out))
    assert ranks.gathered(ranks.rank()) == [0, 1]
    whole = ranks.from_first(lambda: ranks.gathered("alone"))
    assert whole == ["alone"]
    state = {**learner.state_dict(), **{f"source.{k}": v for k, v in learner.source.state_dict().items()}}
    torch.save({"state": state, "history": done.history}, out / f"{ranks.rank()}.pt")
"""


def two(*args: str, cwd: Path, launcher: list[str] = TORCHRUN) -> Outcome:
    done = subprocess.run(
        [sys.executable, *launcher, *args], cwd=cwd, capture_output=True, text=True, env=environ(), timeout=240
    )
    return Outcome(done.returncode, done.stdout, done.stderr)


def written(directory: Path, text: str) -> Path:
    directory.mkdir()
    (directory / "recipe.toml").write_text(text)
    (directory / "profile.toml").write_text(PROFILE)
    return directory


def artifacts(run: Path) -> dict[str, Path]:
    """Stage -> directory; there is one of each."""
    found = sorted(m.parent for m in run.glob("*/manifest.json"))
    stages = {path.name.split("-")[1]: path for path in found}
    assert len(stages) == len(found)
    return stages


def weights(artifact: Path) -> dict[str, Tensor]:
    return load_file(artifact / "model.safetensors")


def history(artifact: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (artifact / "metrics.jsonl").read_text().splitlines()]


def test_two_processes_compute_what_one_computes_on_the_summed_batch(
    tmp_path: Path, edgekd: Callable[..., Outcome]
) -> None:
    """Within 1e-5 of a weight or a loss: sums in another order, in fp32."""
    one, both = written(tmp_path / "one", EQUAL % 128), written(tmp_path / "both", EQUAL % 64)
    until = ["--until", "distill-2"]
    alone = edgekd("run", "recipe.toml", *until, cwd=one)
    assert alone.code == 0, alone.err
    outcome = two("-m", "edgekd", "run", "recipe.toml", *until, cwd=both)
    assert outcome.code == 0, outcome.err
    expected, found = artifacts(one / "runs/equal"), artifacts(both / "runs/equal")
    assert list(found) == list(expected) == ["teacher", "distill.a", "distill.b", "distill"]
    assert len(history(found["distill"])) == 2  # the last one stops early, in both at the same epoch
    for stage in found:
        right, made = weights(expected[stage]), weights(found[stage])
        assert right.keys() == made.keys()
        for name, value in right.items():
            assert torch.allclose(made[name], value, rtol=0, atol=1e-5), (stage, name)
        for row, other in zip(history(expected[stage]), history(found[stage]), strict=True):
            for key in row.keys() - {"images_per_s", "loader_images_per_s"}:
                assert other[key] == pytest.approx(row[key], rel=1e-4, abs=1e-5), (stage, key)


def test_after_a_step_all_processes_hold_the_same(tmp_path: Path) -> None:
    script = tmp_path / "one_step.py"
    script.write_text(ONE_STEP)
    outcome = two(str(script), str(tmp_path), cwd=Path(__file__).parent.parent)
    assert outcome.code == 0, outcome.err
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    assert first["history"][0]["loss"] == second["history"][0]["loss"]
    state = first["state"]
    for name, value in state.items():
        assert torch.equal(value, second["state"][name]), name
    data = load(DataSpec(use="digits"), 0)
    mean, std = (torch.tensor(v).double().view(1, -1, 1, 1) for v in (data.mean, data.std))
    x = (data.train.images.double() / 255 - mean) / std
    seen = state["objectives.0.modules_list.1.labels"]
    assert torch.equal(seen[seen >= 0], data.train.labels[seen >= 0])
    assert int((seen >= 0).sum()) == len(data.train) // 2 * 2  # an odd one is dropped
    rows = x[seen >= 0].transpose(0, 1).flatten(1)
    moved = 0.1 * rows.mean(dim=1)
    assert torch.allclose(state["students.0.network.0.running_mean"].double(), moved, rtol=0, atol=1e-6)
    # Variances within the shards: less than the whole one by what their means differ.
    spread = state["students.0.network.0.running_var"].double()
    assert torch.allclose(spread, 0.9 + 0.1 * rows.var(dim=1), rtol=0, atol=1e-4)
    average = state["source.averages.0.network.0.running_mean"].double()
    assert torch.allclose(average, 0.9 * moved, rtol=0, atol=1e-6)


def test_a_whole_recipe_leaves_one_set_of_artifacts(
    tmp_path: Path, finished: Finished, project: Path, edgekd: Callable[..., Outcome]
) -> None:
    """Every kind of stage, under the other launcher, with a teacher cache."""
    cached = ["recipe.toml", "--set", "stage.distill.source.use=cached", "-o", str(tmp_path / "run")]
    outcome = two("-m", "edgekd", "run", *cached, cwd=project, launcher=ACCELERATE)
    assert outcome.code == 0, outcome.err
    assert outcome.out.count("size_mb max") == 1
    assert outcome.err.count("[2/5] distill") == 1
    assert outcome.err.count("report: ") == 1
    assert "Traceback" not in outcome.err
    planned = json.loads(edgekd("check", *cached, "--json").out)
    assert [row["done"] for row in planned["stages"]] == [True] * 5
    assert len(list((tmp_path / "run" / ".cache").glob("*/view-*.npy"))) == 8

    def names(run: Path) -> list[str]:
        files = [p.relative_to(run).parts for p in run.rglob("*") if p.is_file()]
        # Without the keys of stages: their parents' differ.
        plain = ["/".join(p.rpartition("-")[0] if p[:2].isdigit() else p for p in parts) for parts in files]
        return sorted(f for f in plain if not f.startswith((".cache", ".onnx")))

    assert names(tmp_path / "run") == names(finished.directory)


def test_a_killed_process_ends_the_run_and_the_same_command_resumes(tmp_path: Path) -> None:
    command = ["-m", "edgekd", "run", "recipe.toml", "--until", "distill"]
    calm, cut = written(tmp_path / "calm", KILLED), written(tmp_path / "cut", KILLED)
    outcome = two(*command, cwd=calm)
    assert outcome.code == 0, outcome.err
    process = subprocess.Popen(
        [sys.executable, *TORCHRUN, *command],
        cwd=cut,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environ(),
    )
    try:
        within_an_epoch(process, cut / "runs/killed")
        os.kill(worker(process.pid, 1), signal.SIGKILL)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert (process.returncode, out) == (1, "")  # the launcher's own code; the worker's is below
    [said] = [line for line in err.splitlines() if line.startswith("error:")]
    assert said == "error: a process of this run was killed, or its machine is gone"
    assert err.count("hint: run the same command again: it resumes from the last checkpoint") == 1
    assert "/edgekd/" not in err  # no line of a traceback of ours
    events = [json.loads(line) for line in (cut / "runs/killed/events.jsonl").read_text().splitlines()]
    assert (events[-1]["event"], events[-1]["exit_code"]) == ("end", 3)
    resumed = two(*command, cwd=cut)
    assert resumed.code == 0, resumed.err
    assert resumed.err.count("resuming distill at epoch 2") == 1
    expected, found = artifacts(calm / "runs/killed"), artifacts(cut / "runs/killed")
    for name, value in weights(expected["distill"]).items():
        assert torch.equal(weights(found["distill"])[name], value), name


def within_an_epoch(process: subprocess.Popen[str], run: Path) -> None:
    """Wait until a checkpoint lies there from the middle of the second epoch."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()
        for file in run.glob(".partial/*-distill-*/checkpoint.pt"):
            state = torch.load(file, weights_only=True)["state"]
            assert state["epoch"] < 2, "too late"
            if state["epoch"] == 1 and state["step"] > 0:
                return
        time.sleep(0.01)
    raise AssertionError("no checkpoint")


def worker(launcher: int, rank: int) -> int:
    """The process id of a rank: a child of the launcher."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
            ours = parent == launcher and f"RANK={rank}\0" in (stat.parent / "environ").read_text()
        except OSError:  # it has ended
            continue
        if ours and f"LOCAL_RANK={rank}\0" in (stat.parent / "environ").read_text():
            return int(stat.parent.name)
    raise AssertionError(f"no process of rank {rank}")
