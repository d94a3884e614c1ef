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
        UsageError: the source holds codes, the output is named like audio, the default output exists, the
            output is the source, or a terminal is in the place of a pipe.
        OSError: the source cannot be read or the output cannot be written.
    """
    from mimi_jax.files.audio import FORMATS
    from mimi_jax.files.codes import is_code_file

    if output is not None and output.suffix.lower() in FORMATS:
        raise UsageError(f"codes are not audio, so their file must not end in {output.suffix}, got {output}")
    _check_source(source)
    if source != PIPE and is_code_file(source):
        raise UsageError(f"{source} holds codes, not audio; mimi-jax decode makes audio of them")
    output = output or _beside(source, ".safetensors")
    _check_target(output, source)
    return output


def audio_output(source: Path, output: Path | None) -> Path:
    """Return where audio goes: `output`, or a WAV file beside `source`, or a pipe if the source is one.

    Raises:
        UsageError: the suffix is not that of an audio format, the default output exists, the output is the
            source, or a terminal is in the place of a pipe.
        ValueError: the source begins like a file of another kind.
        OSError: the source cannot be read or the output cannot be written.
    """
    if output is not None and output != PIPE:
        check_audio_name(output)
    _check_source(source)
    if source != PIPE and (kind := other_kind(source)):
        raise ValueError(f"{source} is not a valid code file, but {kind}")
    output = output or _beside(source, ".decoded.wav")
    _check_target(output, source)
    return output


def _beside(source: Path, suffix: str) -> Path:
    if source == PIPE:
        return PIPE
    output = source.with_suffix(suffix)
    if output != source and output.exists():
        raise UsageError(f"{output} exists; name the output with -o to replace it")
    return output


def _check_source(path: Path) -> None:
    """Check that a file can be read, and that a pipe is not a terminal."""
    if path != PIPE:
        check_input(path)
    elif os.isatty(STDIN):
        raise UsageError("- reads from a pipe, but standard input is a terminal; name a file")


def _check_target(path: Path, source: Path) -> None:
    """Check that a file can be written, and that a pipe is not a terminal."""
    if path != PIPE:
        check_output(path, source)
    elif os.isatty(STDOUT):
        raise UsageError("the output is binary, but standard output is a terminal; name a file with -o")


def check_input(path: Path) -> None:
    """Raise UsageError if `path` is a pipe, and OSError if the file cannot be read."""
    check_is_no_pipe(path)
    path.open("rb").close()


def check_is_no_pipe(path: Path) -> None:
    if path == PIPE:
        raise UsageError("- stands for a pipe, which only encode and decode can read; name a file")
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise UsageError(
            f"{path} is a pipe or a device, but only a file can be checked to its end; write a file first, or"
            " send raw audio to `encode -` or codes to `decode -`"
        )


def check_output(path: Path, source: Path | str) -> None:
    """Fail early if `path` is the input, which would be overwritten, or if it could not be written later.

    Args:
        source: a path, or a URL as text.
    """
    if path.exists() and isinstance(source, Path) and source != PIPE and path.samefile(source):
        raise UsageError(f"{path} is the input and would be overwritten; name another output with -o")
    if path.exists() and not path.is_file():
        raise OSError(f"cannot write {path}: it is a folder or a device; name a file")
    check_folder(path)


def check_picture(path: Path, output: Path, source: Path | str) -> None:
    """`check_output` of the picture beside `output`. It may replace only the picture of an older output."""
    check_output(path, source)
    if path.exists() and not output.exists():
        raise UsageError(f"{path} exists and would be overwritten; name another output with -o")


def check_audio_name(path: Path) -> None:
    from mimi_jax.files.audio import FORMATS

    if path.suffix.lower() not in FORMATS:
        raise UsageError(f"the name of an audio file must end in {', '.join(FORMATS)}, got {path}")


def other_kind(path: Path) -> str | None:
    """Return what a file is, such as "a WAV file", if it begins neither like codes nor like a model."""
    from mimi_jax.streams.sniff import SAFETENSORS, file_type

    with path.open("rb") as file:
        kind = file_type(file.read(4096))
    return None if kind == SAFETENSORS else kind


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
