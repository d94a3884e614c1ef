"""The arguments of all commands."""

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from mimi_jax.cli.coding import run_decode, run_encode
from mimi_jax.cli.corpora import run_evaluate, run_pack, run_tokenize, run_train
from mimi_jax.cli.models import run_convert, run_info
from mimi_jax.cli.pipes import PCM_FORMATS
from mimi_jax.cli.roundtrip import run_roundtrip
from mimi_jax.cli.serving import run_serve

MODEL_HELP = "a bundled model (mini), a folder, a .safetensors file or a Hugging Face repository"
AUDIO_HELP = "audio file (WAV, FLAC, OGG, MP3 and others), of any sampling rate"
DATA_HELP = "a folder of audio, a JSONL manifest, or one audio file; or a URL (needs mimi_jax[remote])"
# Repeated here, since the modules that own them are slow to import.
LAYOUTS = ("flax", "transformers", "kyutai")  # those of mimi_jax.checkpoint that hold float weights
DTYPES = ("float32", "bfloat16")  # those of mimi_jax.tokenization.settings
ROW_FORMATS = ("parquet", "arrayrecord")  # those of mimi_jax.tokenization.packed

# Adds a command: takes its name, the function that runs it, and its help.
AddCommand = Callable[[str, Callable[[argparse.Namespace], None], str], argparse.ArgumentParser]


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Print the error in one line; argparse itself prints the usage too."""
        self.exit(2, f"{self.prog}: error: {message}; see {self.prog} --help\n")


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="mimi-jax", description="Mimi, a neural codec of speech: audio to codes and back.")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def command(name: str, run: Callable[[argparse.Namespace], None], text: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
        added.set_defaults(run=run)
        return added

    _add_encode(command)
    _add_decode(command)
    _add_roundtrip(command)
    _add_info(command)
    _add_convert(command)
    _add_tokenize(command)
    _add_pack(command)
    _add_train(command)
    _add_evaluate(command)
    _add_serve(command)
    return parser


def _path(text: str) -> Path:
    if not text:
        raise argparse.ArgumentTypeError("a path must not be empty")
    if "://" in text:
        raise argparse.ArgumentTypeError(f"it must be a local path, got {text}")
    return Path(os.path.expanduser(text))  # the shell leaves ~ alone in --output=~/codes.safetensors


def _path_or_url(text: str) -> Path | str:
    return text if "://" in text else _path(text)


def _integer(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a whole number, got {text!r}") from None


def _positive(text: str) -> int:
    if (number := _integer(text)) < 1:
        raise argparse.ArgumentTypeError(f"must be positive, got {text}")
    return number


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", type=os.path.expanduser, default="mini", help=f"{MODEL_HELP} (default: %(default)s)"
    )


def _add_num_quantizers(parser: argparse.ArgumentParser) -> None:
    text = "use the first N codebooks (default: all)"
    parser.add_argument("--num-quantizers", type=_integer, metavar="N", help=text)


def _add_format(parser: argparse.ArgumentParser) -> None:
    text = "format of raw audio on a pipe, which has no header and the model's sampling rate (default: s16le)"
    parser.add_argument("--format", choices=PCM_FORMATS, help=text)


def _add_encode(command: AddCommand) -> None:
    parser = command("encode", run_encode, "encode audio into a code file")
    parser.add_argument("input", metavar="IN", type=_path, help=f"{AUDIO_HELP}; - for raw audio from a pipe")
    text = (
        "code file, or - for a code stream to a pipe (default: a new file beside IN, with the suffix"
        " .safetensors; - if IN is -)"
    )
    parser.add_argument("-o", "--output", metavar="OUT.safetensors", type=_path, help=text)
    _add_model(parser)
    _add_num_quantizers(parser)
    _add_format(parser)


def _add_decode(command: AddCommand) -> None:
    parser = command("decode", run_decode, "decode a code file into audio")
    text = "code file that encode wrote; - for a code stream from a pipe"
    parser.add_argument("input", metavar="IN.safetensors", type=_path, help=text)
    text = (
        "WAV, FLAC, OGG, Opus or MP3 file, or - for raw audio to a pipe (default: a new file beside IN, with"
        " the suffix .decoded.wav; - if IN is -)"
    )
    parser.add_argument("-o", "--output", metavar="OUT.wav", type=_path, help=text)
    _add_model(parser)
    _add_format(parser)


def _add_roundtrip(command: AddCommand) -> None:
    text = (
        "encode and decode a clip, print its quality and the speed, and draw a picture (needs mimi_jax[plot])"
    )
    parser = command("roundtrip", run_roundtrip, text)
    parser.add_argument("input", metavar="IN", type=_path, help=AUDIO_HELP)
    text = "decoded audio; the picture is written beside it, with the suffix .png"
    parser.add_argument("-o", "--output", metavar="OUT.wav", type=_path, required=True, help=text)
    _add_model(parser)
    _add_num_quantizers(parser)


def _add_info(command: AddCommand) -> None:
    parser = command("info", run_info, "describe a model or a code file")
    parser.add_argument(
        "name", metavar="MODEL_OR_CODES", type=os.path.expanduser, help=f"a code file, or {MODEL_HELP}"
    )


def _add_convert(command: AddCommand) -> None:
    text = "write a model in another layout, bit for bit (int8 weights become floats)"
    parser = command("convert", run_convert, text)
    parser.add_argument("source", metavar="SRC", type=os.path.expanduser, help=MODEL_HELP)
    parser.add_argument("output", metavar="DST", type=_path, help="folder to make")
    parser.add_argument("--to", choices=LAYOUTS, required=True, help="layout; flax is an Orbax folder")


def _add_tokenize(command: AddCommand) -> None:
    text = "encode a corpus into Parquet files of codes; run again to continue (needs mimi_jax[tokenize])"
    parser = command("tokenize", run_tokenize, text)
    add = parser.add_argument
    text = (
        "folders, patterns, audio files, .tar shards, .parquet files, .jsonl or .json manifests; each may be"
        " a URL (s3://, gs://, hf://datasets/; needs mimi_jax[remote])"
    )
    add("sources", metavar="SRC", nargs="+", help=text)
    text = "folder or URL to make, or to continue in"
    add("-o", "--output", metavar="DIR", type=_path_or_url, required=True, help=text)
    _add_model(parser)
    text = "keep the first N codebooks (default: all)"
    add("--num-quantizers", type=_positive, metavar="N", help=text)
    text = "of weights and activations; bfloat16 is faster and changes some codes (default: %(default)s)"
    add("--dtype", choices=DTYPES, default="float32", help=text)
    text = "how many audio files make one shard (default: %(default)s)"
    add("--clips-per-shard", type=_positive, metavar="N", default=1000, help=text)
    text = "a longer clip counts as an error (default: a day)"
    add("--max-seconds", type=float, metavar="S", default=86_400.0, help=text)
    text = "column of Parquet files that has the audio: bytes, paths, or {bytes, path} (default: %(default)s)"
    add("--audio-column", metavar="NAME", default="audio", help=text)
    text = "clips at once, fewer if they are long (default: 8 per device on CPUs, else 64)"
    add("--batch-size", type=_positive, metavar="N", help=text)
    text = "processes that read audio (default: one less than the number of CPUs, at most 16)"
    add("--workers", type=_integer, metavar="N", help=text)
    add("--strict", action="store_true", help="stop at the first clip that cannot be encoded")
    text = "encode all shards that have errors again; those with lost connections always are"
    add("--retry-errors", action="store_true", help=text)
    text = (
        "share the work with the processes that JAX finds: on the hosts of a TPU slice, or as SLURM, MPI or"
        " Kubernetes say; if one is lost, the others continue, and the same command starts it again"
    )
    add("--distributed", action="store_true", help=text)
    text = "index of this process, from 0, where several share the work (default: as SLURM, MPI or GKE say)"
    add("--process-index", type=_integer, metavar="I", help=text)
    text = "number of processes that share the work (default: as SLURM, MPI or GKE say, else 1)"
    add("--process-count", type=_positive, metavar="N", help=text)
    text = "local: all devices of this process; ray: a Ray cluster (needs mimi_jax[ray])"
    add("--engine", choices=("local", "ray"), default="local", help=text)
    text = "address of a Ray cluster, such as auto (default: start one on this machine)"
    add("--ray-address", metavar="ADDRESS", help=text)
    text = "number of Ray actors, each with its own model (default: as many as the cluster has room for)"
    add("--ray-actors", type=_positive, metavar="N", help=text)
    text = "what each actor takes, such as num_cpus=8 num_gpus=1 or TPU=4 (default: num_cpus=1)"
    add("--ray-resources", metavar="NAME=N", nargs="+", default=[], help=text)


def _add_pack(command: AddCommand) -> None:
    text = "pack tokenized clips into rows of equal length, for training (needs mimi_jax[tokenize])"
    parser = command("pack", run_pack, text)
    parser.add_argument(
        "tokens", metavar="TOKENS", type=_path_or_url, help="folder that tokenize has finished"
    )
    parser.add_argument("-o", "--output", metavar="DIR", type=_path, required=True, help="folder to make")
    text = "of a row, in frames (12.5 a second); only longer clips are cut"
    parser.add_argument("--length", type=_positive, metavar="N", required=True, help=text)
    text = "make a folder for each source; a .tar or .parquet file is one"
    parser.add_argument("--split-by-source", action="store_true", help=text)
    text = "arrayrecord is for Grain, and needs mimi_jax[arrayrecord] (default: %(default)s)"
    parser.add_argument("--format", choices=ROW_FORMATS, default="parquet", help=text)


def _add_train(command: AddCommand) -> None:
    parser = command("train", run_train, "train or fine-tune a model (needs mimi_jax[train])")
    text = "recipe in a TOML file, such as those in configs/"
    parser.add_argument("config", metavar="CONFIG", type=_path, help=text)
    parser.add_argument("--data", metavar="DATA", type=_path_or_url, required=True, help=DATA_HELP)
    text = "folder for the checkpoints, the log and the model"
    parser.add_argument("--out", metavar="DIR", type=_path, required=True, help=text)
    text = "continue from the newest checkpoint in DIR, with the same numbers as without the interruption"
    parser.add_argument("--resume", action="store_true", help=text)


def _add_evaluate(command: AddCommand) -> None:
    text = "measure the quality of a model on your own audio (needs mimi_jax[evaluate])"
    parser = command("evaluate", run_evaluate, text)
    parser.add_argument("model", metavar="MODEL", type=os.path.expanduser, help=MODEL_HELP)
    parser.add_argument("data", metavar="DATA", type=_path_or_url, help=DATA_HELP)
    text = (
        "numbers of codebooks to compare (default: the smallest number, powers of two, half of all, and all)"
    )
    parser.add_argument("--num-quantizers", type=_integer, nargs="+", metavar="N", help=text)
    text = "use only paths that match, such as 'valid/*'"
    parser.add_argument("--include", metavar="PATTERN", default="*", help=text)
    text = "leave out ViSQOL, which takes longer than the other measures"
    parser.add_argument("--no-visqol", action="store_true", help=text)
    text = "processes that compare clips (default: one less than the number of CPUs, at most 16)"
    parser.add_argument("--workers", type=_positive, metavar="N", help=text)
    text = "file for all numbers; a picture of them is written beside it, with the suffix .png"
    parser.add_argument("-o", "--output", metavar="OUT.json", type=_path, help=text)


def _add_serve(command: AddCommand) -> None:
    text = "serve live streams over WebSockets, and a page to hear them (needs mimi_jax[serve])"
    parser = command("serve", run_serve, text)
    parser.add_argument(
        "model", metavar="MODEL", nargs="?", type=os.path.expanduser, default="mini", help=MODEL_HELP
    )
    text = "address to listen on, such as 0.0.0.0; then set a token too (default: %(default)s)"
    parser.add_argument("--host", default="127.0.0.1", help=text)
    parser.add_argument(
        "--port", type=_integer, default=8000, help="0 for any free one (default: %(default)s)"
    )
    text = "the most streams of each direction at a time, a power of two (default: %(default)s)"
    parser.add_argument("--rows", type=_positive, default=64, help=text)
    text = "the most codebooks that a stream may use (default: all of the model)"
    parser.add_argument("--num-quantizers", type=_integer, metavar="N", help=text)
    text = "file with a token that clients must give (default: the variable MIMI_JAX_TOKEN, or none)"
    parser.add_argument("--token-file", type=_path, metavar="FILE", help=text)
    text = "file with a key that signs streams which move to another server; without it none can move"
    parser.add_argument("--key-file", type=_path, metavar="FILE", help=text)
    text = "a name of this server that clients may use, beside localhost"
    parser.add_argument("--allow-host", action="append", default=[], metavar="NAME", help=text)
    text = "pages elsewhere that may connect, such as https://example.org"
    parser.add_argument("--allow-origin", action="append", default=[], metavar="ORIGIN", help=text)
    text = "end a stream after so long without a message (default: %(default)s)"
    parser.add_argument("--idle-seconds", type=float, default=60.0, metavar="S", help=text)
    text = "end a stream after so long in any case (default: %(default)s)"
    parser.add_argument("--total-seconds", type=float, default=3600.0, metavar="S", help=text)
