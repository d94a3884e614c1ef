"""Fused attention of accelerators. Arguments and results are those of `mimi_jax.ops.attention`."""

import math
from typing import Any

import jax
import jax.numpy as jnp

CUDNN_HEAD_DIMS = range(8, 129, 8)  # on every GPU; cuDNN refuses others


def cudnn_attention(query, key, value, *, window):
    """cuDNN's flash attention: NVIDIA GPUs from Ampere on, in bfloat16 or float16."""
    # Its window does not count the query's own key; without `is_causal` it may see the future (jax #39576).
    return jax.nn.dot_product_attention(
        query, key, value, is_causal=True, local_window_size=(window - 1, 0), implementation="cudnn"
    )


def splash_attention(query, key, value, *, window, interpret=False):
    """The Pallas device kernel for TPUs. `interpret` runs it on any machine, slowly.

    The compiler cannot partition it. On several chips, call it inside `shard_map` with `check_vma=False`,
    since the kernel does not say how its results differ between devices.
    """
    # Imported here: Pallas takes a second to import, and only TPUs need it.
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        BlockSizes,
        LocalMask,
        MultiHeadMask,
        make_splash_mha_single_device,
    )

    _, time, heads, head_dim = query.shape
    sizes = BlockSizes.get_default()
    after = -time % sizes.block_q  # padding comes last, so no real query sees it
    query, key, value = (
        jnp.swapaxes(jnp.pad(x, ((0, 0), (0, after), (0, 0), (0, 0))), 1, 2)
        for x in (query / math.sqrt(head_dim), key, value)
    )
    mask = MultiHeadMask([LocalMask((time + after, time + after), (window - 1, 0), 0)] * heads)
    kernel = make_splash_mha_single_device(mask, block_sizes=sizes, interpret=interpret)
    out: Any = jax.vmap(kernel)(query, key, value)  # an array, unless it is asked for residuals too
    return jnp.swapaxes(out, 1, 2)[:, :time]
