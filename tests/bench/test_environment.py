from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from edgekd.bench import disturbances, energy_counter, env, environment, others_busy, same_machine
from edgekd.bench.accelerators import gpus, power_mode


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


def test_only_what_others_do_counts_as_disturbance(tmp_path):
    ticks = os.sysconf("SC_CLK_TCK")
    stat = tmp_path / "stat"
    stat.write_text("cpu 100 0 100 5000 7 0 0 0 0 0\ncpu0 1 2 3\n")
    since = others_busy(stat)
    start, used = time.monotonic(), sum(os.times()[:4])
    while time.monotonic() - start < 0.2:  # our own work
        pass
    seconds = time.monotonic() - start
    spent = round(1.5 * seconds * ticks)
    stat.write_text(f"cpu {100 + spent} 0 100 9000 99 0 0 0 0 0\n")
    ours = (sum(os.times()[:4]) - used) / seconds  # one core, or less of a busy machine
    assert since() == pytest.approx(1.5 - ours, abs=0.15)
    assert others_busy(tmp_path / "none")() is None
    assert disturbances({**QUIET, "load_average": [9.0, 9, 9]}, 0.1) == []
    (told,) = disturbances(QUIET, 0.8)
    assert told.startswith("other programs kept 0.8 of 4 cores busy")


def test_another_process_is_seen():
    since = others_busy()
    busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    time.sleep(0.8)
    found = since()
    busy.kill()
    busy.wait()
    assert found is None or found > 0.2


SMI = """\
NVIDIA H100 80GB HBM3, 570.86.15, 345, 1980, 2619, 34, 700.00, Enabled, 0x0000000000000001
NVIDIA T4, 570.86.15, 300, 1590, 5001, 84, 70.00, Disabled, 0x0000000000000044
nonsense
"""


def test_gpus_and_what_slows_them_down_are_read():
    idle, hot = gpus(SMI)
    assert (idle["name"], idle["clocks.max.sm"], idle["throttled"]) == ("NVIDIA H100 80GB HBM3", "1980", [])
    assert hot["throttled"] == ["power cap", "hardware thermal slowdown"]
    told = disturbances({**QUIET, "gpus": [idle, hot]})
    assert len(told) == 2
    assert "NVIDIA T4 is slowed down by power cap, hardware thermal slowdown" in told[0]
    assert "sudo nvidia-smi -pm 1" in told[1]


def test_a_jetson_in_a_capped_power_mode_is_told():
    assert power_mode("NV Power Mode: 15W\n1\n") == "15W"
    assert power_mode("") is None
    capped = {**QUIET, "jetson": "R36 (release)", "power_mode": "15W"}
    assert "nvpmodel -m 0" in disturbances(capped)[0]
    assert disturbances({**capped, "power_mode": "MAXN"}) == []
    assert "no_turbo" in disturbances({**QUIET, "turbo": True})[0]


def test_the_same_machine_is_known_by_what_changes_latencies():
    here = environment()
    assert same_machine(here, {**here, "load_average": [9.0, 9, 9], "python": "3.99"}) == []
    other = {**here, "cpu": "Other CPU", "instruction_sets": ["avx2"]}
    assert [text.partition(" ")[0] for text in same_machine(other, here)] == ["cpu", "instruction"]
    assert same_machine({**here, "power_mode": "15W"}, {**here, "power_mode": "MAXN"}) == [
        "power mode '15W' and here 'MAXN'"
    ]
    card = {"name": "T4"}
    assert "GPUs ['T4'] and here []" in same_machine({**here, "gpus": [card]}, here)


def test_energy_is_read_from_the_packages_and_survives_a_wrap(tmp_path):
    for i, (name, joules) in enumerate((("package-0", 5), ("core", 3), ("package-1", 1))):
        zone = tmp_path / f"intel-rapl:{i}"
        zone.mkdir()
        (zone / "name").write_text(name + "\n")
        (zone / "max_energy_range_uj").write_text("9999999\n")
        (zone / "energy_uj").write_text(f"{joules * 1_000_000}\n")
    counter = energy_counter(tmp_path)
    start = counter()
    (tmp_path / "intel-rapl:0" / "energy_uj").write_text("7000000\n")
    (tmp_path / "intel-rapl:1" / "energy_uj").write_text("9000000\n")  # a part of the package: counted there
    assert counter() - start == pytest.approx(2.0)
    (tmp_path / "intel-rapl:0" / "energy_uj").write_text("1000000\n")  # over the end: 3 + 1
    assert counter() - start == pytest.approx(6.0)
    assert energy_counter(tmp_path / "none") is None
