"""The codec in one file, which runs without this package's layers on every platform that it was made for.

    export.save(model, "mimi.zip", batch_size=1, seconds=10.0)
    codec = export.load("mimi.zip")
    codes = codec.encode(audio).audio_codes

Shapes are fixed when the file is made, since layers choose how to compute by the sizes of their inputs. The
file is an uncompressed zip of

    metadata.json          the fields of `Metadata`
    weights.safetensors    the parameters, once: each function takes them as an argument
    encode.bin, ...        the functions, in the serialization of `jax.export`

JAX promises to read that serialization for about six months. So keep the checkpoint, and make such a file
again when JAX is updated. To write and to read one needs the package `flatbuffers`.
"""

import json
import os
import zipfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from flax import nnx
from jax import export as jax_export
from jax.typing import ArrayLike

from mimi_jax.boundary import (
    check_active,
    check_audio,
    check_batch_size,
    check_codes,
    check_mask,
    check_mask_of_codes,
    transfers_allowed,
)
from mimi_jax.checkpoint import model_id
from mimi_jax.config import MimiConfig, ceil_div
from mimi_jax.files.arrays import named_leaves
from mimi_jax.files.atomic import atomic_path
from mimi_jax.model import (
    DecoderOutput,
    EncoderOutput,
    Mimi,
    decode,
    decode_step,
    encode,
    encode_step,
)
from mimi_jax.nn.quantizer import CodebookStatistic
from mimi_jax.ops.policy import resolve

FORMAT = "mimi_jax.export.1"
PLATFORMS = ("cpu", "cuda", "tpu")
DTYPES = {"F64": jnp.float64, "F32": jnp.float32, "F16": jnp.float16, "BF16": jnp.bfloat16, "I8": jnp.int8}

Weights = dict[str, Any]  # arrays, or their shapes, by place in the model, such as "decoder.first.kernel"
# By name: a function whose first argument is the weights, and the shapes of its other arguments.
Functions = dict[str, tuple[Callable, tuple]]


class Metadata(NamedTuple):
    """What an exported file says about itself."""

    config: MimiConfig
    platforms: tuple[str, ...]  # of `PLATFORMS`
    jax_version: str  # the one that made the file
    model_id: str  # what its codes mean, as in code files
    batch_size: int
    num_quantizers: int  # codebooks of all codes, in and out
    frames: int  # frames of the longest clip


