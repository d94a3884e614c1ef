"""`mimi-jax info` and `mimi-jax convert`."""

import argparse
import collections
from pathlib import Path

from mimi_jax.cli.checks import UsageError, check_folder, check_is_no_pipe, other_kind
from mimi_jax.cli.terminal import code_rows, print_table


def run_info(arguments: argparse.Namespace) -> None:
    from mimi_jax.checkpoint.find import PYTORCH_SUFFIXES
    from mimi_jax.files.codes import is_code_file

    name, path = arguments.name, Path(arguments.name)
    check_is_no_pipe(path)
    if is_code_file(name):
        _describe_codes(name)
    elif path.is_file() and not name.endswith(PYTORCH_SUFFIXES) and (kind := other_kind(path)):
        raise ValueError(f"{name} is neither a code file nor a model, but {kind}")
    else:
        _describe_model(name)


def _describe_codes(path: str) -> None:
    from mimi_jax.checkpoint import bundled_with
    from mimi_jax.files.codes import open_codes

    with open_codes(path) as reader:
        spec, num_samples = reader.spec, reader.num_samples
        collections.deque(reader, maxlen=0)  # reading checks every code
    owner = bundled_with(spec) or "not a bundled model"
    print_table({**code_rows(spec, num_samples), "model": f"{spec.model_id} ({owner})"})


def _describe_model(name: str) -> None:
    from mimi_jax.checkpoint import code_spec, find, layout_of, num_parameters
    from mimi_jax.model import Mimi

    path = find(name)
    model = Mimi.from_pretrained(path, dtype=None)
    spec = code_spec(model)
    print_table(
        {
            "model": str(path),
            "identity": spec.model_id,
            "layout": layout_of(path),
            "parameters": f"{num_parameters(model):,}",
            "audio": f"{spec.sampling_rate} Hz, {'mono' if model.config.audio_channels == 1 else 'stereo'}",
            "frames": f"{spec.frame_rate:g} Hz, of {spec.frame_size} samples",
            "codebooks": f"{spec.num_codebooks} x {spec.codebook_size} codes",
            "bitrate": f"{spec.kbits:.2f} kbit/s",
        }
    )


def run_convert(arguments: argparse.Namespace) -> None:
    source, output = arguments.source, arguments.output
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise UsageError(f"{output} exists; name a new folder")
    check_folder(output)
    from mimi_jax.checkpoint import save
    from mimi_jax.checkpoint.int8 import to_float
    from mimi_jax.files.atomic import atomic_path
    from mimi_jax.model import Mimi

    model = Mimi.from_pretrained(source, dtype=None)
    with atomic_path(output) as temporary:
        save(to_float(model), temporary, arguments.to)
    print(f"wrote {output}: {source} in the layout {arguments.to}")
