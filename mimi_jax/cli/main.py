"""The command line: `mimi-jax encode | decode | roundtrip | info | convert | tokenize | train | evaluate`.

Results go to stdout. A failure is one line on stderr and exit status 1 (bad input) or 2 (bad usage), and
leaves no output behind; 128 and more stand for a signal, 130 for Ctrl-C and 141 for a pipe without a reader.
Audio and codes go from file to file, or from pipe to pipe, in memory that does not grow with their length.
What is slow to import is imported by the command that needs it.
"""

import argparse
import collections
import contextlib
import gc
import importlib.util
import logging
import math
import os
import select
import signal
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    import numpy as np

    from mimi_jax.files.codes import CodeReader, CodeSpec
    from mimi_jax.model import Mimi
    from mimi_jax.streams.push import StreamingDecoder, StreamingEncoder

    Pieces = Iterator[tuple["np.ndarray", int]]  # codes [codebooks, frames], and the samples they are of

MODEL_HELP = "a bundled model (mini), a folder, a .safetensors file or a Hugging Face repository"
PIPE = Path("-")
STDIN, STDOUT = 0, 1
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# Seconds that what comes before in a pipeline has to end, after a signal: an encoder ends its stream in time
# for the decoder behind it, which had the same signal.
AUDIO_GRACE, CODES_GRACE = 0.5, 3.0
PCM_FORMATS = ("s16le", "f32le")  # those of mimi_jax.streams.wire, which is slow to import
PYTORCH_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")


class UsageError(ValueError):
    """What was asked for makes no sense, whatever the input holds."""


class Interrupt(KeyboardInterrupt):
    """A signal that asks to stop."""

    def __init__(self, number: int, reason: str = "interrupted"):
        super().__init__(reason)
        self.status = 128 + number


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be positive, got {text}")
    return number


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """argparse's own prints the usage too, which is more than one line."""
        self.exit(2, f"{self.prog}: error: {message}; see {self.prog} --help\n")


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
        with _on_signals(_interrupt), _quiet_libraries():
            arguments.run(arguments)
        return 0
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), STDOUT)  # or Python complains at its end, as it flushes
        return 141
    except KeyboardInterrupt as interrupt:
        status, reason = getattr(interrupt, "status", 130), str(interrupt) or "interrupted"
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

    def add_format(parser: argparse.ArgumentParser) -> None:
        text = "of raw audio on a pipe, at the model's rate and without a header (default: s16le)"
        parser.add_argument("--format", choices=PCM_FORMATS, help=text)

    encode = command("encode", run_encode, "turn audio into a file of codes")
    text = "WAV, FLAC, OGG or MP3, of any rate; - for raw audio from a pipe"
    encode.add_argument("input", metavar="IN", type=Path, help=text)
    text = (
        "code file, - for a stream of codes to a pipe (default: IN with the suffix .safetensors, beside it;"
        " - for -)"
    )
    encode.add_argument("-o", "--output", metavar="OUT.safetensors", type=Path, help=text)
    add_model(encode)
    add_num_quantizers(encode)
    add_format(encode)

    decode = command("decode", run_decode, "turn a file of codes back into audio")
    text = "code file, from encode; - for a stream of codes from a pipe"
    decode.add_argument("input", metavar="IN.safetensors", type=Path, help=text)
    text = (
        "WAV, FLAC, OGG, Opus or MP3, - for raw audio to a pipe (default: IN with the suffix .decoded.wav,"
        " beside it; - for -)"
    )
    decode.add_argument("-o", "--output", metavar="OUT.wav", type=Path, help=text)
    add_model(decode)
    add_format(decode)

    text = "encode and decode, print how well and how fast, and draw it (needs matplotlib)"
    roundtrip = command("roundtrip", run_roundtrip, text)
    roundtrip.add_argument("input", metavar="IN", type=Path, help="WAV, FLAC, OGG or MP3, of any rate")
    text = "what was decoded; the picture goes beside it, with the suffix .png"
    roundtrip.add_argument("-o", "--output", metavar="OUT.wav", type=Path, required=True, help=text)
    add_model(roundtrip)
    add_num_quantizers(roundtrip)

    info = command("info", run_info, "describe a model or a file of codes")
    info.add_argument("name", metavar="MODEL_OR_CODES", help=f"a code file, or {MODEL_HELP}")

    convert = command(
        "convert", run_convert, "rewrite a model in another layout, bit for bit (int8 weights as floats)"
    )
    convert.add_argument("source", metavar="SRC", help=MODEL_HELP)
    convert.add_argument("output", metavar="DST", type=Path, help="folder to make")
    layouts = ("flax", "transformers", "kyutai")
    convert.add_argument("--to", choices=layouts, required=True, help="flax is an Orbax folder")

    add_tokenize(command)
    add_training(command)
    return parser


