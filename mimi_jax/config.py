"""The architecture of a Mimi codec, in the field names of `transformers.MimiConfig` (5.23).

A codec has three clocks, and this package calls each by one word:

    samples   24,000 a second   audio
    steps         25 a second   what the SEANet networks and the Transformers exchange
    frames      12.5 a second   latents and codes
"""

import dataclasses
import functools
import json
import math
import operator
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

MAX_SHOWN = 5  # problems of one kind in an error message
PAD_MODES = ("constant", "replicate")  # the others would look ahead
ACTIVATIONS = ("gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "silu", "swish")

# Any `transformers` configuration may hold these. No computation of Mimi reads them.
# fmt: off
_IGNORED_FIELDS = {
    "_attn_implementation_autoset", "_name_or_path", "architectures", "chunk_size_feed_forward", "dtype",
    "id2label", "is_encoder_decoder", "label2id", "model_type", "output_attentions", "output_hidden_states",
    "problem_type", "quantization_config", "return_dict", "torch_dtype", "transformers_version",
}
# fmt: on

# Some published files still hold these fields of EnCodec. Mimi has neither, so each must be off.
_LEFTOVER_FIELDS = {"normalize": False, "chunk_length_s": None, "chunk_in_sec": None}


def ceil_div(numerator: Any, denominator: int) -> Any:
    """Integer division rounded up, exact for Python integers of any size and for integer arrays."""
    if isinstance(numerator, np.ndarray | np.generic):
        numerator = numerator.astype(np.int64)
    elif hasattr(numerator, "dtype") and (numerator.dtype.itemsize < 4 or numerator.dtype.kind == "u"):
        numerator = numerator.astype(np.int32)  # the negative of an unsigned number would be wrong
    return -(-numerator // denominator)


def as_integer(value: object) -> int | None:
    """An integer of any type, such as `np.int64(8)`, as a Python integer.

    None for anything else, which booleans and traced values are too.
    """
    try:
        return None if isinstance(value, bool) else operator.index(value)  # pyright: ignore[reportArgumentType]
    except TypeError:
        return None


def first_few(problems: list[str]) -> list[str]:
    """The first problems of one kind, and how many more there are."""
    more = len(problems) - MAX_SHOWN
    return problems if more <= 0 else [*problems[:MAX_SHOWN], f"and {more} more like this"]


def _is_count(value: Any) -> bool:
    return type(value) is int and value > 0


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


# JSON may hold anything. What a field of each type must be, in words and as a check.
_TYPES: dict[Any, tuple[str, Callable[[Any], bool]]] = {
    int: ("a positive integer", _is_count),
    int | None: ("a positive integer", lambda value: value is None or _is_count(value)),
    float: ("a number", _is_number),
    float | None: ("a positive number", lambda value: value is None or (_is_number(value) and value > 0)),
    bool: ("true or false", lambda value: type(value) is bool),
    str: ("a string", lambda value: type(value) is str),
    tuple[int, ...]: ("positive integers", lambda value: type(value) is tuple and all(map(_is_count, value))),
}


@dataclasses.dataclass(frozen=True)
class MimiConfig:
    """What decides the shapes and the arithmetic of a Mimi codec.

    Names, meanings and defaults are those of `transformers.MimiConfig`. Two fields come from its older
    releases: `rope_theta`, which is now inside `rope_parameters`, and `frame_rate`, which is now derived.
    Give `frame_rate` only if the codec does not halve the rate of the steps.

    The fields of the last group change no number here. They are kept so that a configuration can be read
    and written again without loss.

    To change a configuration, make a new one: `dataclasses.replace` would keep the `frame_rate` and the
    `head_dim` that were derived from the old fields.

    Raises:
        ValueError: naming every field with a value that is not supported.
    """

    sampling_rate: int = 24_000  # Hz
    frame_rate: float | None = None  # frames of codes per second; None: half the steps, 12.5 Hz
    audio_channels: int = 1  # 1 mono, 2 stereo
    hidden_size: int = 512
    num_filters: int = 64  # channels after the first convolution, doubled at every ratio
    num_residual_layers: int = 1
    upsampling_ratios: tuple[int, ...] = (8, 6, 5, 4)  # decoder order; the encoder reverses it
    kernel_size: int = 7
    last_kernel_size: int = 3
    residual_kernel_size: int = 3
    dilation_growth_rate: int = 2
    use_causal_conv: bool = True  # False: convolutions look ahead, so that only whole clips can be coded
    pad_mode: str = "constant"  # or "replicate"
    compress: int = 2  # residual blocks are `compress` times narrower inside
    trim_right_ratio: float = 1.0
    use_conv_shortcut: bool = False
    codebook_size: int = 2048
    codebook_dim: int = 256
    num_quantizers: int = 32
    num_semantic_quantizers: int = 1
    vector_quantization_hidden_dimension: int = 256
    upsample_groups: int = 512
    num_hidden_layers: int = 8
    intermediate_size: int = 2048
    num_attention_heads: int = 8
    num_key_value_heads: int = 8
    head_dim: int | None = None  # None: hidden_size / num_attention_heads
    hidden_act: str = "gelu"  # exact (erf) GELU
    norm_eps: float = 1e-5
    rope_theta: float = 10_000.0
    sliding_window: int = 250  # steps a query sees, itself included
    layer_scale_initial_scale: float = 0.01
    attention_bias: bool = False

    attention_dropout: float = 0.0
    initializer_range: float = 0.02
    max_position_embeddings: int = 8000
    tie_word_embeddings: bool = True
    use_cache: bool = False
    use_streaming: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.upsampling_ratios, list):  # from JSON, but jit's static data must be hashable
            object.__setattr__(self, "upsampling_ratios", tuple(self.upsampling_ratios))
        types = [(field.name, *_TYPES[field.type]) for field in dataclasses.fields(self)]
        self._check([(name, fits(getattr(self, name)), f"must be {words}") for name, words, fits in types])
        if self.head_dim is None:
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_attention_heads)
        if self.frame_rate is None:
            samples = 2 * math.prod(self.upsampling_ratios)
            object.__setattr__(self, "frame_rate", self.sampling_rate / samples)
        self._check(self._rules())

    def _check(self, rules: list[tuple[str, bool, str]]) -> None:
        broken = [f"{f} {rule}, got {getattr(self, f)!r}" for f, holds, rule in rules if not holds]
        if broken:
            raise ValueError(f"unsupported Mimi configuration: {'; '.join(broken)}")

    def _rules(self) -> list[tuple[str, bool, str]]:
        """Each field that has a rule, whether the rule holds, and the rule in words."""
        heads, size, vq_size = self.num_attention_heads, self.hidden_size, self.codebook_size
        vq_dim = self.vector_quantization_hidden_dimension
        trims_right = self.trim_right_ratio == 1 or self.use_causal_conv
        return [
            ("audio_channels", self.audio_channels <= 2, "must be 1 or 2"),
            ("pad_mode", self.pad_mode in PAD_MODES, f"must be one of {', '.join(PAD_MODES)}"),
            ("hidden_act", self.hidden_act in ACTIVATIONS, f"must be one of {', '.join(ACTIVATIONS)}"),
            ("hidden_size", size % heads == 0, f"must be a multiple of num_attention_heads={heads}"),
            ("num_key_value_heads", heads % self.num_key_value_heads == 0, f"must divide {heads} heads"),
            ("head_dim", (self.head_dim or 1) % 2 == 0, "must be even, since RoPE rotates pairs"),
            ("codebook_size", vq_size & (vq_size - 1) == 0, "must be a power of 2"),
            (
                "num_semantic_quantizers",
                self.num_semantic_quantizers < self.num_quantizers,
                f"must be lower than num_quantizers={self.num_quantizers}",
            ),
            (
                "codebook_dim",
                self.codebook_dim == vq_dim,
                f"must equal vector_quantization_hidden_dimension={vq_dim}",
            ),
            ("upsample_groups", size % self.upsample_groups == 0, f"must divide hidden_size={size}"),
            ("trim_right_ratio", 0 <= self.trim_right_ratio <= 1, "must lie in [0, 1]"),
            ("trim_right_ratio", trims_right, "must be 1 where use_causal_conv is false"),
            (
                "frame_rate",
                self.latent_stride >= 2,
                f"must be at most half of the {self.encodec_frame_rate} steps a second",
            ),
            ("attention_dropout", self.attention_dropout == 0, "must be 0, since dropout is not implemented"),
        ]

    @functools.cached_property
    def encodec_frame_rate(self) -> int:
        """Steps per second, rounded up: the rate of the Transformers' inputs."""
        return math.ceil(self.sampling_rate / math.prod(self.upsampling_ratios))

    @functools.cached_property
    def latent_stride(self) -> int:
        """Steps per frame: the stride of the downsampling before the quantizer."""
        return int(self.encodec_frame_rate / (self.frame_rate or math.inf))

    @functools.cached_property
    def frame_size(self) -> int:
        """Samples per frame of codes: 1920, that is 80 ms, by default."""
        return math.prod(self.upsampling_ratios) * self.latent_stride

    @property
    def is_streamable(self) -> bool:
        """Whether a stream can be coded frame by frame. It can if no layer looks ahead."""
        return self.use_causal_conv and self.trim_right_ratio == 1.0

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> "MimiConfig":
        """Read the fields of a `transformers` Mimi configuration of any release.

        Raises:
            ValueError: naming the unknown fields and every field with a value that is not supported.
        """
        values = {k: v for k, v in fields.items() if k not in _IGNORED_FIELDS}
        problems = []
        for half in ("encoder_config", "decoder_config"):  # null stands for a half that was not saved
            if values.pop(half, None) is not None:
                problems.append(f"{half} must be null or absent")
        for name, off in _LEFTOVER_FIELDS.items():
            if (value := values.pop(name, off)) != off:
                problems.append(f"{name} must be {json.dumps(off)}, got {json.dumps(value)}")
        rope = values.pop("rope_parameters", None) or {}
        if not isinstance(rope, dict):
            raise ValueError(f"rope_parameters must be an object, got {json.dumps(rope)}")
        if (rope_type := rope.get("rope_type", "default")) != "default":
            problems.append(f"rope_type must be 'default', got {rope_type!r}")
        problems += [
            f"unknown field 'rope_parameters.{k}'" for k in sorted(rope.keys() - {"rope_theta", "rope_type"})
        ]
        values["rope_theta"] = rope.get("rope_theta", values.get("rope_theta", cls.rope_theta))
        # 5.x writes `_frame_rate`, null where it is derived.
        values["frame_rate"] = values.pop("_frame_rate", values.get("frame_rate"))
        if (codebooks := values.pop("num_codebooks", None)) is not None:
            values["num_quantizers"] = codebooks
        if values.get("codebook_dim", 0) is None:
            values["codebook_dim"] = values.get("hidden_size", cls.hidden_size)
        if not values.get("upsampling_ratios", True):
            del values["upsampling_ratios"]
        known = {field.name for field in dataclasses.fields(cls)}
        problems += first_few([f"unknown field {name!r}" for name in sorted(values.keys() - known)])
        if problems:
            raise ValueError(f"unsupported Mimi configuration: {'; '.join(problems)}")
        return cls(**values)

    @classmethod
    def from_json(cls, path: str | Path) -> "MimiConfig":
        """Read the `config.json` of any `transformers` release.

        Raises:
            ValueError: the file is not JSON, or for the reasons of `from_dict`.
        """
        try:
            fields = json.loads(Path(path).read_text())
            if not isinstance(fields, dict):
                raise ValueError("it must hold one JSON object")
            return cls.from_dict(fields)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}: {error}") from None

    def to_dict(self) -> dict[str, Any]:
        """The fields as old and new releases of `transformers` read them."""
        fields = dataclasses.asdict(self)
        fields["upsampling_ratios"] = list(self.upsampling_ratios)
        fields["rope_parameters"] = {"rope_theta": self.rope_theta, "rope_type": "default"}
        return {"architectures": ["MimiModel"], "model_type": "mimi", **fields}
