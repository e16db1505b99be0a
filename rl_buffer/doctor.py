"""What this machine gives to rl_buffer, what is too little, and how to mend it: `rl-buffer doctor`."""

import importlib.metadata
import mmap
import os
import platform
import resource
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from rl_buffer.descriptors import PER_CHANNEL, PER_CLIENT
from rl_buffer.storage import available_memory_nbytes

OK, WARN, FAIL = "ok", "warn", "fail"
_GIB = 1 << 30
_PACKAGES = ("torch", "numpy", "numba", "pyzmq", "msgspec", "safetensors", "multiprocess")
_OPTIONAL_PACKAGES = {"rich": "rl-buffer top", "prometheus-client": "rl-buffer serve --metrics-port"}


class Finding(NamedTuple):
    """One line of the report."""

    status: str
    what: str
    found: str
    advice: str = ""  # what to do, unless all is well


def examine() -> Iterator[Finding]:
    """Look at everything; nothing is changed. A check that cannot be made is a warning."""
    for check in _CHECKS:
        try:
            yield from check()
        except (OSError, ValueError, LookupError) as error:
            what = check.__name__.removeprefix("_").replace("_", " ")
            yield Finding(WARN, what, f"could not be found out: {error}", "is /proc mounted?")


def _processor() -> Iterator[Finding]:
    machine = platform.machine()
    yield Finding(
        OK if machine == "x86_64" else FAIL,
        "processor",
        machine,
        "" if machine == "x86_64" else "use an x86-64 machine: the order of stores that rows rely on is its",
    )
    usable, present = len(os.sched_getaffinity(0)), os.cpu_count() or 1
    limit = _cgroup_cpus()
    found = f"{usable} of {present} usable" + ("" if limit is None else f", cgroup gives the time of {limit:.1f}")
    is_enough = min(usable, limit or usable) >= 2
    advice = "" if is_enough else "server, actors and learner want two or more: taskset -pc, or the container's --cpus"
    yield Finding(OK if is_enough else WARN, "CPUs", found, advice)


def _kernel() -> Iterator[Finding]:
    release = platform.release()
    for name, function in (("memfd", _try_memfd), ("pidfd", _try_pidfd)):
        try:
            function()
        except (OSError, AttributeError) as error:
            yield Finding(FAIL, name, f"Linux {release}: {error}", "use Linux 5.3 or newer, and a sandbox that lets it")
        else:
            yield Finding(OK, name, f"Linux {release}")


def _memory() -> Iterator[Finding]:
    available = available_memory_nbytes()
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    is_much = available >= _GIB
    yield Finding(
        OK if is_much else WARN,
        "memory",
        f"{available / _GIB:.1f} GiB available of {total / _GIB:.1f} GiB, cgroup limits counted",
        "" if is_much else "end other processes, or raise the container's memory limit (docker run --memory)",
    )
    usage = shutil.disk_usage("/dev/shm")
    is_small = usage.total < _GIB
    yield Finding(
        WARN if is_small else OK,
        "/dev/shm",
        f"{usage.free / _GIB:.2f} GiB free of {usage.total / _GIB:.2f} GiB",
        "tables do not need it, but serve --directory /dev/shm/... does: docker run --shm-size" if is_small else "",
    )
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    found = "no limit" if soft == resource.RLIM_INFINITY else f"{soft / 1024:,.0f} KiB"
    yield Finding(OK, "locked memory", f"{found} (pinned batches are CUDA's and not counted)")


def _huge_pages() -> Iterator[Finding]:
    setting = _chosen(Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled"))
    helps = setting in ("always", "within_size", "advise", "force")
    yield Finding(
        OK,
        "huge pages",
        f"of {mmap.PAGESIZE // 1024} KiB pages; for shared memory: {setting}",
        "" if helps else "tables of many GiB may gather faster with them: echo advise > .../shmem_enabled, as root",
    )


def _file_descriptors() -> Iterator[Finding]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    clients = hard // (PER_CLIENT + PER_CHANNEL)
    is_enough = hard >= 4096 or hard == resource.RLIM_INFINITY
    yield Finding(
        OK if is_enough else WARN,
        "descriptors",
        f"{soft:,} and up to {hard:,}: about {clients:,} clients with one writer each",
        "" if is_enough else "raise the hard limit: ulimit -Hn, LimitNOFILE= of systemd, docker run --ulimit nofile",
    )


def _versions() -> Iterator[Finding]:
    is_new = sys.version_info >= (3, 11)
    yield Finding(OK if is_new else FAIL, "Python", platform.python_version(), "" if is_new else "use 3.11 or newer")
    for package in _PACKAGES:
        try:
            yield Finding(OK, package, importlib.metadata.version(package))
        except importlib.metadata.PackageNotFoundError:
            yield Finding(FAIL, package, "not installed", f"pip install {package}")
    for package, purpose in _OPTIONAL_PACKAGES.items():
        try:
            yield Finding(OK, package, importlib.metadata.version(package))
        except importlib.metadata.PackageNotFoundError:
            yield Finding(WARN, package, "not installed", f"pip install {package}, for {purpose}")


_CHECKS: tuple[Callable[[], Iterator[Finding]], ...] = (
    _processor,
    _kernel,
    _memory,
    _huge_pages,
    _file_descriptors,
    _versions,
)


def _try_memfd() -> None:
    os.close(os.memfd_create("rl_buffer:doctor", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING))


def _try_pidfd() -> None:
    os.close(os.pidfd_open(os.getpid()))


def _chosen(path: Path) -> str:
    """The word in brackets of a sysfs choice; "unknown" where there is none."""
    try:
        words = path.read_text().split()
    except OSError:
        return "unknown"
    return next((word.strip("[]") for word in words if word.startswith("[")), "unknown")


def _cgroup_cpus() -> float | None:
    """CPU time per second that the container may use; None: no limit that can be seen here."""
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
    except (OSError, ValueError):
        return None
    return None if quota == "max" else int(quota) / int(period)
