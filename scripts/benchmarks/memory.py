"""What memory a process takes, as the kernel counts it."""

from pathlib import Path


def memory_nbytes(pid: int) -> dict[str, int]:
    """Of a process, by kind: Rss is what is resident; in Pss shared pages are divided among those who share them."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    return {name: int(value.split()[0]) * 1024 for name, value in (line.split(":") for line in lines)}
