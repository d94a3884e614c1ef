"""The command line: `mimi-jax encode | decode | roundtrip | info | convert`.

Results go to stdout. A failure is one line on stderr and exit status 1 (bad input) or 2 (bad usage), and
leaves no output behind. What is slow to import is imported by the command that needs it.
"""

import argparse
import contextlib
import importlib.util
import logging
import math
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    import numpy as np

    from mimi_jax.blocks import Progress
    from mimi_jax.codes import CodeFile
    from mimi_jax.model import Mimi

MODEL_HELP = "a bundled model (mini), a folder, a .safetensors file or a Hugging Face repository"
PYTORCH_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")


class UsageError(ValueError):
    """What was asked for makes no sense, whatever the input holds."""


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """argparse's own prints the usage too, which is more than one line."""
        self.exit(2, f"{self.prog}: error: {message}\n")


def main(argv: list[str] | None = None) -> int:
    """Run a command and return its exit status.

    Args:
        argv: the words after `mimi-jax`; None for those of this process.
    """
    try:
        arguments, unknown = make_parser().parse_known_args(argv)
    except SystemExit as stop:  # argparse has printed its help or an error
        return int(stop.code or 0)
    _set_environment()
    try:
        if unknown:
            raise UsageError(f"unrecognized arguments: {' '.join(unknown)}")
        with _quiet_libraries():
            arguments.run(arguments)
        return 0
    except KeyboardInterrupt:
        status, reason = 130, "interrupted"
    except (ImportError, OSError, ValueError) as error:
        status, reason = 2 if isinstance(error, UsageError) else 1, _reason(error)
    print(f"mimi-jax {arguments.command}: error: {reason}", file=sys.stderr)
    return status


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="mimi-jax", description="Mimi, a neural codec of speech: audio to codes and back.")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def command(name: str, run, text: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
        added.set_defaults(run=run)
        return added

    def add_model(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--model", default="mini", help=f"{MODEL_HELP} (default: %(default)s)")

    def add_num_quantizers(parser: argparse.ArgumentParser) -> None:
        text = "use the first N codebooks (default: all)"
        parser.add_argument("--num-quantizers", type=int, metavar="N", help=text)

    encode = command("encode", run_encode, "turn audio into a file of codes")
    encode.add_argument("input", metavar="IN", type=Path, help="WAV, FLAC, OGG or MP3, of any rate")
    text = "code file (default: IN with the suffix .safetensors, beside it)"
    encode.add_argument("-o", "--output", metavar="OUT.safetensors", type=Path, help=text)
    add_model(encode)
    add_num_quantizers(encode)

    decode = command("decode", run_decode, "turn a file of codes back into audio")
    decode.add_argument("input", metavar="IN.safetensors", type=Path, help="code file, from encode")
    text = "WAV, FLAC, OGG, Opus or MP3 (default: IN with the suffix .decoded.wav, beside it)"
    decode.add_argument("-o", "--output", metavar="OUT.wav", type=Path, help=text)
    add_model(decode)

    text = "encode and decode, print how well and how fast, and draw it (needs matplotlib)"
    roundtrip = command("roundtrip", run_roundtrip, text)
    roundtrip.add_argument("input", metavar="IN", type=Path, help="WAV, FLAC, OGG or MP3, of any rate")
    text = "what was decoded; the picture goes beside it, with the suffix .png"
    roundtrip.add_argument("-o", "--output", metavar="OUT.wav", type=Path, required=True, help=text)
    add_model(roundtrip)
    add_num_quantizers(roundtrip)

    info = command("info", run_info, "describe a model or a file of codes")
    info.add_argument("name", metavar="MODEL_OR_CODES", help=f"a code file, or {MODEL_HELP}")

    convert = command("convert", run_convert, "rewrite a model in another layout, bit for bit")
    convert.add_argument("source", metavar="SRC", help=MODEL_HELP)
    convert.add_argument("output", metavar="DST", type=Path, help="folder to make")
    layouts = ("flax", "transformers", "kyutai")
    convert.add_argument("--to", choices=layouts, required=True, help="flax is an Orbax folder")
    return parser


def run_encode(arguments: argparse.Namespace) -> None:
    from mimi_jax.codes import save_codes

    _check_input(arguments.input)
    output = arguments.output or arguments.input.with_suffix(".safetensors")
    _check_output(output, arguments.input)
    model = _load_model(arguments.model, decoder=False)
    _check_num_quantizers(model, arguments.num_quantizers)
    audio = _load_audio(arguments.input, model)
    codes, seconds = _encode(model, audio, arguments.num_quantizers)
    file = _code_file(model, codes, audio.shape[1])
    save_codes(output, file)
    print(f"wrote {output}: {_summary(file)}; {_speed(file, seconds)} (start-up included)")


def run_decode(arguments: argparse.Namespace) -> None:
    from mimi_jax.audio import save_audio
    from mimi_jax.codes import load_codes

    _check_input(arguments.input)
    output = arguments.output or arguments.input.with_suffix(".decoded.wav")
    _check_output(output, arguments.input, is_audio=True)
    file = load_codes(arguments.input)
    model = _load_model(arguments.model, encoder=False)
    _check_same_model(arguments.input, file, model, arguments.model)
    audio, seconds = _decode(model, file)
    save_audio(output, audio, file.sampling_rate)
    print(f"wrote {output}: {_summary(file)}; {_speed(file, seconds)} (start-up included)")


def run_roundtrip(arguments: argparse.Namespace) -> None:
    from mimi_jax.atomic import atomic_path
    from mimi_jax.audio import save_audio
    from mimi_jax.metrics import si_sdr
    from mimi_jax.picture import draw

    if importlib.util.find_spec("matplotlib") is None:
        raise ImportError("the picture needs matplotlib; install it: pip install 'mimi_jax[plot]'")
    _check_input(arguments.input)
    output = arguments.output
    _check_output(output, arguments.input, is_audio=True)
    picture = output.with_suffix(".png")
    _check_output(picture, arguments.input)
    model = _load_model(arguments.model)
    _check_num_quantizers(model, arguments.num_quantizers)
    config = model.config
    audio = _load_audio(arguments.input, model)
    _compile(model, audio, arguments.num_quantizers)
    codes, encode_seconds = _encode(model, audio, arguments.num_quantizers)
    file = _code_file(model, codes, audio.shape[1])
    decoded, decode_seconds = _decode(model, file)
    title = f"{arguments.input.name} through {arguments.model}: {_summary(file)}"
    png = draw(audio, decoded, file, title)
    with atomic_path(picture) as temporary:  # around the other, so that there are two new files or none
        temporary.write_bytes(png)
        save_audio(output, decoded, config.sampling_rate)
    _print_table(
        {
            "model": f"{arguments.model} ({file.model_id})",
            **_code_rows(file),
            "SI-SDR": f"{si_sdr(audio, decoded):.1f} dB",
            "encoding": _speed(file, encode_seconds),
            "decoding": _speed(file, decode_seconds),
        }
    )
    print(f"speeds were measured on {_device()} after a warm-up: compilation is not in them")
    print(f"wrote {output} and {picture}")


def run_info(arguments: argparse.Namespace) -> None:
    if _is_code_file(arguments.name):
        from mimi_jax.codes import load_codes

        file = load_codes(arguments.name)
        owner = _bundled_with(file.model_id) or "not a bundled one"
        _print_table({**_code_rows(file), "model": f"{file.model_id} ({owner})"})
        return
    from mimi_jax.checkpoint import find, layout_of, model_id

    path = find(arguments.name)
    model = _load_model(path, dtype=None)
    config = model.config
    frame_rate = config.sampling_rate / config.frame_size
    _print_table(
        {
            "model": str(path),
            "identity": model_id(model),
            "layout": layout_of(path),
            "parameters": f"{_num_parameters(model):,}",
            "audio": f"{config.sampling_rate} Hz, {'mono' if config.audio_channels == 1 else 'stereo'}",
            "frames": f"{frame_rate:g} Hz, of {config.frame_size} samples",
            "codebooks": f"{config.num_quantizers} x {config.codebook_size} codes",
            "bitrate": f"{_kbits(config.num_quantizers, config.codebook_size, frame_rate):.2f} kbit/s",
        }
    )


def run_convert(arguments: argparse.Namespace) -> None:
    from mimi_jax.atomic import atomic_path

    source, output = arguments.source, arguments.output
    if Path(source).is_file() and source.endswith(PYTORCH_SUFFIXES):
        raise ValueError(f"{source} is a PyTorch file; convert it with convert/convert_checkpoint.py")
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise UsageError(f"{output} exists; name a new folder")
    _check_folder(output)
    model = _load_model(source, dtype=None)
    from mimi_jax.checkpoint import save

    with atomic_path(output) as temporary:
        save(model, temporary, arguments.to)
    print(f"wrote {output}: {source} in the layout {arguments.to}")


def _set_environment() -> None:
    """Defaults for JAX: it is quiet, and keeps what it compiles for the next time."""
    if "jax" in sys.modules:  # which has read them already
        return
    caches = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(caches / "mimi_jax" / "xla"))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "0")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")


