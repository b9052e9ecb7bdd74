"""The machine that a measurement was made on, for its record."""

from pathlib import Path

from mae import limits
from mae.runs.environment import version


def machine() -> str:
    """Processor, cores and versions."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "a processor")
    return f"{model}, {limits.cpus()} cores, torch {version('torch')}"
