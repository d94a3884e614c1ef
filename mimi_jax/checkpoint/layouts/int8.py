"""The layout "int8": `model.safetensors` with this package's own names, for models with int8 weights.

A kernel is stored as its int8 values under its name, such as "encoder.first.kernel", and its scales under
"encoder.first.kernel_scale"; other parameters are stored under their names. The config.json says which
kernels are int8: `"quantization_config": {"weights": "int8"}`, or another name in `WEIGHTS`.
"""

from pathlib import Path
from typing import Any

import jax
from jax.typing import DTypeLike

from mimi_jax.checkpoint.int8 import WEIGHTS, Int8, Int8Param, abstract_int8, weights_of
from mimi_jax.checkpoint.layouts.files import WEIGHTS_FILE, ModelFiles, check_fits
from mimi_jax.checkpoint.parameters import abstract_model, fill, parameters
from mimi_jax.files.arrays import differences, write_safetensors
from mimi_jax.model import Mimi

FIELD = "quantization_config"  # the field of config.json where transformers, too, says how weights are stored
SCALE = "_scale"


def recognizes(files: ModelFiles) -> bool:
    if files.fields.get(FIELD) is not None:
        return True
    return not files.orbax_folder.is_dir() and any(name.endswith(f".kernel{SCALE}") for name in files.tensors)


def stored_weights(files: ModelFiles) -> str:
    """Which weights of a model in this layout are int8: a name in `WEIGHTS`.

    Raises:
        ValueError: its config.json does not say it, or names something else.
    """
    mark = files.fields.get(FIELD)
    if mark is None:
        raise ValueError(
            f"{files.weights_path} holds int8 weights; put the config.json that was saved with it beside it"
        )
    weights = mark.get("weights") if isinstance(mark, dict) else None
    if weights not in tuple(WEIGHTS):
        raise ValueError(
            f'{files.config_path}: {FIELD} must be {{"weights": NAME}}, where NAME is one of'
            f" {', '.join(WEIGHTS)}, got {mark!r}"
        )
    return weights


def config_fields(model: Mimi) -> dict[str, Any]:
    """What config.json says of a model with int8 weights; nothing for other models."""
    # It has no "quant_method": then transformers refuses the model. A method that it does not know it would
    # ignore, and load wrong weights.
    weights = weights_of(model)
    return {} if weights is None else {FIELD: {"weights": weights}}


def read(
    files: ModelFiles, model: Mimi, dtype: DTypeLike | None, sharding: jax.sharding.Sharding | None
) -> Mimi:
    weights = stored_weights(files)
    model = abstract_int8(model, weights)
    expected = _tensors(model)
    both_halves = _tensors(abstract_int8(abstract_model(model.config), weights))
    wanted = [name for name in files.tensors if name in expected or name not in both_halves]
    found = {name: files.tensors[name] for name in wanted}
    check_fits(differences(found, expected, any_float=True), files.weights_path)
    arrays = {
        name: Int8(found[name], found[name + SCALE]) if isinstance(p, Int8Param) else found[name]
        for name, p in parameters(model).items()
    }
    return fill(model, arrays, dtype, sharding)


def write(model: Mimi, folder: Path) -> None:
    if weights_of(model) is None:
        raise ValueError(
            'the layout "int8" holds int8 weights, and this model has none; make them with'
            " mimi_jax.checkpoint.int8.to_int8(model)"
        )
    folder.mkdir(parents=True, exist_ok=True)
    write_safetensors(folder / WEIGHTS_FILE, _tensors(model), {"format": "mimi_jax"})


def _tensors(model: Mimi) -> dict[str, Any]:
    """What the file holds of a model, by name; shapes for an abstract model."""
    tensors: dict[str, Any] = {}
    for name, parameter in parameters(model).items():
        value = parameter.get_raw_value()
        if isinstance(value, Int8):
            tensors[name], tensors[name + SCALE] = value
        else:
            tensors[name] = value
    return tensors
