"""What is refused before the slow work starts: arguments, inputs and outputs that cannot work."""

import importlib.util
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from mimi_jax.cli.pipes import PIPE, STDIN, STDOUT

if TYPE_CHECKING:
    from mimi_jax.model import Mimi


class UsageError(ValueError):
    """The arguments do not make sense, so the exit status is 2."""


def code_output(source: Path, output: Path | None) -> Path:
    """Return where codes go: `output`, or a code file beside `source`, or a pipe if the source is one.

    Raises:
        UsageError: the default output exists and is not a code file, the output is the source, or a terminal
            is in the place of a pipe.
        OSError: the source cannot be read or the output cannot be written.
    """
    from mimi_jax.files.codes import is_code_file

    if output is None:
        output = _beside(source, ".safetensors")
        if output != source and output.is_file() and not is_code_file(output):
            raise UsageError(f"{output} exists and is not a code file; name the output with -o")
    _check_ends(source, output)
    return output


def audio_output(source: Path, output: Path | None) -> Path:
    """Return where audio goes: `output`, or a WAV file beside `source`, or a pipe if the source is one.

    Raises:
        UsageError: the suffix is not that of an audio format, the output is the source, or a terminal is in
            the place of a pipe.
        OSError: the source cannot be read or the output cannot be written.
    """
    output = _beside(source, ".decoded.wav") if output is None else output
    _check_ends(source, output)
    if output != PIPE:
        check_audio_name(output)
    return output


def _beside(source: Path, suffix: str) -> Path:
    return PIPE if source == PIPE else source.with_suffix(suffix)


def _check_ends(source: Path, output: Path) -> None:
    """Check that the source can be read and the output be written, and that a pipe is not a terminal."""
    if source != PIPE:
        check_input(source)
    elif os.isatty(STDIN):
        raise UsageError("- reads from a pipe, but standard input is a terminal; name a file")
    if output != PIPE:
        check_output(output, source)
    elif os.isatty(STDOUT):
        raise UsageError("the output is binary, but standard output is a terminal; name a file with -o")


def check_input(path: Path) -> None:
    """Raise OSError if the file cannot be read."""
    path.open("rb").close()


def check_output(path: Path, source: Path) -> None:
    """Fail early if `path` is the input, which would be overwritten, or if it could not be written later."""
    if path.exists() and source != PIPE and path.samefile(source):
        raise UsageError(f"{path} is the input and would be overwritten; name another output with -o")
    if path.exists() and not path.is_file():
        raise OSError(f"cannot write {path}: it is a folder or a device; name a file")
    check_folder(path)


def check_audio_name(path: Path) -> None:
    from mimi_jax.files.audio import FORMATS

    if path.suffix.lower() not in FORMATS:
        raise UsageError(f"the name of an audio file must end in {', '.join(FORMATS)}, got {path}")


def check_folder(path: Path) -> None:
    """Fail if the folder that is to hold `path` is missing or cannot be written to."""
    folder = Path(os.path.realpath(path)).parent
    if not folder.is_dir():
        raise FileNotFoundError(f"cannot write {path}: there is no folder {folder}; make it first")
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise OSError(f"cannot write {path}: no file can be made in {folder} ({error.strerror})") from None


def check_format(pcm_format: str | None, path: Path) -> None:
    if pcm_format is not None and path != PIPE:
        raise UsageError(f"--format describes raw audio on a pipe, but {path} is a file; leave it out")


def check_num_quantizers(model: "Mimi", num_quantizers: int | None) -> None:
    try:
        model.quantizer.resolve_count(num_quantizers)
    except ValueError as error:
        raise UsageError(str(error)) from None


def check_installed(extra: str, *packages: str) -> None:
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        raise ImportError(f"this needs {' and '.join(missing)}; install: pip install 'mimi_jax[{extra}]'")
