"""The compiled programs of a model on all devices of this process.

Nothing here waits for a device: each call gives it work and returns at once. Only `fetch` waits.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mimi_jax.model import Mimi, encode, encode_step
from mimi_jax.nn.streaming import is_real, select_rows

ROWS = PartitionSpec("rows")


class Programs:
    """A model that encodes batches. The devices share the rows of each batch.

    Args:
        model: a codec that can stream. Its decoder is not needed.
        num_quantizers: how many codebooks to use, counted from the first.
        devices: the devices that share the rows. None for all of this process.

    Raises:
        ValueError: the model cannot stream, has no encoder or too few codebooks, or its codes do not fit in
            16 bits.
    """

    def __init__(self, model: Mimi, num_quantizers: int, devices: list[Any] | None = None):
        devices = jax.local_devices() if devices is None else devices
        if model.config.codebook_size > 2**16:
            raise ValueError(
                f"codebook_size must be at most 65536, since codes are stored in 16 bits, got"
                f" {model.config.codebook_size}"
            )
        self.config, self.num_devices = model.config, len(devices)
        self._num_quantizers = model.quantizer.resolve_count(num_quantizers)
        self._mesh = Mesh(np.array(devices), *ROWS)
        self._by_row = NamedSharding(self._mesh, ROWS)
        self._everywhere = NamedSharding(self._mesh, PartitionSpec())
        self._parameters, self._structure = jax.tree.flatten(jax.device_put(model, self._everywhere))
        self._init_state = jax.jit(model.init_encoder_state, static_argnums=0, out_shardings=self._by_row)
        self._select = jax.jit(
            lambda state, rows: jax.tree.map(lambda x: x[rows], state), out_shardings=self._by_row
        )

    def encode(self, audio: np.ndarray, lengths: np.ndarray) -> jax.Array:
        """Encode whole clips: float32 [rows, channels, samples], int32 [rows] -> a batch for `fetch`."""
        inputs = jax.device_put((audio, lengths), self._by_row)
        codes = _encode(self._num_quantizers, self._mesh, self._structure, self._parameters, *inputs)
        return _sent(codes)

    def init_state(self, num_rows: int) -> Any:
        """The state of `num_rows` rows in which no clip has begun."""
        return self._init_state(num_rows)

    def encode_step(
        self, state: Any, audio: np.ndarray, lengths: np.ndarray, is_new: np.ndarray
    ) -> tuple[Any, jax.Array]:
        """Encode the next chunk of each row. Rows in which a new clip begins forget their state first.

        Args:
            state: it must not be used again.
            audio: float32 [rows, channels, samples].
            lengths: int32 [rows], the real samples of each row.
            is_new: bool [rows].

        Returns:
            The new state, and a batch for `fetch`.
        """
        inputs = jax.device_put((audio, lengths, is_new), self._by_row)
        state, codes = _encode_step(
            self._num_quantizers, self._mesh, self._structure, self._parameters, state, *inputs
        )
        return state, _sent(codes)

    def select(self, state: Any, rows: list[int]) -> Any:
        """The state of some rows of a batch."""
        return self._select(state, jax.device_put(np.array(rows), self._everywhere))

    def fetch(self, codes: jax.Array) -> np.ndarray:
        """Wait for a batch: uint16 [rows, codebooks, frames]."""
        return jax.device_get(codes)


def _sent(codes: jax.Array) -> jax.Array:
    """Let the codes come to the host as soon as they are there."""
    codes.copy_to_host_async()
    return codes


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _encode(
    num_quantizers: int, mesh: Mesh, structure: Any, parameters: list, audio: jax.Array, lengths: jax.Array
) -> jax.Array:
    """Encode whole clips: audio [rows, channels, samples] -> uint16 codes [rows, codebooks, frames]."""

    def code(parameters: list, audio: jax.Array, lengths: jax.Array) -> jax.Array:
        model = jax.tree.unflatten(structure, parameters)
        codes = encode(model, audio, is_real(lengths, audio.shape[2]), num_quantizers).audio_codes
        return codes.astype(jnp.uint16)

    return _on_each_device(code, mesh)(parameters, audio, lengths)


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=4)
def _encode_step(
    num_quantizers: int,
    mesh: Mesh,
    structure: Any,
    parameters: list,
    state: Any,
    audio: jax.Array,
    lengths: jax.Array,
    is_new: jax.Array,
) -> tuple[Any, jax.Array]:
    """Encode the next chunk of each row. Rows in which a new clip begins forget their state first."""

    def code(parameters: list, state: Any, audio: jax.Array, lengths: jax.Array, is_new: jax.Array) -> tuple:
        model = jax.tree.unflatten(structure, parameters)
        state = select_rows(is_new, jax.tree.map(jnp.zeros_like, state), state)
        state, codes = encode_step(model, state, audio, is_real(lengths, audio.shape[2]), num_quantizers)
        return state, codes.astype(jnp.uint16)

    return _on_each_device(code, mesh)(parameters, state, audio, lengths, is_new)


def _on_each_device(code: Callable, mesh: Mesh) -> Callable:
    """Run a function on each device with its own rows.

    The compiler cannot divide the device kernels for TPUs among devices, so this is done by hand.
    """

    def call(parameters: list, *by_row: Any) -> Any:
        specs = PartitionSpec(), *[ROWS] * len(by_row)
        # `check_vma` needs to know how results vary between devices, which the device kernels do not tell.
        return jax.shard_map(code, mesh=mesh, in_specs=specs, out_specs=ROWS, check_vma=False)(
            parameters, *by_row
        )

    return call
