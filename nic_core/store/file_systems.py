"""Whether the locks of a folder's file system hold between machines, by its mount options.

A lock that only one machine sees looks like any other to the process that takes it, so two machines
would write one product at the same time. Only the options of the mount tell (Linux).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

MOUNTS = Path("/proc/self/mountinfo")

# FUSE file systems that do not pass `flock` to their server
_LOCAL_LOCKS = {"fuse.sshfs", "fuse.s3fs", "fuse.rclone", "fuse.gcsfuse", "fuse.goofys"}
# kind of file system -> options with which locks stay on the machine, and the one to mount with
_LOCAL_OPTIONS = {
    "lustre": ({"localflock"}, "flock"),
    "nfs": ({"nolock", "local_lock=flock", "local_lock=all"}, "lock,local_lock=none"),
    "nfs4": ({"local_lock=flock", "local_lock=all"}, "local_lock=none"),
    "cifs": ({"nobrl"}, "brl"),
    "smb3": ({"nobrl"}, "brl"),
}


@dataclass(frozen=True)
class Mount:
    """A line of ``/proc/self/mountinfo``.

    Attributes
    ----------
    point
        Where it is mounted.
    kind
        The kind of file system: ``ext4``, ``nfs4``, ``lustre``, ...
    options
        Those of the mount and of the file system.
    """

    point: Path
    kind: str
    options: frozenset[str]


def parse_mounts(text: str) -> list[Mount]:
    """Read the lines of ``/proc/self/mountinfo``, in their order."""
    mounts = []
    for line in text.splitlines():
        before, _, after = line.partition(" - ")
        point, own = before.split()[4:6]
        kind, _, options = (*after.split(), "")[:3]
        point = re.sub(r"\\(\d{3})", lambda octal: chr(int(octal[1], 8)), point)
        mounts.append(Mount(Path(point), kind, frozenset(f"{own},{options}".split(","))))
    return mounts


def mount_of(folder: Path, mounts: list[Mount]) -> Mount | None:
    """Return the mount that holds a folder: the last of the deepest ones; None without any."""
    resolved = folder.resolve()
    above = [mount for mount in mounts if resolved.is_relative_to(mount.point)]
    return max(reversed(above), key=lambda mount: len(mount.point.parts), default=None)


def lock_problem(folder: Path) -> str | None:
    """Return why locks in a folder do not hold between machines, and what to do; None if they may.

    The folder need not exist. None also where the system has no ``/proc``. Whether the file system
    has locks at all shows when the first is taken (:func:`~nic_core.store.exclusive_lock`).
    """
    if not MOUNTS.exists():
        return None
    mount = mount_of(folder, parse_mounts(MOUNTS.read_text()))
    if mount is None:
        return None
    where = f"{mount.point} ({mount.kind})"
    if mount.kind in _LOCAL_LOCKS:
        return (
            f"{where} does not pass locks to other machines; use NFS 4, Lustre with flock or "
            "another shared file system with locks"
        )
    options, remedy = _LOCAL_OPTIONS.get(mount.kind, (set(), ""))
    if found := sorted(options & mount.options):
        return (
            f"{where} is mounted with {', '.join(found)}: its locks hold on this machine only; "
            f"mount it with {remedy}"
        )
    return None