def add_tokenize(command: Callable[..., argparse.ArgumentParser]) -> None:
    text = "turn a corpus into Parquet files of codes; run it again to go on (needs mimi_jax[tokenize])"
    tokenize = command("tokenize", run_tokenize, text)
    text = "folders, patterns, audio files, .tar shards, .parquet files with a column audio, .jsonl manifests"
    tokenize.add_argument("sources", metavar="SRC", nargs="+", help=text)
    tokenize.add_argument(
        "-o", "--output", metavar="DIR", type=Path, required=True, help="folder to make or go on in"
    )
    add = tokenize.add_argument
    add("--model", default="mini", help=f"{MODEL_HELP} (default: %(default)s)")
    add("--num-quantizers", type=_positive, metavar="N", help="keep the first N codebooks (default: all)")
    add(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="default: %(default)s, which is exact",
    )
    add(
        "--clips-per-shard",
        type=_positive,
        metavar="N",
        default=1000,
        help="of plain files (default: %(default)s)",
    )
    text = "longer clips count as errors (default: a day)"
    add("--max-seconds", type=float, metavar="S", default=86_400.0, help=text)
    add(
        "--batch-size",
        type=_positive,
        metavar="N",
        help="clips at once, fewer if they are long (default: 8 on a CPU, else 64 a device)",
    )
    add(
        "--workers",
        type=int,
        metavar="N",
        help="processes that decode (default: one less than there are CPUs, at most 16)",
    )
    add("--strict", action="store_true", help="stop at the first clip that cannot be coded")
    text = "do again the shards that have errors, as after a disk or a network that failed for a while"
    add("--retry-errors", action="store_true", help=text)
    text = "of several processes that share the work (default: as SLURM, MPI or GKE say, else 0 of 1)"
    add("--process-index", type=int, metavar="I", help=f"this one, from 0, {text}")
    add("--process-count", type=_positive, metavar="N", help="how many there are")
    text = "local: all devices of this process; ray: a Ray cluster (needs mimi_jax[ray])"
    add("--engine", choices=("local", "ray"), default="local", help=text)
    add("--ray-address", metavar="ADDRESS", help="of a cluster, such as auto (default: one on this machine)")
    add(
        "--ray-actors",
        type=_positive,
        metavar="N",
        help="models at once (default: as many as there is room for)",
    )
    text = "what each takes, such as num_cpus=8 num_gpus=1 or TPU=4 (default: num_cpus=1)"
    add("--ray-resources", metavar="NAME=N", nargs="+", default=[], help=text)


def add_training(command: Callable[..., argparse.ArgumentParser]) -> None:
    train = command("train", run_train, "train or fine-tune a model (needs mimi_jax[train])")
    train.add_argument("config", metavar="CONFIG", type=Path, help="a TOML file, such as those in configs/")
    data_text = "a folder of audio, or a JSONL manifest"
    train.add_argument("--data", metavar="DATA", type=Path, required=True, help=data_text)
    text = "a folder for checkpoints, the log and the model"
    train.add_argument("--out", metavar="DIR", type=Path, required=True, help=text)
    text = "go on from the newest checkpoint in DIR, to the same numbers as if nothing had happened"
    train.add_argument("--resume", action="store_true", help=text)

    text = "measure the quality of a model on one's own audio (needs mimi_jax[evaluate])"
    evaluate = command("evaluate", run_evaluate, text)
    evaluate.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    evaluate.add_argument("data", metavar="DATA", type=Path, help=data_text)
    text = "numbers of codebooks to compare (default: the fewest, powers of two, half of all, all)"
    evaluate.add_argument("--num-quantizers", type=int, nargs="+", metavar="N", help=text)
    text = "only paths that match, such as 'valid/*'"
    evaluate.add_argument("--include", metavar="PATTERN", default="*", help=text)
    text = "all numbers; a picture of them goes beside it, with the suffix .png"
    evaluate.add_argument("-o", "--output", metavar="OUT.json", type=Path, help=text)


