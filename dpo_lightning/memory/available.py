"""How much memory there is to be had."""

from __future__ import annotations

from pathlib import Path

import torch

SYSTEM, GROUPS, OWN_GROUPS = Path("/proc/meminfo"), Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
# What limits a group, what it uses, and what of that the kernel can take back: version 2 of cgroups, and version 1.
FILES = {"": ("memory.max", "memory.current"), "memory": ("memory.limit_in_bytes", "memory.usage_in_bytes")}
RECLAIMABLE = {"inactive_file", "total_inactive_file"}


def available(device: torch.device) -> int | None:
    """Bytes that a process can still take: on a GPU what is free, else of the system and of every limit on it.

    Returns:
        None where the system does not say.
    """
    if device.type == "cuda":
        free: int = torch.cuda.mem_get_info(device)[0]
        return free
    rooms = [room for room in (_of_system(), *map(_of_group, _groups())) if room is not None]
    return min(rooms, default=None)


def _of_system() -> int | None:
    lines = dict(line.split(":", 1) for line in _read(SYSTEM).splitlines())
    return int(lines["MemAvailable"].split()[0]) * 1024 if "MemAvailable" in lines else None


def _groups() -> list[tuple[str, Path]]:
    """Folders of this process's groups, with their parents, whose limits hold too."""
    found = []
    for line in _read(OWN_GROUPS).splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers in FILES:
            root = GROUPS / controllers
            found += [(controllers, folder) for folder in (root / path.lstrip("/"), *(root / path.lstrip("/")).parents)]
    return [(controllers, folder) for controllers, folder in found if folder.is_relative_to(GROUPS)]


def _of_group(group: tuple[str, Path]) -> int | None:
    controllers, folder = group
    limit, used = (_read(folder / name).strip() for name in FILES[controllers])
    if not limit.isdigit() or not used.isdigit():
        return None
    statistics = (line.split() for line in _read(folder / "memory.stat").splitlines())
    return int(limit) - int(used) + max((int(size) for name, size in statistics if name in RECLAIMABLE), default=0)


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