@contextlib.contextmanager
def _quiet_libraries() -> Iterator[None]:
    """Keep what libraries warn of, such as a cache that cannot be written, off stderr."""
    disabled = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


def _reason(error: Exception) -> str:
    """What went wrong, in one line."""
    text = str(error) or type(error).__name__
    if isinstance(error, OSError) and error.strerror and error.filename:
        text = f"{error.filename}: {error.strerror}"
    return " ".join(text.splitlines())


def _check_input(path: Path) -> None:
    path.open("rb").close()


def _check_output(path: Path, source: Path, is_audio: bool = False) -> None:
    """Fail before the slow work where writing `path` would fail after it, or would lose the input."""
    if path.exists() and path.samefile(source):
        raise UsageError(f"{path} is the input, which would be lost; name another output with -o")
    if path.exists() and not path.is_file():
        raise OSError(f"cannot write {path}: it is a folder or a device; name a file")
    if is_audio:
        from mimi_jax.audio import FORMATS

        if path.suffix.lower() not in FORMATS:
            raise UsageError(f"the name of an audio file must end in {', '.join(FORMATS)}, got {path}")
    _check_folder(path)


def _check_folder(path: Path) -> None:
    folder = Path(os.path.realpath(path)).parent
    if not folder.is_dir():
        raise FileNotFoundError(f"cannot write {path}: there is no folder {folder}; make it first")
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise OSError(f"cannot write {path}: {folder} takes no files ({error.strerror})") from None