def run_encode(arguments: argparse.Namespace) -> None:
    source, output = arguments.input, _output_of(arguments, ".safetensors")
    _check_format(arguments.format, source)
    model = _load_model(arguments.model, decoder=False)
    _check_num_quantizers(model, arguments.num_quantizers)
    spec = _code_spec(model, arguments.num_quantizers)
    with contextlib.ExitStack() as stack:
        if source == PIPE:
            from mimi_jax.streams.push import StreamingEncoder

            encoder = StreamingEncoder(model, num_quantizers=spec.num_codebooks)
            pieces = _encode_pipe(encoder, stack.enter_context(_stdin(AUDIO_GRACE)), arguments.format)
        else:
            pieces = _encode_file(model, source, spec.num_codebooks)
        start, num_samples = time.perf_counter(), 0
        with _code_target(output, spec) as write:
            for codes, count in pieces:
                write(codes, count)
                num_samples += count
        _report(output, spec, num_samples, time.perf_counter() - start)


def run_decode(arguments: argparse.Namespace) -> None:
    from mimi_jax.files.codes import open_codes

    source, output = arguments.input, _output_of(arguments, ".decoded.wav", is_audio=True)
    _check_format(arguments.format, output)
    with contextlib.ExitStack() as stack:
        if source == PIPE:
            from mimi_jax.streams.push import STEP_FRAMES, StreamingDecoder
            from mimi_jax.streams.wire import CodeStreamReader

            # The model first: what comes before in the pipeline is loading its own.
            model = _load_model(arguments.model, encoder=False)
            stdin = stack.enter_context(_stdin(CODES_GRACE))
            reader = CodeStreamReader(stdin.read, max_frames=STEP_FRAMES[0])
            pieces, length = _decode_pipe(StreamingDecoder(model), stdin.cut(iter(reader)), reader.spec), 0
        else:
            reader = stack.enter_context(open_codes(source))
            model = _load_model(arguments.model, encoder=False)
            pieces, length = _decode_file(model, reader), reader.num_samples
        _check_same_model(source, reader.spec, model, arguments.model)
        start, num_samples = time.perf_counter(), 0
        with _audio_target(output, arguments.format, model, length) as write:
            for audio in pieces:
                write(audio)
                num_samples += audio.shape[1]
        _report(output, reader.spec, num_samples, time.perf_counter() - start)


def run_roundtrip(arguments: argparse.Namespace) -> None:
    from mimi_jax.files.atomic import atomic_path
    from mimi_jax.files.audio import save_audio
    from mimi_jax.files.codes import CodeFile
    from mimi_jax.quality.metrics import si_sdr
    from mimi_jax.quality.picture import draw

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
    spec = _code_spec(model, arguments.num_quantizers)
    warm = audio[:, : config.frame_size] if config.is_streamable else audio  # what runs the same programs
    _decode(model, *_encode(model, warm, spec)[:1], warm.shape[1])
    codes, encode_seconds = _encode(model, audio, spec)
    decoded, decode_seconds = _decode(model, codes, audio.shape[1])
    file = CodeFile(spec, codes, audio.shape[1])
    title = f"{arguments.input.name} through {arguments.model}: {_summary(spec, file.num_samples)}"
    png = draw(audio, decoded, file, title)
    with atomic_path(picture) as temporary:  # around the other, so that there are two new files or none
        temporary.write_bytes(png)
        save_audio(output, decoded, config.sampling_rate)
    _print_table(
        {
            "model": f"{arguments.model} ({spec.model_id})",
            **_code_rows(spec, file.num_samples),
            "SI-SDR": f"{si_sdr(audio, decoded):.1f} dB",
            "encoding": _speed(spec, file.num_samples, encode_seconds),
            "decoding": _speed(spec, file.num_samples, decode_seconds),
        }
    )
    print(f"speeds were measured on {_device()} after a warm-up: compilation is not in them")
    print(f"wrote {output} and {picture}")


