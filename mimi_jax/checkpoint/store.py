"""Load and save models, strictly and bit for bit.

A model is a folder with a `config.json` and its parameters in one of three layouts: `model.safetensors`
as `transformers` or as Kyutai names them, or an Orbax folder `params/` with this model's own arrays,
which restores sharded. A model with int8 weights has a layout of its own: `model.safetensors` with this
model's own arrays, such as `encoder.first.kernel` (int8) and `encoder.first.kernel_scale`, and
`"quantization_config": {"weights": "int8"}` in `config.json`.
"""

import dataclasses
import hashlib
import json
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from flax import nnx
from jax.typing import DTypeLike

from mimi_jax.checkpoint.int8 import (
    Int8,
    Int8Param,
    check_name,
    check_quantization,
    present_halves,
    quantization_of,
    quantize,
    quantize_abstract,
)
from mimi_jax.checkpoint.names import (
    Arrays,
    Place,
    Weight,
    canonical_name,
    fold_weight_norm,
    to_arrays,
    to_tensors,
    weight_table,
)
from mimi_jax.config import MimiConfig
from mimi_jax.files.atomic import atomic_path
from mimi_jax.model import Mimi
from mimi_jax.nn.quantizer import Codebook, CodebookStatistic

BUNDLED = Path(__file__).parents[1] / "models"
LAYOUTS = ("flax", "transformers", "kyutai")

LazyTensors = Mapping[str, Callable[[], np.ndarray]]


def bundled_models() -> list[str]:
    """The names of the models that come with this package."""
    return sorted(file.parent.name for file in BUNDLED.glob("*/config.json"))


def load(
    name: str | Path,
    *,
    dtype: DTypeLike | None = jnp.float32,
    precision: str = "highest",
    attention: str | None = None,
    encoder: bool = True,
    decoder: bool = True,
    num_quantizers: int | None = None,
    quantization: str | None = None,
    sharding: jax.sharding.Sharding | None = None,
) -> Mimi:
    """`Mimi.from_pretrained`, which documents the arguments."""
    path = find(name)
    config, halves, stored = _read_config(path, encoder, decoder)
    if num_quantizers is not None:
        _check_kept(config, num_quantizers)  # before the slow work
    model = abstract_model(config, precision=precision, attention=attention, **halves)
    model = _read(path, model, stored, dtype, quantization, sharding)
    return model if num_quantizers is None else keep_codebooks(model, num_quantizers)


def _read(
    path: Path,
    model: Mimi,
    stored: str | None,
    dtype: DTypeLike | None,
    quantization: str | None,
    sharding: jax.sharding.Sharding | None,
) -> Mimi:
    """Fill an abstract model with what is stored, whose quantization is `stored`."""
    if quantization is not None:
        check_quantization(model, quantization)
    file = path / "model.safetensors" if path.is_dir() else path
    if stored is not None:
        if quantization and present_halves(model, quantization) != present_halves(model, stored):
            raise ValueError(
                f"{path}: this model was saved with quantization={stored!r}, and {quantization!r} was asked"
                " for; leave it out, or quantize the model it was made of"
            )
        model = quantize_abstract(model, stored)
        arrays = _read_int8(_open_safetensors(file), model, stored, source=str(file))
        return fill(model, arrays, dtype, sharding)
    if (path / "params").is_dir():
        arrays = _restore(path / "params", model, sharding)
    else:
        arrays = read_tensors(_open_safetensors(file), model, source=str(file))
    if quantization is None:
        return fill(model, arrays, dtype, sharding)
    full = None if dtype is None else jnp.float32  # or the kernels would be rounded twice
    model = quantize(fill(model, arrays, full, sharding), quantization)
    return model if dtype is None else model.astype(dtype)


def find(name: str | Path) -> Path:
    """Where a model is: a bundled one, a folder or file here, or the Hugging Face Hub's copy of one.

    Raises:
        FileNotFoundError: nothing of that name is found, or the Hub cannot be reached.
    """
    if str(name) in bundled_models():
        return BUNDLED / name
    path = Path(name)
    if path.exists():
        if path.is_dir() and not ((path / "params").is_dir() or (path / "model.safetensors").is_file()):
            raise FileNotFoundError(
                f"{path}: a model folder holds model.safetensors or params/, found neither"
            )
        return path
    if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", str(name)) and path.suffix != ".safetensors":
        return _download(str(name))
    raise FileNotFoundError(
        f"unknown model {str(name)!r}: give a bundled model ({', '.join(bundled_models())}), a folder, a"
        " .safetensors file, or a Hugging Face repository such as kyutai/mimi"
    )