class ExportedMimi:
    """What `load` returns: the codec as functions of fixed shapes. They work inside `jit` too.

    A state is a list of arrays. As everywhere in this package, they have the batch on axis 0 and are zero
    when the stream is fresh. So `take_rows`, `put_rows`, `reset_rows`, `save_state` and `load_state` take it.
    """

    def __init__(self, metadata: Metadata, weights: Weights, functions: dict[str, jax_export.Exported]):
        self.metadata, self._weights, self._exported = metadata, weights, functions
        self._functions = {name: jax.jit(exported.call) for name, exported in functions.items()}

    @property
    def config(self) -> MimiConfig:
        return self.metadata.config

    @transfers_allowed()
    def encode(self, audio: ArrayLike, padding_mask: ArrayLike | None = None) -> EncoderOutput:
        """As `mimi_jax.encode`, for up to `metadata.frames` frames of `metadata.batch_size` clips.

        Raises:
            ValueError: the model had no encoder, or inputs of other shapes or dtypes.
        """
        audio, mask = self._check_audio(audio, padding_mask, self.metadata.frames)
        frames = ceil_div(audio.shape[2], self.config.frame_size)
        missing = self.metadata.frames * self.config.frame_size - audio.shape[2]
        audio, mask = jnp.pad(audio, ((0, 0), (0, 0), (0, missing))), jnp.pad(mask, ((0, 0), (0, missing)))
        codes, codes_mask = self._call("encode", audio, mask)
        return EncoderOutput(codes[:, :, :frames], codes_mask[:, :frames])

    @transfers_allowed()
    def decode(self, audio_codes: ArrayLike, padding_mask: ArrayLike | None = None) -> DecoderOutput:
        """As `mimi_jax.decode`, for up to `metadata.frames` frames of `metadata.batch_size` clips.

        Raises:
            ValueError: the model had no decoder, or inputs of other shapes or dtypes.
        """
        codes, size = self._check_codes(audio_codes), self.config.frame_size
        batch, _, frames = codes.shape
        if frames > self.metadata.frames:
            raise ValueError(f"this file takes up to {self.metadata.frames} frames of codes, got {frames}")
        mask = jnp.ones((batch, frames * size), bool)
        if padding_mask is not None:
            mask, lengths = check_mask_of_codes(self.config, padding_mask, codes)
            mask = jnp.arange(mask.shape[1])[None] < lengths[:, None]
        num_samples, missing = mask.shape[1], self.metadata.frames - frames
        codes = jnp.pad(codes, ((0, 0), (0, 0), (0, missing)))
        mask = jnp.pad(mask, ((0, 0), (0, self.metadata.frames * size - num_samples)))
        return DecoderOutput(self._call("decode", codes, mask)[:, :, :num_samples])

    def init_encoder_state(self) -> list[jax.Array]:
        """The state of `metadata.batch_size` fresh streams, for `encode_step`."""
        return self._init_state("encode_step")

    def init_decoder_state(self) -> list[jax.Array]:
        """The state of `metadata.batch_size` fresh streams, for `decode_step`."""
        return self._init_state("decode_step")

    @transfers_allowed()
    def encode_step(
        self,
        state: list[jax.Array],
        audio: ArrayLike,
        padding_mask: ArrayLike | None = None,
        active: ArrayLike | None = None,
    ) -> tuple[list[jax.Array], jax.Array]:
        """As `mimi_jax.encode_step`, for one frame.

        Raises:
            ValueError: the model had no encoder or cannot stream, or inputs of other shapes or dtypes.
        """
        audio, mask = self._check_audio(audio, padding_mask, 1)
        if (num_samples := audio.shape[2]) != self.config.frame_size:
            raise ValueError(
                f"a step takes one frame, {self.config.frame_size} samples, got {num_samples};"
                " pad the last frame and mark it in padding_mask"
            )
        return self._call("encode_step", state, audio, mask, self._check_active(active))

    @transfers_allowed()
    def decode_step(
        self, state: list[jax.Array], audio_codes: ArrayLike, active: ArrayLike | None = None
    ) -> tuple[list[jax.Array], jax.Array]:
        """As `mimi_jax.decode_step`, for one frame.

        Raises:
            ValueError: the model had no decoder or cannot stream, or inputs of other shapes or dtypes.
        """
        codes = self._check_codes(audio_codes)
        if codes.shape[2] != 1:
            raise ValueError(f"a step takes one frame of codes, got {codes.shape[2]}")
        return self._call("decode_step", state, codes, self._check_active(active))

    def _call(self, name: str, *arguments: Any) -> Any:
        self._check_has(name)
        return self._functions[name](self._weights, *arguments)

    def _check_has(self, name: str) -> None:
        if name not in self._functions:
            raise ValueError(
                f"this file has no {name}, only {', '.join(self._functions)}; export a model that has both"
                " halves and can stream"
            )

    @transfers_allowed()
    def _init_state(self, name: str) -> list[jax.Array]:
        self._check_has(name)
        exported = self._exported[name]
        (_, state, *_), _ = jax.tree.unflatten(exported.in_tree, exported.in_avals)
        return [jnp.asarray(np.zeros(leaf.shape, leaf.dtype)) for leaf in state]

    def _check_audio(
        self, audio: ArrayLike, padding_mask: ArrayLike | None, frames: int
    ) -> tuple[jax.Array, jax.Array]:
        """Audio of at most so many frames as float32, and its mask as bool [batch, samples]."""
        audio, _ = check_audio(self.config, audio, padding_mask)
        batch, _, num_samples = audio.shape
        self._check_batch(batch)
        if num_samples > (limit := frames * self.config.frame_size):
            raise ValueError(f"this file takes up to {limit} samples at once, got {num_samples}")
        mask = np.ones((batch, num_samples), bool) if padding_mask is None else padding_mask
        return audio.astype(jnp.float32), check_mask(mask, batch)[0]

    def _check_codes(self, audio_codes: ArrayLike) -> jax.Array:
        """As int32 [batch, codebooks, frames]."""
        codes, count = check_codes(audio_codes), self.metadata.num_quantizers
        if codes.shape[1] != count:
            raise ValueError(f"codes must be [batch, codebooks={count}, frames], got {list(codes.shape)}")
        self._check_batch(len(codes))
        return codes.astype(jnp.int32)

    def _check_batch(self, batch: int) -> None:
        if batch != self.metadata.batch_size:
            raise ValueError(f"this file takes batches of {self.metadata.batch_size}, got one of {batch}")

    def _check_active(self, active: ArrayLike | None) -> jax.Array:
        batch = self.metadata.batch_size
        return check_active(np.ones(batch, bool) if active is None else active, batch)