def run_info(arguments: argparse.Namespace) -> None:
    from mimi_jax.files.codes import is_code_file, open_codes

    if is_code_file(arguments.name):
        with open_codes(arguments.name) as reader:
            spec, num_samples = reader.spec, reader.num_samples
            collections.deque(reader, maxlen=0)  # which checks every code
        owner = _bundled_with(spec) or "not a bundled one"
        _print_table({**_code_rows(spec, num_samples), "model": f"{spec.model_id} ({owner})"})
        return
    from mimi_jax.checkpoint.store import find, layout_of

    path = find(arguments.name)
    model = _load_model(path, dtype=None)
    config = model.config
    spec = _code_spec(model, None)
    _print_table(
        {
            "model": str(path),
            "identity": spec.model_id,
            "layout": layout_of(path),
            "parameters": f"{_num_parameters(model):,}",
            "audio": f"{config.sampling_rate} Hz, {'mono' if config.audio_channels == 1 else 'stereo'}",
            "frames": f"{spec.frame_rate:g} Hz, of {config.frame_size} samples",
            "codebooks": f"{config.num_quantizers} x {config.codebook_size} codes",
            "bitrate": f"{spec.kbits:.2f} kbit/s",
        }
    )


def run_convert(arguments: argparse.Namespace) -> None:
    from mimi_jax.files.atomic import atomic_path

    source, output = arguments.source, arguments.output
    if Path(source).is_file() and source.endswith(PYTORCH_SUFFIXES):
        raise ValueError(f"{source} is a PyTorch file; convert it with convert/convert_checkpoint.py")
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise UsageError(f"{output} exists; name a new folder")
    _check_folder(output)
    model = _load_model(source, dtype=None)
    from mimi_jax.checkpoint.int8 import dequantize
    from mimi_jax.checkpoint.store import save

    with atomic_path(output) as temporary:
        save(dequantize(model), temporary, arguments.to)
    print(f"wrote {output}: {source} in the layout {arguments.to}")


def run_tokenize(arguments: argparse.Namespace) -> None:
    _check_installed("tokenize", "pyarrow")
    common = ("num_quantizers", "dtype", "clips_per_shard", "max_seconds", "batch_size", "workers", "strict")
    options: dict[str, Any] = {name: getattr(arguments, name) for name in (*common, "retry_errors")}
    if arguments.engine == "ray":
        tokenize, own = _ray_engine(arguments)
    else:
        tokenize, own = _local_engine(arguments)
    try:
        summary = tokenize(arguments.sources, arguments.output, arguments.model, **options, **own)
    except RuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise ValueError("the device has too little memory; lower --batch-size") from error
    now, total = summary.now, summary.total
    hours = now.samples / summary.sampling_rate / 3600
    rows = {
        "this run": f"{now.clips:,} clips, {hours:.2f} h, {now.errors:,} errors",
        "speed": f"{hours * 3600 / summary.seconds:.0f}x realtime, {summary.seconds:.1f} s",
        "programs compiled": "by the actors" if summary.compilations is None else str(summary.compilations),
        "all runs": f"{total.clips:,} clips, {total.errors:,} errors, {total.frames:,} frames",
        "shards": f"{summary.num_done:,} of {summary.num_shards:,} are done",
    }
    _print_table(rows)
    print(f"wrote {arguments.output}")
    if total.errors:
        raise ValueError(f"{total.errors} clips could not be coded; {arguments.output / 'errors'} says why")


def _local_engine(arguments: argparse.Namespace) -> tuple[Callable[..., Any], dict[str, Any]]:
    """A function that tokenizes, and the options that it alone takes."""
    if arguments.ray_address or arguments.ray_actors or arguments.ray_resources:
        raise UsageError("--ray-address, --ray-actors and --ray-resources are of --engine ray")
    from mimi_jax.tokenization import tokenize

    index, count = arguments.process_index, arguments.process_count
    if (index is None) != (count is None):
        raise UsageError("--process-index and --process-count go together")
    if index is None or count is None:
        index, count = _process_of(os.environ)
    if not 0 <= index < count:
        raise UsageError(f"the process index must lie in [0, {count}), got {index}")
    return tokenize, {"process_index": index, "process_count": count}


