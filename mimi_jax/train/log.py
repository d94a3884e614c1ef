"""The logs of a run: the means of all losses, and the clips that cannot be read, in files of JSON lines."""

import contextlib
import importlib.util
import json
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from mimi_jax.files.atomic import atomic_path
from mimi_jax.files.corpus import LeftOut


class NotFiniteError(ValueError):
    """A loss or a gradient became NaN or infinite. The last checkpoint is from before that."""


def finite_means(logs: list[dict[str, jax.Array]], done: int) -> dict[str, float]:
    """The mean of each number that the last steps logged.

    Args:
        logs: what each of these steps logged.
        done: how many steps are done, these included.

    Raises:
        NotFiniteError: a number is NaN or infinite.
    """
    values = jax.device_get(logs)
    for step, by_name in enumerate(values, done - len(values) + 1):
        if broken := [name for name, value in by_name.items() if not np.isfinite(value)]:
            raise NotFiniteError(
                f"step {step}: {', '.join(broken)} not finite; every checkpoint is from before that step."
                " Start a new run with a lower optimizer.learning_rate, or set optimizer.max_norm"
            )
    names = dict.fromkeys(name for by_name in values for name in by_name)  # a phase may have begun in between
    return {name: float(np.mean([x[name] for x in values if name in x])) for name in names}


class Log:
    """A context that writes `log.jsonl`, and the same for TensorBoard if tensorboardX is installed.

    Args:
        out: the folder of the run.
        step: how many steps are done. Later lines are removed, because the run computes these steps again.
    """

    def __init__(self, out: Path, step: int):
        self._path, self._out, self._step = out / "log.jsonl", out, step

    def __enter__(self) -> "Log":
        # A killed run may have logged steps after its last checkpoint, and half of a line.
        kept = [line for line in _lines(self._path) if line["step"] <= self._step]
        with atomic_path(self._path) as file:
            file.write_text("".join(json.dumps(line) + "\n" for line in kept))
        self._newest = kept[-1] if kept else {}
        self._file = self._path.open("a")
        self._board = None
        if importlib.util.find_spec("tensorboardX"):
            from tensorboardX import SummaryWriter

            self._board = SummaryWriter(str(self._out / "tensorboard"), purge_step=self._step + 1)
        return self

    def has(self, step: int, name: str) -> bool:
        """Whether the newest line is of this step and has this number."""
        return self._newest.get("step") == step and name in self._newest

    def write(self, step: int, means: dict[str, float]) -> None:
        self._newest = {"step": step, **means}
        self._file.write(json.dumps(self._newest) + "\n")
        self._file.flush()
        if self._board is not None:
            for name, value in means.items():
                self._board.add_scalar(name, value, step)

    def __exit__(self, *_: object) -> None:
        self._file.close()
        if self._board is not None:
            self._board.close()


class LeftOutLog:
    """Says which clips cannot be read, each once, and writes them to `left_out.jsonl`.

    Args:
        out: the folder of the run. It must exist when the first clip is added.
    """

    def __init__(self, out: Path):
        self._path, self._names, self._lock = out / "left_out.jsonl", set(), threading.Lock()
        self._written = {line.get("name") for line in _lines(self._path)}  # by the run that is resumed

    def add(self, clip: LeftOut) -> None:
        """Add a clip; several threads may do this at once."""
        with self._lock:
            if clip.name in self._names:
                return
            self._names.add(clip.name)
            say(f"left out {clip.name}: {clip.reason}")
            if clip.name not in self._written:
                with self._path.open("a") as file:
                    file.write(json.dumps(clip._asdict()) + "\n")

    def __len__(self) -> int:
        return len(self._names)


def say(line: str) -> None:
    """Print a line to stderr, above a progress bar."""
    tqdm.write(line, file=sys.stderr)


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    for line in path.read_text().splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError):
            yield json.loads(line)