def save(
    model: Mimi,
    path: str | os.PathLike[str],
    *,
    batch_size: int = 1,
    seconds: float = 10.0,
    num_quantizers: int | None = None,
    platforms: Sequence[str] = PLATFORMS,
    compute: str | Mapping[str, str] = "portable",
) -> None:
    """Write the file that `load` reads, whole or not at all.

    It holds those of encode, decode, encode_step and decode_step that the model can do, for all `platforms`,
    on whichever machine it is made.

    Args:
        path: the file. Its folder must exist.
        batch_size: how many clips or streams each call takes.
        seconds: the longest clip, rounded up to whole frames. Shorter ones take as much time as it does. A
            step always takes one frame.
        num_quantizers: how many codebooks to use, the first ones; None for all.
        platforms: some of "cpu", "cuda" and "tpu".
        compute: as for `Mimi`. Only "portable" works on all platforms; other choices may use device kernels.

    Raises:
        ValueError: naming the argument that is wrong.
        ImportError: `flatbuffers` is not installed.
        OSError: the file cannot be written.
    """
    config, platforms = model.config, tuple(platforms)
    if not platforms or set(platforms) - set(PLATFORMS):
        raise ValueError(f"platforms must be some of {', '.join(PLATFORMS)}, got {list(platforms)}")
    batch_size = check_batch_size(batch_size)
    if not 0 < seconds < float("inf"):
        raise ValueError(f"seconds must be positive, got {seconds!r}")
    count = model.quantizer.resolve_count(num_quantizers)
    frames = max(model.encoded_length(round(seconds * config.sampling_rate)), 1)
    metadata = Metadata(config, platforms, jax.__version__, model_id(model, count), batch_size, count, frames)
    model = nnx.merge(*nnx.split(model))  # a copy, to be changed
    model.compute = resolve(compute)
    weights, rebuild = _split(model)
    shapes = {name: jax.ShapeDtypeStruct(array.shape, array.dtype) for name, array in weights.items()}
    functions: Functions = {}
    if model.encoder is not None:
        functions |= _encoder_functions(model, rebuild, metadata)
    if model.decoder is not None:
        functions |= _decoder_functions(model, rebuild, metadata)
    files: dict[str, bytes | bytearray | str] = {
        f"{name}.bin": jax_export.export(jax.jit(function), platforms=platforms)(shapes, *inputs).serialize()
        for name, (function, inputs) in functions.items()
    }
    files["weights.safetensors"] = safetensors.numpy.save(weights)
    fields = {"format": FORMAT, **metadata._asdict(), "config": config.to_dict()}
    files["metadata.json"] = json.dumps(fields, indent=2)
    with atomic_path(path) as temporary, zipfile.ZipFile(temporary, "w") as file:
        for name, data in files.items():
            file.writestr(name, data)


def load(path: str | os.PathLike[str]) -> ExportedMimi:
    """Read what `save` wrote. The weights go to the default device.

    Raises:
        OSError: there is no such file, or it cannot be read.
        ValueError: the file is something else or damaged, or was not made for JAX's default platform here, or
            was made by a version of JAX that this one cannot read.
        ImportError: `flatbuffers` is not installed.
    """
    path = os.path.expanduser(path)
    try:
        with zipfile.ZipFile(path) as file:
            metadata = _read_metadata(file.read("metadata.json"))
            weights = _read_weights(file.read("weights.safetensors"))
            programs = {entry: file.read(entry) for entry in file.namelist() if entry.endswith(".bin")}
    except (zipfile.BadZipFile, KeyError, TypeError, ValueError, safetensors.SafetensorError) as error:
        raise ValueError(f"{path}: not an exported model, or a damaged one ({error})") from None
    _check_platform(path, metadata)
    try:
        functions = {
            entry.removesuffix(".bin"): jax_export.deserialize(bytearray(program))
            for entry, program in programs.items()
        }
    except (ValueError, NotImplementedError) as error:
        raise ValueError(
            f"{path}: jax {jax.__version__} cannot read what jax {metadata.jax_version} wrote; export the"
            f" model again ({error})"
        ) from None
    return ExportedMimi(metadata, jax.device_put(weights), functions)