def _process_of(environment: Mapping[str, str]) -> tuple[int, int]:
    """Which of how many processes this is, as the launchers say that JAX knows too."""
    names = [("SLURM_PROCID", "SLURM_STEP_NUM_TASKS"), ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE")]
    for index, count in names:
        if index in environment and count in environment:
            return int(environment[index]), int(environment[count])
    if "TPU_WORKER_ID" in environment and "TPU_WORKER_HOSTNAMES" in environment:  # GKE's
        return int(environment["TPU_WORKER_ID"]), len(environment["TPU_WORKER_HOSTNAMES"].split(","))
    return 0, 1


def _ray_engine(arguments: argparse.Namespace) -> tuple[Callable[..., Any], dict[str, Any]]:
    _check_installed("ray", "ray")
    if arguments.process_index is not None or arguments.process_count is not None:
        raise UsageError("--process-index and --process-count are of --engine local; Ray shares out the work")
    import jax

    jax.config.update("jax_platforms", "cpu")  # of this process: the accelerators are for the actors
    from mimi_jax.tokenization import tokenize_on_ray

    options = {"address": arguments.ray_address, "actors": arguments.ray_actors}
    return tokenize_on_ray, options | _ray_resources(arguments.ray_resources)


def _ray_resources(words: list[str]) -> dict[str, Any]:
    """num_cpus=8 TPU=4 -> {"num_cpus": 8.0, "resources": {"TPU": 4.0}}."""
    amounts: dict[str, float] = {}
    for word in words:
        name, _, number = word.partition("=")
        try:
            amounts[name] = float(number)
        except ValueError:
            raise UsageError(f"--ray-resources takes NAME=NUMBER, got {word}") from None
    own = {name: amounts.pop(name) for name in ("num_cpus", "num_gpus") if name in amounts}
    return {**own, "resources": amounts or None}


def run_train(arguments: argparse.Namespace) -> None:
    _check_installed("train", "grain", "optax")
    _check_input(arguments.config)
    from mimi_jax.train.recipe import Recipe
    from mimi_jax.train.run import train

    recipe = Recipe.from_toml(arguments.config)
    folder = train(recipe, arguments.data, arguments.out, resume=arguments.resume)
    print(f"wrote {folder}: the running mean of the weights after {recipe.steps} steps")


def run_evaluate(arguments: argparse.Namespace) -> None:
    _check_installed("evaluate", "matplotlib", "pystoi", "visqol")
    from tqdm import tqdm

    from mimi_jax.files.atomic import atomic_path
    from mimi_jax.quality import evaluation
    from mimi_jax.quality.picture import draw_evaluation
    from mimi_jax.train.data import find_clips

    output = arguments.output
    if output is not None:
        _check_output(output, arguments.data)
    clips = find_clips(arguments.data, arguments.include)
    model = _load_model(arguments.model)
    config = model.config
    counts = arguments.num_quantizers
    counts = counts or evaluation.default_counts(config.num_quantizers, config.num_semantic_quantizers)
    for count in counts:
        _check_num_quantizers(model, count)
    bar = tqdm(clips, desc="evaluating", unit="clip", disable=None)
    result = evaluation.evaluate(model, bar, counts)
    print(evaluation.table(result))
    shares = [perplexity / result.codebook_size for perplexity in result.perplexities]
    print(
        f"\n{result.num_clips} clips, {result.seconds:.0f} s; perplexity of the codebooks"
        f" {min(shares):.0%} to {max(shares):.0%} of their {result.codebook_size} codes"
    )
    if output is not None:
        with atomic_path(output.with_suffix(".png")) as picture, atomic_path(output) as file:
            picture.write_bytes(draw_evaluation(result, str(arguments.model)))
            file.write_text(evaluation.to_json(result))
        print(f"wrote {output} and {output.with_suffix('.png')}")


def _check_installed(extra: str, *packages: str) -> None:
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        raise ImportError(f"this needs {' and '.join(missing)}; install: pip install 'mimi_jax[{extra}]'")


@contextlib.contextmanager
def _on_signals(handler: Callable[[int, object], None]) -> Iterator[None]:
    """Handle the signals that ask to stop; those that are ignored, as in the background, stay so."""
    if threading.current_thread() is not threading.main_thread():  # where Python lets nobody do it
        yield
        return
    previous = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    for number, old in previous.items():
        if old not in (signal.SIG_IGN, None):
            signal.signal(number, handler)
    try:
        yield
    finally:
        for number, old in previous.items():
            if old is not None:
                signal.signal(number, old)


def _interrupt(number: int, _) -> None:
    raise Interrupt(number)


def _set_environment() -> None:
    """Defaults for JAX: it is quiet, and keeps what it compiles for the next time."""
    # What is made while starting is kept: looking for garbage in it takes a twentieth of the time.
    gc.set_threshold(100_000)
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


def _output_of(arguments: argparse.Namespace, suffix: str, is_audio: bool = False) -> Path:
    """Where the output goes, once it is sure that input and output can be opened."""
    from mimi_jax.files.codes import is_code_file

    source, output = arguments.input, arguments.output
    if output is None:
        output = PIPE if source == PIPE else source.with_suffix(suffix)
        if not is_audio and output != source and output.is_file() and not is_code_file(output):
            raise UsageError(f"{output} exists and is no code file; name the output with -o")
    if source != PIPE:
        _check_input(source)
    elif os.isatty(STDIN):
        raise UsageError("- stands for a pipe, and nothing is piped in; name a file")
    if output != PIPE:
        _check_output(output, source, is_audio)
    elif os.isatty(STDOUT):
        raise UsageError("the output is binary and would garble the terminal; name a file with -o")
    return output


def _check_format(pcm_format: str | None, path: Path) -> None:
    if pcm_format is not None and path != PIPE:
        raise UsageError(f"--format is of raw audio on a pipe; {path} tells its own")


def _check_input(path: Path) -> None:
    path.open("rb").close()


def _check_output(path: Path, source: Path, is_audio: bool = False) -> None:
    """Fail before the slow work where writing `path` would fail after it, or would lose the input."""
    if path.exists() and source != PIPE and path.samefile(source):
        raise UsageError(f"{path} is the input, which would be lost; name another output with -o")
    if path.exists() and not path.is_file():
        raise OSError(f"cannot write {path}: it is a folder or a device; name a file")
    if is_audio:
        from mimi_jax.files.audio import FORMATS

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
            model.quantizer.resolve_count(num_quantizers)
        except ValueError as error:
            raise UsageError(str(error)) from None


def _check_same_model(path: Path, spec: "CodeSpec", model: "Mimi", name: str) -> None:
    source, count = "the stream" if path == PIPE else path, model.config.num_quantizers
    if spec.num_codebooks > count:
        raise ValueError(
            f"{source} holds codes of {spec.num_codebooks} codebooks, and {name} has {count}; name a model"
            " that has as many with --model"
        )
    expected = _code_spec(model, spec.num_codebooks)
    for field in ("model_id", "sampling_rate", "frame_size", "codebook_size"):
        if (found := getattr(spec, field)) != (value := getattr(expected, field)):
            raise ValueError(
                f"{source} holds codes of another model: its {field} is {found}, that of {name} is {value};"
                " name its model with --model"
            )


def _load_model(name: str | Path, **options) -> "Mimi":
    from mimi_jax.model import Mimi

    return Mimi.from_pretrained(name, **options)


def _load_audio(path: Path, model: "Mimi") -> "np.ndarray":
    from mimi_jax.files.audio import load_audio

    with _no_stderr():
        return load_audio(path, model.config.sampling_rate, model.config.audio_channels)


def _without_stderr(pieces: "Iterable[np.ndarray]") -> "Iterator[np.ndarray]":
    """The same pieces; what C libraries write to stderr while they make them is lost."""
    iterator = iter(pieces)
    while True:
        with _no_stderr():
            piece = next(iterator, None)
        if piece is None:
            return
        yield piece


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


class Stdin:
    """Live input: a signal that asks to stop is its end.

    Whatever comes before in the pipeline has had the same Ctrl-C, and is given a moment to finish. What had
    come in by then is coded and written whole. Only a second signal breaks off.
    """

    def __init__(self, grace: float):
        self.interrupt: Interrupt | None = None
        self._grace, self._end = grace, math.inf

    def read(self, size: int) -> bytes:
        """What has arrived, b"" at the end."""
        while True:
            if self.interrupt is not None:  # counted from the first look at what had come in by then
                self._end = min(self._end, time.monotonic() + self._grace)
            if time.monotonic() > self._end:
                return b""
            if select.select([STDIN], [], [], 0.1)[0]:
                return os.read(STDIN, size)

    def stop(self, number: int, _) -> None:
        if self.interrupt is not None:
            raise Interrupt(number)
        self.interrupt = Interrupt(number, "interrupted; what had come in by then is whole")

    def cut(self, codes: "Pieces") -> "Pieces":
        """The same, but that a stream which a signal has ended may end anywhere."""
        try:
            yield from codes
        except ValueError:
            if self.interrupt is None:
                raise


@contextlib.contextmanager
def _stdin(grace: float) -> Iterator[Stdin]:
    stdin = Stdin(grace)
    try:
        with _on_signals(stdin.stop):
            yield stdin
    except ValueError:
        if stdin.interrupt is None:
            raise
        raise Interrupt(stdin.interrupt.status - 128) from None  # before there was anything to keep
    if stdin.interrupt is not None:
        raise stdin.interrupt


def _write_stdout(data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        with contextlib.suppress(BlockingIOError):  # some programs hand over pipes that do not wait
            select.select([], [STDOUT], [])
            rest = rest[os.write(STDOUT, rest) :]


def _encode_pipe(encoder: "StreamingEncoder", stdin: Stdin, pcm_format: str | None) -> "Pieces":
    from mimi_jax.streams.push import STEP_FRAMES
    from mimi_jax.streams.wire import read_pcm

    channels, frame_size = encoder.config.audio_channels, encoder.config.frame_size
    encoder.warmup()  # the header is out by now, so that the decoder warms up at the same time
    num_samples = 0
    for audio in read_pcm(stdin.read, pcm_format or PCM_FORMATS[0], channels, STEP_FRAMES[0] * frame_size):
        num_samples += audio.shape[1]
        if (codes := encoder.push(audio[None])) is not None:
            yield codes[0], codes.shape[2] * frame_size
    if (codes := encoder.flush()) is not None:
        yield codes[0], num_samples % frame_size


def _encode_file(model: "Mimi", path: Path, num_quantizers: int) -> "Pieces":
    from mimi_jax.files.audio import AudioReader
    from mimi_jax.streams.chunks import encode_blocks

    config = model.config
    with path.open("rb") as file:
        with _no_stderr():
            reader = AudioReader(file, str(path), config.sampling_rate, config.audio_channels)
        with _progress("encoding", reader.num_samples, config.sampling_rate) as update:
            for codes, num_samples in encode_blocks(model, _without_stderr(reader), num_quantizers):
                update(num_samples)
                yield codes, num_samples


def _decode_pipe(decoder: "StreamingDecoder", pieces: "Pieces", spec: "CodeSpec") -> "Iterator[np.ndarray]":
    decoder.warmup(spec.num_codebooks)
    for codes, num_samples in pieces:
        audio = decoder.push(codes)
        assert audio is not None
        yield audio[0, :, :num_samples]


def _decode_file(model: "Mimi", reader: "CodeReader") -> "Iterator[np.ndarray]":
    from mimi_jax.streams.chunks import decode_blocks

    left = reader.num_samples
    with _progress("decoding", left, reader.spec.sampling_rate) as update:
        for audio in decode_blocks(model, (codes for codes, _ in reader)):
            yield audio[:, :left]
            update(min(left, audio.shape[1]))
            left -= audio.shape[1]


@contextlib.contextmanager
def _code_target(path: Path, spec: "CodeSpec") -> "Iterator[Callable[[np.ndarray, int], None]]":
    """Yield the function that writes the next codes, and the samples they are of, to a file or a pipe."""
    from mimi_jax.files.codes import code_writer
    from mimi_jax.streams.wire import CodeStreamWriter

    if path == PIPE:
        writer = CodeStreamWriter(_write_stdout, spec)
        yield writer.write
        writer.close()
    else:
        with code_writer(path, spec) as writer:
            yield writer.write


@contextlib.contextmanager
def _audio_target(
    path: Path, pcm_format: str | None, model: "Mimi", num_samples: int
) -> "Iterator[Callable[[np.ndarray], None]]":
    """Yield the function that writes the next audio to a file or a pipe."""
    from mimi_jax.files.audio import audio_writer
    from mimi_jax.streams.wire import to_pcm

    if path == PIPE:
        yield lambda audio: _write_stdout(to_pcm(audio, pcm_format or PCM_FORMATS[0]))
    else:
        config = model.config
        with audio_writer(path, config.sampling_rate, config.audio_channels, num_samples) as write:
            yield write


@contextlib.contextmanager
def _progress(title: str, num_samples: int | None, sampling_rate: int) -> Iterator[Callable[[int], object]]:
    """A bar in seconds of audio, on a terminal and for work of more than a second; None for no known end."""
    from tqdm import tqdm

    layout, total = "{desc}: {n:.0f} s [{elapsed}]", None
    if num_samples is not None:
        layout, total = (
            "{l_bar}{bar}| {n:.0f} of {total:.0f} s [{elapsed}<{remaining}]",
            num_samples / sampling_rate,
        )
    with tqdm(desc=title, total=total, delay=1, leave=False, disable=None, bar_format=layout) as bar:
        yield lambda count: bar.update(count / sampling_rate)


def _encode(model: "Mimi", audio: "np.ndarray", spec: "CodeSpec") -> "tuple[np.ndarray, float]":
    """Codes [codebooks, frames], and the seconds it took."""
    import numpy as np

    from mimi_jax.streams.chunks import encode_blocks

    with _progress("encoding", audio.shape[1], spec.sampling_rate) as update:
        start, blocks = time.perf_counter(), []
        for codes, num_samples in encode_blocks(model, [audio], spec.num_codebooks):
            blocks.append(codes)
            update(num_samples)
        return np.concatenate(blocks, axis=1), time.perf_counter() - start


def _decode(model: "Mimi", codes: "np.ndarray", num_samples: int) -> "tuple[np.ndarray, float]":
    """Audio [channels, samples], and the seconds it took."""
    import numpy as np

    from mimi_jax.streams.chunks import decode_blocks

    with _progress("decoding", num_samples, model.config.sampling_rate) as update:
        start, blocks = time.perf_counter(), []
        for audio in decode_blocks(model, [codes]):
            blocks.append(audio)
            update(audio.shape[1])
        return np.concatenate(blocks, axis=1)[:, :num_samples], time.perf_counter() - start


def _code_spec(model: "Mimi", num_quantizers: int | None) -> "CodeSpec":
    from mimi_jax.checkpoint.store import model_id
    from mimi_jax.files.codes import CodeSpec

    config = model.config
    return CodeSpec(
        model_id=model_id(model, num_quantizers),
        sampling_rate=config.sampling_rate,
        frame_size=config.frame_size,
        codebook_size=config.codebook_size,
        num_codebooks=config.num_quantizers if num_quantizers is None else num_quantizers,
    )


def _bundled_with(spec: "CodeSpec") -> str | None:
    """The bundled model that made such codes."""
    from mimi_jax.checkpoint.store import bundled_models

    for name in bundled_models():
        model, count = _load_model(name), spec.num_codebooks
        if count <= model.config.num_quantizers and spec == _code_spec(model, count):
            return name
    return None


def _num_parameters(model: "Mimi") -> int:
    """How many numbers a checkpoint of the model holds."""
    import jax
    from flax import nnx

    from mimi_jax.nn.quantizer import Codebook

    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Not(nnx.OfType(Codebook)))))


