"""What the runner reads from tools of Jetsons and Raspberry Pis, on their recorded output: samples/SOURCES.md."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from edgekd.bundle.runner.sensors import (
    Sensors,
    clocks_shown,
    cpu_mhz,
    events,
    power_mode,
    tegrastats,
    temperatures,
    throttled_bits,
)

SAMPLES = Path(__file__).parent / "samples"


def sample(name: str) -> str:
    return (SAMPLES / name).read_text(encoding="utf-8")


def test_every_sample_names_its_source() -> None:
    told = sample("SOURCES.md")
    assert [p.name for p in SAMPLES.iterdir() if p.name != "SOURCES.md" and f"`{p.name}`" not in told] == []


def test_tegrastats_of_an_agx_orin() -> None:
    found = tegrastats(sample("tegrastats-agx-orin.txt"))
    assert found["temperatures"] == {
        "CPU": 44.562, "Tboard": 32.0, "SOC2": 40.093, "Tdiode": 33.0, "SOC0": 41.093, "tj": 44.343, "SOC1": 41.25,
    }  # fmt: skip
    assert found["power_mw"] == {
        "VDD_GPU_SOC": 2340, "VDD_CPU_CV": 390, "VIN_SYS_5V0": 4025, "VDDQ_VDD2_1V8AO": 301,
    }  # fmt: skip
    assert (found["ram_mb"], found["gpu_load"], found["gpu_mhz"]) == ([4321, 62801], 0, 0)
    assert found["cpu_mhz"] == [729] * 12


def test_tegrastats_of_a_busy_thor_that_tells_no_gpu_clock() -> None:
    found = tegrastats(sample("tegrastats-thor-r39.txt"))
    assert found["power_mw"] == {"VDD_GPU": 37528, "VDD_CPU_SOC_MSS": 18961, "VIN_SYS_5V0": 18331, "VIN": 87426}
    assert found["temperatures"]["gpu"] == 62.906
    assert found["temperatures"]["tj"] == 63.281
    assert "gpu_mhz" not in found
    assert len(found["cpu_mhz"]) == 14


def test_tegrastats_of_a_thor_with_three_gpu_clocks() -> None:
    found = tegrastats(sample("tegrastats-thor-r38.txt"))
    assert (found["gpu_mhz"], "gpu_load" in found) == (314, False)
    assert found["power_mw"] == {"VDD_GPU": 1962, "VDD_CPU_SOC_MSS": 5887, "VIN_SYS_5V0": 5635, "VIN": 19780}
    assert found["temperatures"] == {"cpu": 37.343, "tj": 38.875, "soc012": 37.468, "gpu": 38.875, "soc345": 37.406}


def test_tegrastats_before_jetpack_5_gives_power_without_units() -> None:
    found = tegrastats(sample("tegrastats-tx2.txt"))
    assert found["power_mw"] == {
        "VDD_SYS_GPU": 182, "VDD_SYS_SOC": 730, "VDD_4V0_WIFI": 0, "VDD_IN": 5297, "VDD_SYS_CPU": 1917,
        "VDD_SYS_DDR": 1241,
    }  # fmt: skip
    assert (found["gpu_mhz"], found["gpu_load"]) == (114, 0)


def test_tegrastats_with_cores_that_are_off_and_without_power() -> None:
    found = tegrastats(sample("tegrastats-tx2-nx.txt"))
    assert found["cpu_mhz"] == [345, 345, 345, 345]
    assert found["power_mw"] == {}
    assert "gpu_mhz" not in found
    assert found["gpu_load"] == 0


@pytest.mark.parametrize(
    ("file", "mode"), [("nvpmodel-thor.txt", ("MAXN", 0)), ("nvpmodel-fan.txt", ("MODE_30W_4CORE", 5))]
)
def test_nvpmodel(file: str, mode: tuple[str, int]) -> None:
    assert power_mode(sample(file)) == mode


def test_no_nvpmodel() -> None:
    assert power_mode("") == (None, None)


def test_jetson_clocks_that_float_and_that_are_pinned() -> None:
    floating = clocks_shown(sample("jetson-clocks-agx-orin.txt"))
    assert floating["cpu0"] == {"min": 115.2, "max": 2201.6, "now": 2112.0}
    assert sorted(floating) == ["cpu0", "cpu1", "cpu10", "cpu11"]
    pinned = clocks_shown(sample("jetson-clocks-tx1.txt"))
    assert pinned["GPU"] == {"min": 998.4, "max": 998.4, "now": 998.4}
    assert pinned["EMC"] == {"min": 12.75, "max": 1600.0, "now": 1600.0}
    assert pinned["cpu3"]["min"] == pinned["cpu3"]["max"] == 1734.0


@pytest.mark.parametrize(
    ("file", "now", "since"),
    [
        ("vcgencmd-now.txt", ["under-voltage", "throttling"], ["under-voltage", "throttling"]),
        ("vcgencmd-before.txt", [], ["under-voltage", "throttling"]),
        ("vcgencmd-fine.txt", [], []),
    ],
)
def test_vcgencmd(file: str, now: list[str], since: list[str]) -> None:
    assert throttled_bits(sample(file)) == (now, since)


def test_linux_thermal_zones_clocks_and_counters(tmp_path: Path) -> None:
    """The kernel's own files: Documentation/driver-api/thermal/sysfs-api.rst, admin-guide/pm/cpufreq.rst."""
    for name, kind, value in (("thermal_zone0", "cpu-thermal", "51250"), ("thermal_zone1", "gpu-thermal", "-256000")):
        (tmp_path / "thermal" / name).mkdir(parents=True)
        (tmp_path / "thermal" / name / "type").write_text(kind + "\n")
        (tmp_path / "thermal" / name / "temp").write_text(value + "\n")
    assert temperatures(str(tmp_path / "thermal")) == {"cpu-thermal": 51.25}
    (tmp_path / "cpu" / "cpu0" / "cpufreq").mkdir(parents=True)
    (tmp_path / "cpu" / "cpu0" / "cpufreq" / "scaling_cur_freq").write_text("2400000\n")
    assert cpu_mhz(str(tmp_path / "cpu")) == [2400]
    (tmp_path / "class" / "hwmon" / "hwmon3").mkdir(parents=True)
    (tmp_path / "class" / "hwmon" / "hwmon3" / "oc3_event_cnt").write_text("7\n")
    assert events(str(tmp_path)) == {"class/hwmon/hwmon3/oc3_event_cnt": 7}


def snapshot(**more: Any) -> dict[str, Any]:
    return {"events": {"oc3": 7}, **more}


@pytest.mark.parametrize(
    ("before", "after", "clocks", "said"),
    [
        (snapshot(), snapshot(events={"oc3": 9}), [], "throttled 2 times while measuring (oc3)"),
        (snapshot(), snapshot(raspberry_pi={"now": ["throttling"]}), [], "slowed down by throttling"),
        (snapshot(), snapshot(), [1300.0, 1290.0, 800.0], "the GPU's clock fell from 1300 to 800 MHz"),
        (snapshot(power_mode={"name": "MAXN"}), snapshot(power_mode={"name": "15W"}), [], "from MAXN to 15W"),
        (snapshot(), snapshot(), [1300.0, 1290.0], None),
    ],
)
def test_what_slowed_a_device_down_is_told(
    before: dict[str, Any], after: dict[str, Any], clocks: list[float], said: str | None
) -> None:
    rounds = [{"sensors": {"gpu_mhz": mhz}} for mhz in clocks]
    found = Sensors().complaints(rounds, {"before": before, "after": after})
    assert (len(found) == 1 and said in found[0]) if said else found == []
