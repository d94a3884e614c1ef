"""One table: where each parameter stands in this model, in `transformers` and in Kyutai's `moshi`.

`weight_table` has a row for every tensor of a `transformers` checkpoint (flat names, as published). Both
directions, both layouts and the check of names and shapes read the same rows. NumPy only.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np

from mimi_jax.config import MimiConfig

Place = tuple[str | int, ...]
Arrays = dict[Place, np.ndarray]  # this model's parameters, by their place in it
Tensors = dict[str, np.ndarray]  # a checkpoint's tensors, by name


class Layout(NamedTuple):
    """How PyTorch's order of axes becomes ours, and back."""

    load: Callable[[np.ndarray], np.ndarray]
    save: Callable[[np.ndarray], np.ndarray]


PLAIN = Layout(lambda x: x, lambda x: x)
LINEAR = Layout(lambda x: x.T, lambda x: x.T)  # [out, in] <-> [in, out]
CONV = Layout(lambda x: x.transpose(2, 1, 0), lambda x: x.transpose(2, 1, 0))  # [out, in, k] <-> [k, in, out]
PROJECTION = Layout(lambda x: x[:, :, 0].T, lambda x: x.T[:, :, None])  # [out, in, 1] <-> [in, out]


def conv_transpose(groups: int) -> Layout:
    """[in, out / groups, 2 strides] <-> [2, groups, in / groups, stride, out / groups], late taps first."""

    def load(x: np.ndarray) -> np.ndarray:
        x = x.reshape(groups, -1, x.shape[1], 2, x.shape[2] // 2)
        return x.transpose(3, 0, 1, 4, 2)[::-1]

    def save(x: np.ndarray) -> np.ndarray:
        x = x[::-1].transpose(1, 2, 4, 0, 3)
        return x.reshape(-1, x.shape[2], 2 * x.shape[4])

    return Layout(load, save)


class Weight(NamedTuple):
    path: Place
    layout: Layout
    transformers: str
    kyutai: str | None  # None where Kyutai's code has no such tensor
    third: int | None = None  # Kyutai fuses the query, key and value projections into one tensor
    level: int | None = None  # our codebooks are stacked


def _conv_rows(
    path: Place, name: str, kyutai: str, layout: Layout = CONV, bias: bool = True
) -> Iterator[Weight]:
    yield Weight((*path, "kernel"), layout, f"{name}.weight", f"{kyutai}.weight")
    if bias:
        yield Weight((*path, "bias"), PLAIN, f"{name}.bias", f"{kyutai}.bias")


def _seanet_rows(config: MimiConfig, half: str) -> Iterator[Weight]:
    """The numbered layers of the references: ELUs count, so convolutions stand one further on."""
    number = 0

    def conv(path: Place, layout: Layout = CONV, kind: str = "conv") -> Iterator[Weight]:
        name = f"{half}.layers.{number}.conv"
        return _conv_rows((half, *path), name, f"{half}.model.{number}.{kind}.{kind}", layout)

    def blocks(stage: int) -> Iterator[Weight]:
        nonlocal number
        for block in range(config.num_residual_layers):
            ours = (half, "stages", stage, "blocks", block)
            name, kyutai = f"{half}.layers.{number}", f"{half}.model.{number}"
            yield from _conv_rows((*ours, "conv1"), f"{name}.block.1.conv", f"{kyutai}.block.1.conv.conv")
            yield from _conv_rows((*ours, "conv2"), f"{name}.block.3.conv", f"{kyutai}.block.3.conv.conv")
            if config.use_conv_shortcut:
                yield from _conv_rows(
                    (*ours, "shortcut"), f"{name}.shortcut.conv", f"{kyutai}.shortcut.conv.conv"
                )
            number += 1

    yield from conv(("first",))
    number += 1
    for stage in range(len(config.upsampling_ratios)):
        if half == "encoder":
            yield from blocks(stage)
        number += 1
        if half == "encoder":
            yield from conv(("stages", stage, "downsample"))
        else:
            yield from conv(("stages", stage, "upsample"), conv_transpose(1), "convtr")
        number += 1
        if half == "decoder":
            yield from blocks(stage)
    number += 1
    yield from conv(("last",))


def _transformer_rows(config: MimiConfig, half: str) -> Iterator[Weight]:
    for layer in range(config.num_hidden_layers):
        ours = (f"{half}_transformer", "blocks", layer)
        name = f"{half}_transformer.layers.{layer}"
        kyutai = f"{half}_transformer.transformer.layers.{layer}"
        for third, (proj, letter) in enumerate((("query_proj", "q"), ("key_proj", "k"), ("value_proj", "v"))):
            path, theirs = (*ours, "attention", proj), f"{name}.self_attn.{letter}_proj"
            fused = None if config.num_key_value_heads != config.num_attention_heads else "in_proj_weight"
            fused = fused and f"{kyutai}.self_attn.{fused}"
            yield Weight((*path, "kernel"), LINEAR, f"{theirs}.weight", fused, third)
            if config.attention_bias:
                yield Weight((*path, "bias"), PLAIN, f"{theirs}.bias", None)
        path, theirs = (*ours, "attention", "output_proj"), f"{name}.self_attn.o_proj"
        yield Weight((*path, "kernel"), LINEAR, f"{theirs}.weight", f"{kyutai}.self_attn.out_proj.weight")
        if config.attention_bias:
            yield Weight((*path, "bias"), PLAIN, f"{theirs}.bias", None)
        for norm, theirs, native in (
            ("attention_norm", "input_layernorm", "norm1"),
            ("mlp_norm", "post_attention_layernorm", "norm2"),
        ):
            yield Weight(
                (*ours, norm, "scale"), PLAIN, f"{name}.{theirs}.weight", f"{kyutai}.{native}.weight"
            )
            yield Weight((*ours, norm, "bias"), PLAIN, f"{name}.{theirs}.bias", f"{kyutai}.{native}.bias")
        for linear, theirs, native in (("mlp_in", "mlp.fc1", "linear1"), ("mlp_out", "mlp.fc2", "linear2")):
            yield Weight(
                (*ours, linear, "kernel"), LINEAR, f"{name}.{theirs}.weight", f"{kyutai}.{native}.weight"
            )
        for scale, theirs, native in (
            ("attention_scale", "self_attn_layer_scale", "layer_scale_1"),
            ("mlp_scale", "mlp_layer_scale", "layer_scale_2"),
        ):
            yield Weight((*ours, scale), PLAIN, f"{name}.{theirs}.scale", f"{kyutai}.{native}.scale")


def _quantizer_rows(config: MimiConfig) -> Iterator[Weight]:
    num_semantic = config.num_semantic_quantizers
    for part, native, num_levels in (
        ("semantic", "rvq_first", num_semantic),
        ("acoustic", "rvq_rest", config.num_quantizers - num_semantic),
    ):
        ours, name = ("quantizer", part), f"quantizer.{part}_residual_vector_quantizer"
        if config.codebook_dim != config.hidden_size:
            for proj in ("input_proj", "output_proj"):
                yield Weight(
                    (*ours, proj, "kernel"),
                    PROJECTION,
                    f"{name}.{proj}.weight",
                    f"quantizer.{native}.{proj}.weight",
                )
        for level in range(num_levels):
            for statistic, theirs, native_name in (
                ("initialized", "initialized", "_initialized"),
                ("cluster_usage", "cluster_usage", "cluster_usage"),
                ("embedding_sum", "embed_sum", "embedding_sum"),
            ):
                yield Weight(
                    (*ours, statistic),
                    Layout(lambda x: x[0], lambda x: x[None]) if statistic == "initialized" else PLAIN,
                    f"{name}.layers.{level}.codebook.{theirs}",
                    f"quantizer.{native}.vq.layers.{level}._codebook.{native_name}",
                    level=level,
                )


def weight_table(config: MimiConfig, encoder: bool = True, decoder: bool = True) -> list[Weight]:
    """Every tensor of a checkpoint of this configuration, or of the half of it that is asked for."""
    rows: list[Weight] = []
    if encoder:
        rows += _seanet_rows(config, "encoder")
        rows += _transformer_rows(config, "encoder")
        kyutai = "downsample.conv.conv.conv"
        rows += _conv_rows(("downsample",), "downsample.conv", kyutai, bias=False)
    rows += _quantizer_rows(config)
    if decoder:
        layout = conv_transpose(config.upsample_groups)
        kyutai = "upsample.convtr.convtr.convtr"
        rows += _conv_rows(("upsample",), "upsample.conv", kyutai, layout, bias=False)
        rows += _transformer_rows(config, "decoder")
        rows += _seanet_rows(config, "decoder")
    return rows


def _to_half_split(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """Kyutai rotates neighbouring channels, `transformers` the two halves of a head: reorder the rows."""
    heads = weight.reshape(num_heads, -1, 2, weight.shape[1])
    return heads.swapaxes(1, 2).reshape(weight.shape)


def _to_interleaved(weight: np.ndarray, num_heads: int) -> np.ndarray:
    heads = weight.reshape(num_heads, 2, -1, weight.shape[1])
    return heads.swapaxes(1, 2).reshape(weight.shape)


def to_tensors(arrays: Arrays, rows: Iterable[Weight], config: MimiConfig, layout: str) -> Tensors:
    """Our parameters as a checkpoint in the layout "transformers" or "kyutai".

    Raises:
        ValueError: where Kyutai's layout cannot hold the model.
    """
    tensors: Tensors = {}
    for row in rows:
        array = arrays[row.path] if row.level is None else arrays[row.path][row.level]
        tensor = row.layout.save(array)
        if layout == "transformers":
            tensors[row.transformers] = tensor
            continue
        if row.kyutai is None:
            raise ValueError(
                "the Kyutai layout holds neither attention biases nor grouped keys, such as"
                f" {row.transformers}; convert to transformers or flax"
            )
        if row.third in (0, 1):
            tensor = _to_interleaved(tensor, config.num_attention_heads)
        if row.third:
            tensor = np.concatenate([tensors[row.kyutai], tensor])
        tensors[row.kyutai] = tensor
    return tensors


def to_arrays(tensors: Tensors, rows: Iterable[Weight], config: MimiConfig, layout: str) -> Arrays:
    """The inverse of `to_tensors`; names and shapes must be right."""
    arrays: Arrays = {}
    levels: dict[Place, list[np.ndarray]] = {}
    for row in rows:
        tensor = tensors[row.transformers if layout == "transformers" else row.kyutai or ""]
        if layout == "kyutai" and row.third is not None:
            tensor = np.split(tensor, 3)[row.third]
            if row.third < 2:
                tensor = _to_half_split(tensor, config.num_attention_heads)
        array = row.layout.load(tensor)
        if row.level is None:
            arrays[row.path] = array
        else:
            levels.setdefault(row.path, []).append(array)
    return arrays | {path: np.stack(stack) for path, stack in levels.items()}


# Other names for the same tensors: first the nested modules of `transformers` 5.x, whole or half, then
# what `moshi` accepts from its older and its own checkpoints.
_ALIASES = [
    (r"^(?:encoder\.)?encoder_seanet\.", "encoder."),
    (r"^(?:decoder\.)?decoder_seanet\.", "decoder."),
    (r"^(?:encoder|decoder)\.(encoder_transformer|decoder_transformer|downsample|upsample)\.", r"\1."),
    (r"\.in_proj(?:s\.0)?\.weight$", ".in_proj_weight"),
    (r"\.out_projs\.0\.weight$", ".out_proj.weight"),
    (r"\._codebook\.inited$", "._codebook._initialized"),
    (r"\._codebook\.cluster_size$", "._codebook.cluster_usage"),
    (r"\._codebook\.(?:embed_avg|embed_sum)$", "._codebook.embedding_sum"),
]

# The two ways in which PyTorch has stored weight normalization: magnitude g and direction v.
_WEIGHT_NORM = [
    (r"\.weight_g$", "g"),
    (r"\.weight_v$", "v"),
    (r"\.parametrizations\.weight\.original0$", "g"),
    (r"\.parametrizations\.weight\.original1$", "v"),
]


def canonical_name(name: str) -> tuple[str, str]:
    """The table's name for a tensor, and its role there: "" or, in a weight-norm pair, "g" or "v"."""
    role = ""
    for pattern, pair_role in _WEIGHT_NORM:
        stripped = re.sub(pattern, ".weight", name)
        if stripped != name:
            name, role = stripped, pair_role
    for pattern, replacement in _ALIASES:
        name = re.sub(pattern, replacement, name)
    return name, role


def fold_weight_norm(g: np.ndarray, v: np.ndarray) -> np.ndarray:
    """The weight that a weight-norm pair stands for: v scaled to length g along its first axis."""
    norm = np.sqrt(np.sum(v.astype(np.float64) ** 2, axis=tuple(range(1, v.ndim)), keepdims=True))
    return (v * (g / norm)).astype(v.dtype)
