"""Memory of the host, so that a trial that fills it is ended by us, not by the kernel together with the search."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

RESERVE_FRACTION = 0.05
"""Share of the host's memory that must stay available."""

MOST_RESERVE_BYTES = 2 * 2**30

PROC = Path("/proc")
CGROUP = Path("/sys/fs/cgroup")


def available_bytes() -> tuple[int, int] | None:
    """(bytes still to be had, bytes in all) of the machine, or of the container where that has less.

    None where the system does not say.
    """
    machine = _fields(PROC / "meminfo", 1024)
    if "MemAvailable" not in machine or "MemTotal" not in machine:
        return None
    found = machine["MemAvailable"], machine["MemTotal"]
    limit, used = _number(CGROUP / "memory.max"), _number(CGROUP / "memory.current")
    if limit is not None and used is not None and limit < machine["MemTotal"]:
        reclaimable = _fields(CGROUP / "memory.stat").get("inactive_file", 0)
        found = min(found, (max(0, limit - used + reclaimable), limit))
    return found


def is_short() -> bool:
    """Less is available than the reserve: 5 % of the memory, at most 2 GB."""
    found = available_bytes()
    return found is not None and found[0] < min(MOST_RESERVE_BYTES, RESERVE_FRACTION * found[1])


def held_bytes(pid: int) -> int:
    """Memory that the process and its descendants hold, what they share with others counted in part (PSS)."""
    return sum(_fields(PROC / str(each) / "smaps_rollup", 1024).get("Pss", 0) for each in _family(pid))


def kills() -> int:
    """Processes that the kernel has killed for want of memory since the machine was started."""
    return _fields(PROC / "vmstat").get("oom_kill", 0)


def _family(pid: int) -> Iterator[int]:
    waiting = [pid]
    while waiting:
        each = waiting.pop()
        yield each
        try:
            waiting += [
                int(child)
                for children in (PROC / str(each) / "task").glob("*/children")
                for child in children.read_text(encoding="ascii").split()
            ]
        except OSError:
            continue  # it has just ended


def _fields(path: Path, unit: int = 1) -> dict[str, int]:
    """`Name: 123 kB` or `name 123` lines as numbers."""
    try:
        lines: Iterable[str] = path.read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return {}
    result = {}
    for line in lines:
        words = line.replace(":", " ").split()
        if len(words) >= 2 and words[1].isdigit():
            result[words[0]] = int(words[1]) * unit
    return result


def _number(path: Path) -> int | None:
    try:
        text = path.read_text(encoding="ascii").strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None
