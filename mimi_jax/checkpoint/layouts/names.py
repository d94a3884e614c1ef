"""One table: the name and axes of each parameter here, in `transformers` and in Kyutai's `moshi`.

`weight_table` has a row for every tensor of a `transformers` checkpoint (flat names, as published). Reading
and writing both layouts, and the check of names and shapes, all use these rows. NumPy only.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np

from mimi_jax.config import MimiConfig

Arrays = dict[str, np.ndarray]  # this package's parameters, by name
Tensors = dict[str, np.ndarray]  # a PyTorch checkpoint's tensors, by name


class Axes(NamedTuple):
    """How the axes of a PyTorch tensor become those of our parameter, and back."""

    load: Callable[[np.ndarray], np.ndarray]
    save: Callable[[np.ndarray], np.ndarray]


PLAIN = Axes(lambda x: x, lambda x: x)
LINEAR = Axes(lambda x: x.T, lambda x: x.T)  # [out, in] <-> [in, out]
CONV = Axes(lambda x: x.transpose(2, 1, 0), lambda x: x.transpose(2, 1, 0))  # [out, in, k] <-> [k, in, out]
PROJECTION = Axes(lambda x: x[:, :, 0].T, lambda x: x.T[:, :, None])  # [out, in, 1] <-> [in, out]
SCALAR = Axes(lambda x: x[0], lambda x: x[None])  # [1] <-> []


def conv_transpose(groups: int) -> Axes:
    """[in, out / groups, 2 strides] <-> [2, groups, in / groups, stride, out / groups], late taps first."""

    def load(x: np.ndarray) -> np.ndarray:
        x = x.reshape(groups, -1, x.shape[1], 2, x.shape[2] // 2)
        return x.transpose(3, 0, 1, 4, 2)[::-1]

    def save(x: np.ndarray) -> np.ndarray:
        x = x[::-1].transpose(1, 2, 4, 0, 3)
        return x.reshape(-1, x.shape[2], 2 * x.shape[4])

    return Axes(load, save)


class Weight(NamedTuple):
    """A row of the table: one tensor of a `transformers` checkpoint."""

    ours: str
    axes: Axes
    transformers: str
    kyutai: str | None  # None where Kyutai's code has no such tensor
    third: int | None = None  # Kyutai joins query, key and value into one tensor: which third of it
    level: int | None = None  # we stack the codebooks of a quantizer: which one of the stack


def weight_table(config: MimiConfig, encoder: bool = True, decoder: bool = True) -> list[Weight]:
    """Every tensor of a checkpoint of this configuration, or of the requested half and the quantizer."""
    rows: list[Weight] = []
    if encoder:
        rows += _seanet_rows(config, "encoder")
        rows += _transformer_rows(config, "encoder")
        kyutai = "downsample.conv.conv.conv"
        rows += _conv_rows("downsample", "downsample.conv", kyutai, bias=False)
    rows += _quantizer_rows(config)
    if decoder:
        axes = conv_transpose(config.upsample_groups)
        kyutai = "upsample.convtr.convtr.convtr"
        rows += _conv_rows("upsample", "upsample.conv", kyutai, axes, bias=False)
        rows += _transformer_rows(config, "decoder")
        rows += _seanet_rows(config, "decoder")
    return rows


def _conv_rows(
    ours: str, transformers: str, kyutai: str, axes: Axes = CONV, bias: bool = True
) -> Iterator[Weight]:
    yield Weight(f"{ours}.kernel", axes, f"{transformers}.weight", f"{kyutai}.weight")
    if bias:
        yield Weight(f"{ours}.bias", PLAIN, f"{transformers}.bias", f"{kyutai}.bias")


def _seanet_rows(config: MimiConfig, half: str) -> Iterator[Weight]:
    """The references number all layers of a half. An ELU counts too, before each downsampling or upsampling
    convolution and before the last one."""
    number = 0

    def conv(name: str, axes: Axes = CONV, kind: str = "conv") -> Iterator[Weight]:
        kyutai = f"{half}.model.{number}.{kind}.{kind}"
        return _conv_rows(f"{half}.{name}", f"{half}.layers.{number}.conv", kyutai, axes)

    def blocks(stage: int) -> Iterator[Weight]:
        nonlocal number
        for block in range(config.num_residual_layers):
            ours = f"{half}.stages.{stage}.blocks.{block}"
            theirs, kyutai = f"{half}.layers.{number}", f"{half}.model.{number}"
            yield from _conv_rows(f"{ours}.conv1", f"{theirs}.block.1.conv", f"{kyutai}.block.1.conv.conv")
            yield from _conv_rows(f"{ours}.conv2", f"{theirs}.block.3.conv", f"{kyutai}.block.3.conv.conv")
            if config.use_conv_shortcut:
                yield from _conv_rows(
                    f"{ours}.shortcut", f"{theirs}.shortcut.conv", f"{kyutai}.shortcut.conv.conv"
                )
            number += 1

    yield from conv("first")
    number += 1
    for stage in range(len(config.upsampling_ratios)):
        if half == "encoder":
            yield from blocks(stage)
        number += 1
        if half == "encoder":
            yield from conv(f"stages.{stage}.downsample")
        else:
            yield from conv(f"stages.{stage}.upsample", conv_transpose(1), "convtr")
        number += 1
        if half == "decoder":
            yield from blocks(stage)
    number += 1
    yield from conv("last")


def _transformer_rows(config: MimiConfig, half: str) -> Iterator[Weight]:
    for layer in range(config.num_hidden_layers):
        ours = f"{half}_transformer.blocks.{layer}"
        theirs = f"{half}_transformer.layers.{layer}"
        kyutai = f"{half}_transformer.transformer.layers.{layer}"
        yield from _attention_rows(config, f"{ours}.attention", f"{theirs}.self_attn", f"{kyutai}.self_attn")
        for norm, name, native in (
            ("attention_norm", "input_layernorm", "norm1"),
            ("mlp_norm", "post_attention_layernorm", "norm2"),
        ):
            yield Weight(
                f"{ours}.{norm}.scale", PLAIN, f"{theirs}.{name}.weight", f"{kyutai}.{native}.weight"
            )
            yield Weight(f"{ours}.{norm}.bias", PLAIN, f"{theirs}.{name}.bias", f"{kyutai}.{native}.bias")
        for linear, name, native in (("mlp_in", "mlp.fc1", "linear1"), ("mlp_out", "mlp.fc2", "linear2")):
            yield Weight(
                f"{ours}.{linear}.kernel", LINEAR, f"{theirs}.{name}.weight", f"{kyutai}.{native}.weight"
            )
        for scale, name, native in (
            ("attention_scale", "self_attn_layer_scale", "layer_scale_1"),
            ("mlp_scale", "mlp_layer_scale", "layer_scale_2"),
        ):
            yield Weight(f"{ours}.{scale}", PLAIN, f"{theirs}.{name}.scale", f"{kyutai}.{native}.scale")


def _attention_rows(config: MimiConfig, ours: str, theirs: str, kyutai: str) -> Iterator[Weight]:
    is_grouped = config.num_key_value_heads != config.num_attention_heads
    joined = None if is_grouped else f"{kyutai}.in_proj_weight"
    for third, (proj, name) in enumerate(
        (("query_proj", "q_proj"), ("key_proj", "k_proj"), ("value_proj", "v_proj"))
    ):
        yield Weight(f"{ours}.{proj}.kernel", LINEAR, f"{theirs}.{name}.weight", joined, third)
        if config.attention_bias:
            yield Weight(f"{ours}.{proj}.bias", PLAIN, f"{theirs}.{name}.bias", None)
    yield Weight(f"{ours}.output_proj.kernel", LINEAR, f"{theirs}.o_proj.weight", f"{kyutai}.out_proj.weight")
    if config.attention_bias:
        yield Weight(f"{ours}.output_proj.bias", PLAIN, f"{theirs}.o_proj.bias", None)


def _quantizer_rows(config: MimiConfig) -> Iterator[Weight]:
    num_semantic = config.num_semantic_quantizers
    for part, native, num_levels in (
        ("semantic", "rvq_first", num_semantic),
        ("acoustic", "rvq_rest", config.num_quantizers - num_semantic),
    ):
        ours, theirs = f"quantizer.{part}", f"quantizer.{part}_residual_vector_quantizer"
        kyutai = f"quantizer.{native}"
        if config.codebook_dim != config.hidden_size:
            for proj in ("input_proj", "output_proj"):
                yield Weight(
                    f"{ours}.{proj}.kernel", PROJECTION, f"{theirs}.{proj}.weight", f"{kyutai}.{proj}.weight"
                )
        for level in range(num_levels):
            for statistic, axes, name, native_name in (
                ("initialized", SCALAR, "initialized", "_initialized"),
                ("cluster_usage", PLAIN, "cluster_usage", "cluster_usage"),
                ("embedding_sum", PLAIN, "embed_sum", "embedding_sum"),
            ):
                yield Weight(
                    f"{ours}.{statistic}",
                    axes,
                    f"{theirs}.layers.{level}.codebook.{name}",
                    f"{kyutai}.vq.layers.{level}._codebook.{native_name}",
                    level=level,
                )


def to_tensors(arrays: Arrays, rows: Iterable[Weight], config: MimiConfig, layout: str) -> Tensors:
    """Our parameters as the tensors of a checkpoint in the layout "transformers" or "kyutai".

    Raises:
        ValueError: Kyutai's layout cannot hold the model.
    """
    tensors: Tensors = {}
    for row in rows:
        array = arrays[row.ours] if row.level is None else arrays[row.ours][row.level]
        tensor = row.axes.save(array)
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
    """The inverse of `to_tensors`. Names and shapes must be right."""
    arrays: Arrays = {}
    levels: dict[str, list[np.ndarray]] = {}
    for row in rows:
        tensor = tensors[row.transformers if layout == "transformers" else row.kyutai or ""]
        if layout == "kyutai" and row.third is not None:
            tensor = np.split(tensor, 3)[row.third]
            if row.third < 2:
                tensor = _to_half_split(tensor, config.num_attention_heads)
        array = row.axes.load(tensor)
        if row.level is None:
            arrays[row.ours] = array
        else:
            levels.setdefault(row.ours, []).append(array)
    return arrays | {name: np.stack(stack) for name, stack in levels.items()}


def _to_half_split(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """Reorder the rows of a query or key projection from Kyutai's order to that of `transformers`.

    In a head, Kyutai rotates neighbouring channels together, and `transformers` the channels i and
    i + head_dim / 2.
    """
    heads = weight.reshape(num_heads, -1, 2, weight.shape[1])
    return heads.swapaxes(1, 2).reshape(weight.shape)


def _to_interleaved(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """The inverse of `_to_half_split`."""
    heads = weight.reshape(num_heads, 2, -1, weight.shape[1])
    return heads.swapaxes(1, 2).reshape(weight.shape)


# Other names of the same tensors. First the nested modules of `transformers` 5.x, of a whole model or of a
# half; then the names that `moshi` accepts from older checkpoints and from its own.
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

# The two ways in which PyTorch has stored weight normalization: the magnitude g and the direction v.
_WEIGHT_NORM = [
    (r"\.weight_g$", "g"),
    (r"\.weight_v$", "v"),
    (r"\.parametrizations\.weight\.original0$", "g"),
    (r"\.parametrizations\.weight\.original1$", "v"),
]


def canonical_name(name: str) -> tuple[str, str]:
    """The name of a tensor in the table, and its role: "", or "g" or "v" in a weight normalization pair."""
    role = ""
    for pattern, pair_role in _WEIGHT_NORM:
        stripped = re.sub(pattern, ".weight", name)
        if stripped != name:
            name, role = stripped, pair_role
    for pattern, replacement in _ALIASES:
        name = re.sub(pattern, replacement, name)
    return name, role


def fold_weight_norm(g: np.ndarray, v: np.ndarray) -> np.ndarray:
    """The weight of a weight normalization pair: v scaled to length g along its first axis."""
    norm = np.sqrt(np.sum(v.astype(np.float64) ** 2, axis=tuple(range(1, v.ndim)), keepdims=True))
    return (v * (g / norm)).astype(v.dtype)
