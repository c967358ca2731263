"""Energy from the machine's own counters, and what it comes to in grams of CO2.

RAPL counts the joules of whole processor packages (their memory controllers included, other work
too); NVML those of a GPU board. Where neither can be read, energy is unmeasurable: it is estimated
only from a power that the user gives, and then marked so.
"""

import ctypes
from pathlib import Path
from typing import Any, Protocol

POWERCAP = Path("/sys/class/powercap")
JOULES_PER_KWH = 3.6e6
GRAMS_PER_KWH = 480.0
SOURCE = "world average of 2023, Ember, Global Electricity Review 2024"
PUE = 1.0
"""Energy of the building over that of the machine; 1: the machine alone."""


class Meter(Protocol):
    """A counter of joules."""

    name: str

    def joules(self) -> float:
        """Return the joules so far, from any zero; never less than before."""


class Rapl:
    """The processor packages, by Linux's powercap files.

    Raises OSError where there are none or they may not be read.
    """

    name = "rapl"

    def __init__(self, folder: Path = POWERCAP) -> None:
        found = [
            zone
            for zone in sorted(folder.glob("*rapl:*"))
            if zone.name.count(":") == 1
            and (zone / "name").read_text("utf-8").startswith("package")
        ]
        if not found:
            raise OSError(f"no counters of processor packages in `{folder}`")
        self.files = [zone / "energy_uj" for zone in found]
        self.ranges = [_number(zone / "max_energy_range_uj") for zone in found]
        self.last = [_number(file) for file in self.files]
        self.total = 0

    def joules(self) -> float:
        """Return the joules since the meter was made; a counter that wrapped once is seen."""
        for place, file in enumerate(self.files):
            now = _number(file)
            gone = now - self.last[place]
            self.total += gone if gone >= 0 else gone + self.ranges[place]
            self.last[place] = now
        return self.total / 1e6


class Nvml:
    """One NVIDIA GPU, by the driver's library.

    Raises OSError where there is no such library, GPU or counter.
    """

    name = "nvml"

    def __init__(self, index: int = 0) -> None:
        self.library: Any = ctypes.CDLL("libnvidia-ml.so.1")
        self._call("nvmlInit_v2")
        self.device = ctypes.c_void_p()
        self._call("nvmlDeviceGetHandleByIndex_v2", index, ctypes.byref(self.device))
        self.joules()

    def joules(self) -> float:
        """Return the joules since the driver was loaded."""
        found = ctypes.c_ulonglong()
        self._call("nvmlDeviceGetTotalEnergyConsumption", self.device, ctypes.byref(found))
        return found.value / 1e3

    def _call(self, name: str, *arguments: Any) -> None:
        status = getattr(self.library, name)(*arguments)
        if status != 0:
            raise OSError(f"`{name}` gave {status}")


def find(device: str) -> Meter | str:
    """Return the meter of a device, `cpu` or `cuda`, or why there is none."""
    try:
        return Nvml() if device == "cuda" else Rapl()
    except OSError as error:
        what = "NVML" if device == "cuda" else "RAPL"
        if isinstance(error, PermissionError):
            return f"{what} may not be read by this user"
        return f"{what} is not there: {error.strerror or error}"


def grams(
    joules: float, *, grams_per_kwh: float = GRAMS_PER_KWH, pue: float = PUE
) -> tuple[float, dict[str, Any]]:
    """Return the grams of CO2 of some joules, and every factor that went into them."""
    kwh = joules / JOULES_PER_KWH
    factors = {
        "joules": joules,
        "kwh": kwh,
        "pue": pue,
        "grams_per_kwh": grams_per_kwh,
        "grams_per_kwh_source": SOURCE if grams_per_kwh == GRAMS_PER_KWH else "the caller",
    }
    return kwh * pue * grams_per_kwh, factors


def _number(file: Path) -> int:
    return int(file.read_text("ascii"))