def _check_num_quantizers(model: "Mimi", num_quantizers: int | None) -> None:
    if num_quantizers is not None:
        try:
            model.quantizer.check_count(num_quantizers)
        except ValueError as error:
            raise UsageError(str(error)) from None


def _check_same_model(path: Path, file: "CodeFile", model: "Mimi", name: str) -> None:
    from mimi_jax.checkpoint import model_id

    config = model.config
    expected = {
        "model_id": model_id(model),
        "sampling_rate": config.sampling_rate,
        "frame_size": config.frame_size,
        "codebook_size": config.codebook_size,
    }
    for field, value in expected.items():
        if (found := getattr(file, field)) != value:
            raise ValueError(
                f"{path} holds codes of another model: its {field} is {found}, that of {name} is {value};"
                " name its model with --model"
            )


def _load_model(name: str | Path, **options) -> "Mimi":
    from mimi_jax.model import Mimi

    return Mimi.from_pretrained(name, **options)


def _load_audio(path: Path, model: "Mimi") -> "np.ndarray":
    from mimi_jax.audio import load_audio

    with _no_stderr():
        return load_audio(path, model.config.sampling_rate, model.config.audio_channels)


@contextlib.contextmanager
def _no_stderr() -> Iterator[None]:
    """Keep C libraries off stderr too: the MP3 decoder comments on damaged files there."""
    sys.stderr.flush()
    stderr = os.dup(2)
    try:
        with open(os.devnull, "wb") as null:
            os.dup2(null.fileno(), 2)
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)


@contextlib.contextmanager
def _progress(title: str, num_samples: int, samples_a_count: int, sampling_rate: int) -> "Iterator[Progress]":
    """A bar in seconds of audio, on a terminal and for work of more than a second."""
    from tqdm import tqdm

    layout = "{l_bar}{bar}| {n:.0f} of {total:.0f} s [{elapsed}<{remaining}]"
    total = num_samples / sampling_rate
    with tqdm(desc=title, total=total, delay=1, leave=False, disable=None, bar_format=layout) as bar:
        yield lambda count: bar.update(count * samples_a_count / sampling_rate)


