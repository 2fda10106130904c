from __future__ import annotations

import importlib.util
import subprocess
import time
from types import SimpleNamespace

import pytest

from edgekd.runtimes import doctor, probe


def test_probe_reports_what_is_here_and_what_is_missing():
    start = time.monotonic()
    found = {status.name: status for status in probe()}
    assert time.monotonic() - start < 30
    assert found["onnxruntime"].available
    assert "CPUExecutionProvider" in found["onnxruntime"].details
    assert found["onnxruntime"].version
    assert found["onnxruntime"].why is None
    for name, module in (
        ("tensorrt", "tensorrt"),
        ("torch-tensorrt", "torch_tensorrt"),
        ("tensorrt-rtx", "tensorrt_rtx_bindings"),
    ):
        if importlib.util.find_spec(module) is None:
            assert not found[name].available
            assert found[name].why == "not installed"
            assert "edgekd[trt" in found[name].install


def target(module):
    return doctor._Target("thing", module, ("no-such-distribution",), "pip install thing", "say(None, ['works'])")


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ("raise SystemExit('no licence')", "no licence"),
        ("raise RuntimeError('no driver')", "RuntimeError: no driver"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "ended with status -11"),
    ],
)
def test_an_import_may_fail_in_any_way(tmp_path, monkeypatch, body, why):
    (tmp_path / "broken_runtime.py").write_text(body)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    status = doctor._status(target("broken_runtime"))
    assert not status.available
    assert why in status.why
    assert status.install == "pip install thing"


def test_noise_on_stdout_is_no_answer(tmp_path, monkeypatch):
    (tmp_path / "noisy_runtime.py").write_text("print('{welcome}')")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    status = doctor._status(target("noisy_runtime"))
    assert status.available
    assert status.details == ["works"]


def test_an_import_that_hangs_is_reported():
    def hang(*_, **options):
        raise subprocess.TimeoutExpired("python", options["timeout"])

    status = doctor._status(target("json"), hang)
    assert not status.available
    assert "did not end within" in status.why


def test_a_cpu_build_of_torch_is_told_without_importing_it(monkeypatch):
    monkeypatch.setattr(doctor.importlib.metadata, "version", lambda _: "2.13.0+cpu")
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda _: SimpleNamespace())
    (torch,) = (t for t in doctor._TARGETS if t.module == "torch")
    status = doctor._status(torch, lambda *_, **__: pytest.fail("imported"))
    assert status.why == "a CPU-only build of torch"


def test_the_compiler_without_a_gpu_is_found_under_the_name_that_its_wheel_installs():
    pytest.importorskip("tensorrt_rtx_bindings")
    (status,) = (s for s in probe() if s.name == "tensorrt-rtx")
    assert status.available, status.why
    assert status.version
    assert "8.6" in status.details[0]
