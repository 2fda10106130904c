from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from edgekd.bench import disturbances, env, environment


def test_environment_describes_this_machine():
    found = environment()
    assert json.loads(json.dumps(found)) == found
    assert found["cpu"]
    assert found["cores"] >= 1
    assert len(found["load_average"]) == 3
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        kib = int(meminfo.read_text().split("MemTotal:")[1].split()[0])
        assert abs(found["memory_mb"] - kib * 1024 / 1e6) < 0.02 * found["memory_mb"]
    assert {"torch", "onnx", "onnxruntime"} <= set(found["versions"])
    flags = Path("/proc/cpuinfo").read_text().split() if Path("/proc/cpuinfo").exists() else []
    assert ("avx512_vnni" in found["instruction_sets"]) == ("avx512_vnni" in flags)


def test_environment_does_not_import_torch():
    code = "import sys, edgekd.bench as b; b.environment(); sys.exit(bool({'torch', 'onnxruntime'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


QUIET = {"cores": 4, "load_average": [0.3, 0.3, 0.3], "governor": None, "cpu_quota": None}


def test_what_disturbs_is_said_with_what_helps():
    assert disturbances(QUIET) == []
    assert disturbances({**QUIET, "governor": "performance", "cpu_quota": 4.0, "load_average": [2.0, 0, 0]}) == []
    (load,) = disturbances({**QUIET, "load_average": [2.1, 0.0, 0.0]})
    assert "load average 2.1 on 4 cores" in load
    (governor,) = disturbances({**QUIET, "governor": "powersave"})
    assert "cpupower frequency-set -g performance" in governor
    (quota,) = disturbances({**QUIET, "cpu_quota": 1.5})
    assert "1.5 cores on 4" in quota
    assert "--cpuset-cpus" in quota


def test_cpu_quota_of_both_cgroup_versions(tmp_path):
    assert env._cpu_quota(tmp_path) is None
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu/cpu.cfs_quota_us").write_text("-1\n")
    (tmp_path / "cpu/cpu.cfs_period_us").write_text("100000\n")
    assert env._cpu_quota(tmp_path) is None
    (tmp_path / "cpu/cpu.cfs_quota_us").write_text("250000\n")
    assert env._cpu_quota(tmp_path) == 2.5
    (tmp_path / "cpu.max").write_text("150000 100000\n")
    assert env._cpu_quota(tmp_path) == 1.5
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert env._cpu_quota(tmp_path) == 2.5