def _device() -> str:
    import jax

    return jax.devices()[0].device_kind


def _code_rows(spec: "CodeSpec", num_samples: int) -> dict[str, str]:
    return {
        "duration": f"{num_samples / spec.sampling_rate:.2f} s, {num_samples} samples",
        "frames": f"{spec.num_frames(num_samples)}, {spec.frame_rate:g} Hz",
        "codebooks": f"{spec.num_codebooks} x {spec.codebook_size} codes",
        "bitrate": f"{spec.kbits:.2f} kbit/s",
    }


def _summary(spec: "CodeSpec", num_samples: int) -> str:
    return f"{spec.num_frames(num_samples)} frames x {spec.num_codebooks} codebooks, {spec.kbits:.2f} kbit/s"


def _speed(spec: "CodeSpec", num_samples: int, seconds: float) -> str:
    return f"{num_samples / spec.sampling_rate / seconds:.3g} x realtime"


def _report(output: Path, spec: "CodeSpec", num_samples: int, seconds: float) -> None:
    if output != PIPE:
        speed = _speed(spec, num_samples, seconds)
        print(f"wrote {output}: {_summary(spec, num_samples)}; {speed} (start-up included)")


def _print_table(rows: dict[str, str]) -> None:
    width = max(map(len, rows)) + 2
    for name, value in rows.items():
        print(f"{name:<{width}}{value}")