def _download(repository: str) -> Path:
    """Fetch a model from the Hugging Face Hub, or its cache, and return the folder it lies in."""
    import huggingface_hub

    try:
        config = huggingface_hub.hf_hub_download(repository, "config.json")
        huggingface_hub.hf_hub_download(repository, "model.safetensors")
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise FileNotFoundError(
            f"cannot get model {repository!r} from the Hugging Face Hub: {reason} (check the name and the"
            " connection, or give a local folder)"
        ) from None
    return Path(config).parent


def _read_config(path: Path, encoder: bool, decoder: bool) -> tuple[MimiConfig, dict[str, bool], str | None]:
    """The configuration beside the weights, for a lone file the published one; the halves to load; and the
    stored weights' name in `int8.QUANTIZATIONS`."""
    file = (path if path.is_dir() else path.parent) / "config.json"
    if not file.is_file():
        if path.is_dir():
            raise FileNotFoundError(f"{path}: a model folder holds a config.json, found none")
        return MimiConfig(), {"encoder": encoder, "decoder": decoder}, None
    config = MimiConfig.from_json(file)
    fields = json.loads(file.read_text())
    # null marks a half that was dropped before saving, here and in `transformers`.
    stored = {half: fields.get(f"{half}_config", "") is not None for half in ("encoder", "decoder")}
    halves = {"encoder": encoder and stored["encoder"], "decoder": decoder and stored["decoder"]}
    if (encoder or decoder) and not any(halves.values()):
        missing = "encoder" if encoder else "decoder"
        raise ValueError(f"{path}: this model was saved without its {missing}, which was asked for")
    return config, halves, _read_quantization(fields, source=str(file))


def _read_quantization(fields: dict[str, Any], source: str) -> str | None:
    if (mark := fields.get("quantization_config")) is None:
        return None
    name = mark.get("weights") if isinstance(mark, dict) else mark
    try:
        check_name(name)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None
    return name


def layout_of(path: Path) -> str:
    """Which of `LAYOUTS` a model that `find` found is stored in, or "int8"."""
    if (path / "params").is_dir():
        return "flax"
    names = _open_safetensors(path / "model.safetensors" if path.is_dir() else path)
    return "int8" if _is_int8(names) else _torch_layout(names)


def _is_int8(names: Iterable[str]) -> bool:
    return any(name.endswith(".kernel_scale") for name in names)


def _torch_layout(names: Iterable[str]) -> str:
    return "kyutai" if any(name.startswith("quantizer.rvq_") for name in names) else "transformers"


