"""Reports in Markdown: a header that says where, when and how it was measured, then tables.

Every benchmark prints its report line by line, and `--markdown FILE` also writes it to a file.
"""

import argparse
import contextlib
import datetime
import importlib.metadata
import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

PACKAGES = ("mimi_jax", "jax", "torch", "transformers", "moshi", "rustymimi", "qwix")
LOAD = os.getloadavg()[0]  # of the minute before the benchmark adds to it
SETTINGS = ("XLA_FLAGS", "GLIBC_TUNABLES", "OMP_NUM_THREADS")  # environment variables that change speed


class Report:
    """Lines of Markdown, printed at once and kept.

    Args:
        device: JAX's name of the device that was measured.
        notes: further lines of the header, such as the model.
    """

    def __init__(self, device: str, notes: Iterable[str] = ()):
        self._lines: list[str] = []
        software = ", ".join(f"{package} {version}" for package, version in versions().items())
        self.line(f"- date: {datetime.date.today().isoformat()}")
        self.line(f"- command: `{command()}`")
        self.line(f"- machine: {machine()}; JAX on {device}")
        self.line(f"- versions: Python {platform.python_version()}, {software}")
        for note in notes:
            self.line(f"- {note}")

    def line(self, text: str = "") -> None:
        self._lines.append(text)
        print(text, flush=True)

    def table(self, columns: Sequence[str]) -> None:
        """Begin a table, whose rows follow."""
        self.line()
        self.row(columns)
        self.line(f"|{'---|' * len(columns)}")

    def row(self, cells: Iterable[str]) -> None:
        self.line(f"| {' | '.join(cells)} |")

    def save(self, path: Path | None) -> None:
        """Write the report to a file, if one is named."""
        if path is not None:
            path.write_text("\n".join(self._lines) + "\n")


def add_markdown_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="also write the report to this file")


def command() -> str:
    """What the user typed, with the environment variables that change speed."""
    settings = [f"{name}={shlex.quote(os.environ[name])}" for name in SETTINGS if name in os.environ]
    return " ".join([*settings, "python", shlex.join(sys.orig_argv[1:])])


def machine() -> str:
    """The processor, its threads, and the load average of the minute before the benchmark."""
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else None
    name = found[1] if found else platform.machine()
    return f"{name}, {os.cpu_count()} threads, load {LOAD:.1f}"


def versions() -> dict[str, str]:
    """Those of the packages that are installed."""
    found = {}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def device_of_new_processes() -> str:
    """JAX's name of the device that new processes use; JAX is not loaded in this one."""
    program = "import jax; print(jax.devices()[0].device_kind)"
    return subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True
    ).stdout.strip()
