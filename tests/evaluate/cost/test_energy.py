"""Joules and grams: counters that wrap, meters that are not there, and every factor said."""

from pathlib import Path

import pytest

from unicomp.evaluate.cost import energy


def zone(folder: Path, name: str, kind: str, joules: float) -> Path:
    made = folder / name
    made.mkdir()
    (made / "name").write_text(kind)
    (made / "max_energy_range_uj").write_text("1000000000")
    (made / "energy_uj").write_text(str(int(joules * 1e6)))
    return made / "energy_uj"


def test_packages_are_added_and_a_counter_may_wrap(tmp_path: Path) -> None:
    one = zone(tmp_path, "intel-rapl:0", "package-0", 999.0)
    two = zone(tmp_path, "intel-rapl:1", "package-1", 10.0)
    part = zone(tmp_path, "intel-rapl:0:0", "core", 5.0)
    psys = zone(tmp_path, "intel-rapl:2", "psys", 5.0)
    meter = energy.Rapl(tmp_path)
    assert meter.joules() == 0
    one.write_text("4000000")
    two.write_text("13000000")
    part.write_text("900000000")
    psys.write_text("900000000")
    assert meter.joules() == pytest.approx(5 + 3)
    two.write_text("14000000")
    assert meter.joules() == pytest.approx(9)


def test_without_a_meter_the_reason_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(OSError, match="no counters"):
        energy.Rapl(tmp_path)
    monkeypatch.setattr(energy.ctypes, "CDLL", _absent)
    assert energy.find("cuda") == "NVML is not there: no such library"
    monkeypatch.setattr(energy, "Rapl", _forbidden)
    assert energy.find("cpu") == "RAPL may not be read by this user"


def _absent(name: str) -> None:
    raise OSError("no such library")


def _forbidden() -> None:
    raise PermissionError(13, "Permission denied")


def test_grams_say_every_factor() -> None:
    value, factors = energy.grams(7.2e6, grams_per_kwh=100.0, pue=1.5)
    assert value == pytest.approx(2 * 1.5 * 100)
    assert factors == {
        "joules": 7.2e6,
        "kwh": 2.0,
        "pue": 1.5,
        "grams_per_kwh": 100.0,
        "grams_per_kwh_source": "the caller",
    }
    assert "Ember" in energy.grams(1.0)[1]["grams_per_kwh_source"]