def _encode(model: "Mimi", audio: "np.ndarray", num_quantizers: int | None) -> "tuple[np.ndarray, float]":
    """Codes [codebooks, frames], and the seconds it took."""
    from mimi_jax.blocks import encode_in_blocks

    with _progress("encoding", audio.shape[1], 1, model.config.sampling_rate) as progress:
        start = time.perf_counter()
        codes = encode_in_blocks(model, audio, num_quantizers, progress=progress)
        return codes, time.perf_counter() - start


def _decode(model: "Mimi", file: "CodeFile") -> "tuple[np.ndarray, float]":
    """Audio [channels, samples] of the exact length, and the seconds it took."""
    from mimi_jax.blocks import decode_in_blocks

    with _progress("decoding", file.num_samples, file.frame_size, file.sampling_rate) as progress:
        start = time.perf_counter()
        audio = decode_in_blocks(model, file.audio_codes, progress=progress)
        return audio[:, : file.num_samples], time.perf_counter() - start


def _compile(model: "Mimi", audio: "np.ndarray", num_quantizers: int | None) -> None:
    """Run once what will be timed: one frame, where blocks make that the same program."""
    from mimi_jax.blocks import decode_in_blocks, encode_in_blocks

    if model.config.is_streamable:
        audio = audio[:, : model.config.frame_size]
    decode_in_blocks(model, encode_in_blocks(model, audio, num_quantizers))


def _code_file(model: "Mimi", codes: "np.ndarray", num_samples: int) -> "CodeFile":
    from mimi_jax.checkpoint import model_id
    from mimi_jax.codes import CodeFile

    config = model.config
    return CodeFile(
        audio_codes=codes,
        num_samples=num_samples,
        sampling_rate=config.sampling_rate,
        codebook_size=config.codebook_size,
        frame_size=config.frame_size,
        model_id=model_id(model),
    )


def _is_code_file(name: str) -> bool:
    import safetensors

    from mimi_jax.codes import FORMAT

    try:
        with safetensors.safe_open(name, framework="np") as file:
            return (file.metadata() or {}).get("format") == FORMAT
    except (safetensors.SafetensorError, OSError):
        return False


def _bundled_with(identity: str) -> str | None:
    """The bundled model of that identity."""
    from mimi_jax.checkpoint import bundled_models, model_id

    for name in bundled_models():
        if model_id(_load_model(name)) == identity:
            return name
    return None


def _num_parameters(model: "Mimi") -> int:
    """How many numbers a checkpoint of the model holds."""
    import jax
    from flax import nnx

    from mimi_jax.quantizer import Codebook

    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Not(nnx.OfType(Codebook)))))


def _device() -> str:
    import jax

    return jax.devices()[0].device_kind


def _kbits(num_codebooks: int, codebook_size: int, frame_rate: float) -> float:
    return num_codebooks * math.log2(codebook_size) * frame_rate / 1000


def _code_rows(file: "CodeFile") -> dict[str, str]:
    num_codebooks, num_frames = file.audio_codes.shape
    frame_rate = file.sampling_rate / file.frame_size
    return {
        "duration": f"{file.num_samples / file.sampling_rate:.2f} s, {file.num_samples} samples",
        "frames": f"{num_frames}, {frame_rate:g} Hz",
        "codebooks": f"{num_codebooks} x {file.codebook_size} codes",
        "bitrate": f"{_kbits(num_codebooks, file.codebook_size, frame_rate):.2f} kbit/s",
    }


def _summary(file: "CodeFile") -> str:
    num_codebooks, num_frames = file.audio_codes.shape
    kbits = _kbits(num_codebooks, file.codebook_size, file.sampling_rate / file.frame_size)
    return f"{num_frames} frames x {num_codebooks} codebooks, {kbits:.2f} kbit/s"


def _speed(file: "CodeFile", seconds: float) -> str:
    return f"{file.num_samples / file.sampling_rate / seconds:.3g} x realtime"


def _print_table(rows: dict[str, str]) -> None:
    width = max(map(len, rows)) + 2
    for name, value in rows.items():
        print(f"{name:<{width}}{value}")


if __name__ == "__main__":
    sys.exit(main())