def _open_safetensors(path: Path) -> LazyTensors:
    try:
        file = safetensors.safe_open(path, framework="np")
    except (safetensors.SafetensorError, OSError) as error:
        raise ValueError(f"{path}: not a readable safetensors file ({error})") from None
    return {name: lambda name=name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


class _OneKey:
    """Stands in for `nnx.Rngs` where no number will ever be drawn: tracing the real one takes seconds."""

    def params(self) -> jax.Array:
        return jax.random.key(0)


def abstract_model(config: MimiConfig, **options: Any) -> Mimi:
    """A model whose parameters have shapes but no values yet; options as for `Mimi`."""
    return nnx.eval_shape(lambda: Mimi(config, rngs=cast(nnx.Rngs, _OneKey()), **options))


def _rows(model: Mimi) -> list[Weight]:
    return weight_table(model.config, model.encoder is not None, model.decoder is not None)


def _variables(model: Mimi) -> dict[Place, nnx.Variable]:
    """What a checkpoint holds of a model, by place; the rest is derived from it."""
    flat = nnx.to_flat_state(nnx.state(model))
    return {cast(Place, place): leaf for place, leaf in flat if not isinstance(leaf, Codebook)}


def _kind(dtype: DTypeLike) -> str:
    return "floating point" if jnp.issubdtype(dtype, jnp.floating) else str(dtype)


def _compare(
    found: Mapping[str, Any], expected: Mapping[str, Any], known: Collection[str], source: str
) -> None:
    """Refuse tensors that are missing, unexpected or of another kind, naming all of them at once."""
    missing = sorted(expected.keys() - found.keys())
    problems = [f"missing {name} {list(expected[name].shape)}" for name in missing]
    problems += [f"unexpected {name}" for name in sorted(found.keys() - set(known))]
    problems += [
        f"{name} has shape {list(found[name].shape)}, expected {list(expected[name].shape)}"
        for name in sorted(expected.keys() & found.keys())
        if found[name].shape != expected[name].shape
    ]
    problems += [
        f"{name} holds {found[name].dtype}, expected {_kind(expected[name].dtype)}"
        for name in sorted(expected.keys() & found.keys())
        if _kind(found[name].dtype) != _kind(expected[name].dtype)
    ]
    if problems:
        raise ValueError(f"{source}: the tensors do not fit the configuration: {'; '.join(problems)}")


def read_tensors(tensors: LazyTensors, model: Mimi, source: str) -> Arrays:
    """A PyTorch checkpoint, in any of its layouts, as the arrays of a model.

    Args:
        tensors: by name, each a function that reads it. The half that `model` lacks is not read.
        model: from `abstract_model`; its parameters' shapes are used, not their values.
        source: what to call the checkpoint in errors.

    Raises:
        ValueError: naming every tensor that is missing, unexpected or of another shape.
    """
    if _is_int8(tensors):
        raise ValueError(f"{source} holds int8 weights; the config.json saved with it must stand beside it")
    layout = _torch_layout(tensors)
    rows, config = _rows(model), model.config
    shapes = {path: np.broadcast_to(np.int8(0), v.shape) for path, v in _variables(model).items()}
    tensors_like = to_tensors(shapes, rows, config, layout)
    expected = {name: jax.ShapeDtypeStruct(x.shape, jnp.float32) for name, x in tensors_like.items()}
    known = {getattr(row, layout) for row in weight_table(config)}
    parts: dict[str, dict[str, Callable[[], np.ndarray]]] = {}
    for name, read in tensors.items():
        name, role = canonical_name(name)
        parts.setdefault(name, {})[role] = read
    found = {}
    for name, part in parts.items():
        if name in known and name not in expected:
            continue
        if part.keys() == {"g", "v"}:
            found[name] = fold_weight_norm(part["g"](), part["v"]())
        elif part.keys() == {""}:
            found[name] = part[""]()
        else:
            raise ValueError(f"{source}: {name} needs one tensor or a weight-norm pair, got {len(part)}")
    _compare(found, expected, known, source)
    return to_arrays(found, rows, config, layout)


def _names(model: Mimi) -> dict[Place, Any]:
    """What an int8 file calls the parameter at each place, or its values and scales."""
    names: dict[Place, Any] = {}
    for place, variable in _variables(model).items():
        name = ".".join(map(str, place))
        names[place] = Int8(name, f"{name}_scale") if isinstance(variable, Int8Param) else name
    return names


def _int8_tensors(model: Mimi) -> dict[str, Any]:
    """What an int8 file holds, or the shapes of it."""
    values = {place: variable.get_raw_value() for place, variable in _variables(model).items()}
    return dict(zip(jax.tree.leaves(_names(model)), jax.tree.leaves(values), strict=True))


def _read_int8(tensors: LazyTensors, model: Mimi, quantization: str, source: str) -> dict[Place, Any]:
    """As `read_tensors`, an int8 file; `model` from `quantize_abstract`."""
    expected = _int8_tensors(model)
    known = _int8_tensors(quantize_abstract(abstract_model(model.config), quantization))
    found = {name: read() for name, read in tensors.items() if name in expected or name not in known}
    _compare(found, expected, known, source)
    return {place: jax.tree.map(found.__getitem__, names) for place, names in _names(model).items()}


def fill(
    model: Mimi,
    arrays: Mapping[Place, Any],
    dtype: DTypeLike | None,
    sharding: jax.sharding.Sharding | None = None,
) -> Mimi:
    """Give an abstract model its values.

    Args:
        arrays: NumPy or JAX arrays, or `Int8` of such, by place in the model.
        dtype: of all but the quantizer, which is float32; None keeps what is stored.
        sharding: where to put every array; None for the default device.
    """
    graph, state = nnx.split(model)
    flat = dict(nnx.to_flat_state(state))
    for place, array in arrays.items():
        wanted = jnp.float32 if place[0] == "quantizer" else dtype
        array = array if wanted is None else array.astype(wanted)
        flat[place] = flat[place].replace(jax.device_put(array, sharding))
    model = nnx.merge(graph, nnx.from_flat_state(flat))
    model.quantizer.derive()
    return model


def _restore(folder: Path, model: Mimi, sharding: jax.sharding.Sharding | None) -> dict[Place, jax.Array]:
    """An Orbax folder's arrays, each read straight to where `sharding` puts it."""
    import orbax.checkpoint as ocp

    if sharding is None:
        sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    expected = {".".join(map(str, place)): place for place in _variables(model)}
    shapes = {name: _variables(model)[place] for name, place in expected.items()}
    with ocp.StandardCheckpointer() as checkpointer:
        try:
            metadata = checkpointer.metadata(folder.absolute()).item_metadata
            found = dict(metadata.tree if hasattr(metadata, "tree") else metadata)
        except (OSError, ValueError, AttributeError, TypeError) as error:
            raise ValueError(f"{folder}: not a readable Orbax checkpoint ({error})") from None
        full = abstract_model(model.config)
        known = {".".join(map(str, place)) for place in _variables(full)}
        _compare(found, shapes, known, str(folder))
        target = {
            name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
            for name, leaf in found.items()
        }
        restored = checkpointer.restore(folder.absolute(), target)
    return {place: restored[name] for name, place in expected.items()}


def save(model: Mimi, folder: str | Path, layout: str | None = None) -> None:
    """Write a model folder that `load` reads back bit for bit.

    Args:
        layout: "transformers" or "kyutai" for a `model.safetensors` that they read too, or "flax" for an
            Orbax folder. None is "transformers", but for int8 weights, which have their own.

    Raises:
        ValueError: for another layout, or where it cannot hold the model.
    """
    quantization = quantization_of(model)
    if quantization is not None and layout is not None:
        raise ValueError(
            f"int8 weights cannot be stored in the layout {layout!r}, only in their own, without a layout;"
            " or convert `mimi_jax.checkpoint.int8.dequantize(model)`"
        )
    layout = layout or "transformers"
    if layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}, got {layout!r}")
    folder = Path(folder)
    variables = _variables(model)
    fields = model.config.to_dict()
    for half in ("encoder", "decoder"):
        if getattr(model, half) is None:
            fields[f"{half}_config"] = None
    if quantization is not None:
        # Without a "quant_method" transformers refuses; one that it does not know it would overlook.
        fields["quantization_config"] = {"weights": quantization}
        _save_safetensors(folder, _int8_tensors(model), {"format": "mimi_jax"})
    elif layout == "flax":
        folder.mkdir(parents=True, exist_ok=True)
        _save_orbax(folder / "params", {".".join(map(str, p)): v[...] for p, v in variables.items()})
    else:
        arrays = {place: np.asarray(variable[...]) for place, variable in variables.items()}
        tensors = to_tensors(arrays, _rows(model), model.config, layout)
        # transformers loads only files that name their framework.
        _save_safetensors(folder, tensors, {"format": "pt"})
    with atomic_path(folder / "config.json") as file:
        file.write_text(json.dumps(fields, indent=2) + "\n")