def _read_metadata(text: bytes) -> Metadata:
    fields = json.loads(text)
    if (found := fields.pop("format")) != FORMAT:
        raise ValueError(f"format must be {FORMAT!r}, got {found!r}")
    fields["config"] = MimiConfig.from_dict(fields["config"])
    fields["platforms"] = tuple(fields["platforms"])
    return Metadata(**fields)


def _read_weights(data: bytes) -> Weights:
    """Do what `safetensors.numpy.load` does, which does not know bfloat16."""
    return {
        name: np.frombuffer(tensor["data"], DTYPES[tensor["dtype"]]).reshape(tensor["shape"])
        for name, tensor in safetensors.deserialize(data)
    }


def _check_platform(name: str, metadata: Metadata) -> None:
    if (platform := jax_export.default_export_platform()) not in metadata.platforms:
        raise ValueError(
            f"{name}: made for {', '.join(metadata.platforms)}, and this is {platform}; name that in"
            " platforms when you export"
        )


def _split(model: Mimi) -> tuple[Weights, Callable[[Weights], Mimi]]:
    """The parameters that are used, and the function that makes them the model again.

    The statistics of codebooks are left out. They are large, and only training reads them.
    """
    graph, statistics, parameters = nnx.split(model, CodebookStatistic, ...)
    structure = jax.tree.structure(parameters)
    # A name ends in "value", the field of the variable; in an int8 variable, values and scales come after it.
    weights = {
        name.removesuffix(".value"): np.ascontiguousarray(leaf)
        for name, leaf in named_leaves(parameters, ".").items()
    }

    def rebuild(given: Weights) -> Mimi:
        unused = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), statistics)
        return nnx.merge(graph, unused, jax.tree.unflatten(structure, [given[name] for name in weights]))

    return weights, rebuild


def _encoder_functions(model: Mimi, rebuild: Callable[[Weights], Mimi], metadata: Metadata) -> Functions:
    config, count, batch = metadata.config, metadata.num_quantizers, metadata.batch_size

    def inputs(frames: int) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
        """Audio and its mask."""
        num_samples = frames * config.frame_size
        audio = jax.ShapeDtypeStruct((batch, config.audio_channels, num_samples), jnp.float32)
        return audio, jax.ShapeDtypeStruct((batch, num_samples), bool)

    def run(weights: Weights, audio: jax.Array, mask: jax.Array) -> tuple[jax.Array, ...]:
        return tuple(encode(rebuild(weights), audio, mask, count))

    functions: Functions = {"encode": (run, inputs(metadata.frames))}
    if config.is_streamable:
        state, structure = jax.tree.flatten(jax.eval_shape(lambda: model.init_encoder_state(batch)))

        def step(weights: Weights, state: list, audio: jax.Array, mask: jax.Array, active: jax.Array):
            state = jax.tree.unflatten(structure, state)
            state, codes = encode_step(rebuild(weights), state, audio, mask, count, active)
            return jax.tree.leaves(state), codes

        functions["encode_step"] = step, (state, *inputs(1), jax.ShapeDtypeStruct((batch,), bool))
    return functions


def _decoder_functions(model: Mimi, rebuild: Callable[[Weights], Mimi], metadata: Metadata) -> Functions:
    config, batch = metadata.config, metadata.batch_size

    def codes_of(frames: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((batch, metadata.num_quantizers, frames), jnp.int32)

    def run(weights: Weights, codes: jax.Array, mask: jax.Array) -> jax.Array:
        return decode(rebuild(weights), codes, mask).audio_values

    mask = jax.ShapeDtypeStruct((batch, metadata.frames * config.frame_size), bool)
    functions: Functions = {"decode": (run, (codes_of(metadata.frames), mask))}
    if config.is_streamable:
        state, structure = jax.tree.flatten(jax.eval_shape(lambda: model.init_decoder_state(batch)))

        def step(weights: Weights, state: list, codes: jax.Array, active: jax.Array):
            state = jax.tree.unflatten(structure, state)
            state, audio = decode_step(rebuild(weights), state, codes, active)
            return jax.tree.leaves(state), audio

        functions["decode_step"] = step, (state, codes_of(1), jax.ShapeDtypeStruct((batch,), bool))
    return functions
