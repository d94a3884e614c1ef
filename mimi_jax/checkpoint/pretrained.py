"""Load a model from any layout, and save it as a folder: a `config.json` and its weights in one layout."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from mimi_jax.checkpoint.find import ORBAX_FOLDER, find
from mimi_jax.checkpoint.int8 import check_weights, halves_of, to_int8, weights_of
from mimi_jax.checkpoint.layouts import LAYOUTS, recognize
from mimi_jax.checkpoint.layouts.files import ModelFiles
from mimi_jax.checkpoint.layouts.flax import check_is_ours
from mimi_jax.checkpoint.layouts.int8 import config_fields, stored_weights
from mimi_jax.checkpoint.parameters import abstract_model, check_kept, keep_codebooks
from mimi_jax.config import MimiConfig
from mimi_jax.files.arrays import ORBAX_MARK
from mimi_jax.files.atomic import atomic_path
from mimi_jax.model import HALVES, Mimi


@jax.transfer_guard("allow")  # from the file to the devices, or back
def load(
    name: str | Path,
    *,
    dtype: DTypeLike | None = jnp.float32,
    encoder: bool = True,
    decoder: bool = True,
    num_quantizers: int | None = None,
    weights: str | None = None,
    sharding: jax.sharding.Sharding | None = None,
    **options: Any,
) -> Mimi:
    """As `Mimi.from_pretrained`, which documents the arguments; the options go to `Mimi`."""
    files = ModelFiles(find(name))
    config, halves = _read_config(files, encoder, decoder)
    if num_quantizers is not None:
        check_kept(config, num_quantizers)  # before the slow work
    model = abstract_model(config, **halves, **options)
    if weights is None:
        model = LAYOUTS[recognize(files)].read(files, model, dtype, sharding)
    else:
        model = _read_int8(files, model, weights, dtype, sharding)
    return model if num_quantizers is None else keep_codebooks(model, num_quantizers)


def _read_int8(
    files: ModelFiles,
    model: Mimi,
    weights: str,
    dtype: DTypeLike | None,
    sharding: jax.sharding.Sharding | None,
) -> Mimi:
    """Fill an abstract model, and make the weights that `weights` names int8, unless they are already."""
    check_weights(model, weights)
    layout = recognize(files)
    if layout == "int8" and halves_of(model, stored := stored_weights(files)) != halves_of(model, weights):
        raise ValueError(
            f"{files.path}: saved with weights={stored!r}, and {weights!r} was asked for; leave"
            " it out, or make int8 weights of the model that this one was made of"
        )
    # Made of float32 kernels; those of a smaller dtype would be rounded twice.
    first_dtype = None if dtype is None else jnp.float32
    model = to_int8(LAYOUTS[layout].read(files, model, first_dtype, sharding), weights)
    return model if dtype is None else model.astype(dtype)


def _read_config(files: ModelFiles, encoder: bool, decoder: bool) -> tuple[MimiConfig, dict[str, bool]]:
    """The configuration of a stored model (the published one for a lone file), and which halves to load."""
    file = files.config_path
    if not files.has_config:
        if files.path.is_dir():
            raise FileNotFoundError(f"{files.path}: a model folder holds a config.json, found none")
        return MimiConfig(), {"encoder": encoder, "decoder": decoder}
    config = MimiConfig.from_json(file)
    # Here and in `transformers`, null marks a half that was dropped before saving.
    stored = {half: files.fields.get(f"{half}_config", "") is not None for half in HALVES}
    halves = {"encoder": encoder and stored["encoder"], "decoder": decoder and stored["decoder"]}
    if (encoder or decoder) and not any(halves.values()):
        missing = "encoder" if encoder else "decoder"
        raise ValueError(f"{files.path}: this model was saved without its {missing}, which was asked for")
    return config, halves


@jax.transfer_guard("allow")  # from the file to the devices, or back
def save(model: Mimi, folder: str | Path, layout: str | None = None) -> None:
    """Write a model folder, from which `load` makes the same model, bit for bit.

    Args:
        layout: a name in `LAYOUTS`: "transformers" or "kyutai" for a `model.safetensors` that they can read
            too, "flax" for an Orbax folder, "int8" for int8 weights. None for "int8" where the model has
            int8 weights, otherwise for "transformers".

    Raises:
        ValueError: there is no such layout, it cannot hold the model, or the folder has a folder `params` of
            something else.
    """
    weights = weights_of(model)
    if layout is None:
        layout = "transformers" if weights is None else "int8"
    if layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}, got {layout!r}")
    if weights is not None and layout != "int8":
        raise ValueError(
            f"int8 weights cannot be stored in the layout {layout!r}, only in the layout 'int8'; save"
            " mimi_jax.checkpoint.int8.to_float(model) instead"
        )
    folder = Path(os.path.expanduser(folder))
    check_is_ours(folder, replaces=layout == "flax")
    LAYOUTS[layout].write(model, folder)
    if layout != "flax" and (folder / ORBAX_FOLDER / ORBAX_MARK).exists():
        shutil.rmtree(folder / ORBAX_FOLDER)  # of a model that was here before; `load` would prefer it
    absent = {f"{half}_config": None for half in HALVES if getattr(model, half) is None}
    fields = model.config.to_dict() | absent | config_fields(model)
    with atomic_path(folder / "config.json") as file:
        file.write_text(json.dumps(fields, indent=2) + "\n")