def _save_safetensors(folder: Path, tensors: Mapping[str, Any], metadata: dict[str, str]) -> None:
    # Strided views would be stored in their memory order.
    tensors = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_path(folder / "model.safetensors") as file:
        file.write_bytes(safetensors.numpy.save(tensors, metadata))  # `save_file` would make it private


def _save_orbax(folder: Path, arrays: dict[str, jax.Array]) -> None:
    import orbax.checkpoint as ocp

    with atomic_path(folder) as temporary, ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(temporary.absolute(), arrays)


def keep_codebooks(model: Mimi, num_quantizers: int) -> Mimi:
    """The same model with its first codebooks alone: its codes are the first ones of the whole model's.

    Args:
        num_quantizers: how many to keep, the semantic ones included.

    Raises:
        ValueError: that leaves no acoustic codebook, or is more than there are.
    """
    _check_kept(model.config, num_quantizers)
    num_acoustic = num_quantizers - model.quantizer.num_semantic
    kept = nnx.clone(model)
    kept.config = dataclasses.replace(model.config, num_quantizers=num_quantizers)
    kept.quantizer.num_quantizers = num_quantizers
    acoustic = kept.quantizer.acoustic
    statistics = (acoustic.initialized, acoustic.cluster_usage, acoustic.embedding_sum)
    for stack in (*statistics, acoustic.embedding, acoustic.half_square):
        stack.set_value(stack[...][:num_acoustic])
    return kept


def _check_kept(config: MimiConfig, num_quantizers: int) -> None:
    least = config.num_semantic_quantizers + 1
    if type(num_quantizers) is not int or not least <= num_quantizers <= config.num_quantizers:
        raise ValueError(
            f"num_quantizers must be an integer from {least}, the semantic and one acoustic codebook, to"
            f" {config.num_quantizers}, all of this model, got {num_quantizers!r}"
        )


def model_id(model: Mimi, num_quantizers: int | None = None) -> str:
    """16 hexadecimal digits that name what the model's codes mean: a hash of its quantizer's weights.

    The encoder and the decoder do not enter, so either half of a model has the identity of the whole,
    and a decoder that was fine-tuned on frozen codes keeps it. Nor do codebooks that are not used, so
    codes of the first 8 have one name, whether a model of 8 codebooks made them or the whole.

    Args:
        num_quantizers: how many codebooks the codes are of; None for all.
    """
    quantizer = model.quantizer
    count = quantizer.num_quantizers if num_quantizers is None else quantizer.resolve_count(num_quantizers)
    digest = hashlib.sha256()
    for place, variable in sorted(_variables(model).items(), key=lambda item: str(item[0])):
        if place[0] == "quantizer":
            array = np.ascontiguousarray(variable[...])
            if place[1] == "acoustic" and isinstance(variable, CodebookStatistic):
                array = array[: count - quantizer.num_semantic]
            digest.update(f"{place} {array.dtype} {array.shape}".encode())
            digest.update(array.data)
    return digest.hexdigest()[:16]
