"""The work of a clip: FLOPs of the matrix products that encoding and decoding it need."""

import math

from mimi_jax import MimiConfig


def count_flops(config: MimiConfig, seconds: float, codebooks: int) -> dict[str, int]:
    """FLOPs of "encode" and of "decode" for one clip; a multiply-add counts as two."""
    return {
        direction: sum(parts.values()) for direction, parts in count_parts(config, seconds, codebooks).items()
    }


def count_parts(config: MimiConfig, seconds: float, codebooks: int) -> dict[str, dict[str, int]]:
    """The same, by part of the network: "convolutions", "Transformer" and "RVQ"."""
    frames = math.ceil(round(seconds * config.sampling_rate) / config.frame_size)
    steps, size, dim = frames * config.latent_stride, config.hidden_size, config.codebook_dim
    projections = 2 * frames * size * dim if dim != size else 0  # of the semantic and the acoustic quantizer
    distances = frames * codebooks * config.codebook_size * dim
    resampling = 2 * steps * size * size  # its kernel is two strides long
    sizes = config.kernel_size, config.last_kernel_size
    transformer = transformer_products(config, steps)
    encode = seanet_products(config, steps, *sizes) + resampling
    decode = seanet_products(config, steps, *reversed(sizes)) + resampling // config.upsample_groups
    return {
        "encode": {
            "convolutions": 2 * encode,
            "Transformer": 2 * transformer,
            "RVQ": 2 * (projections + distances),
        },
        "decode": {"convolutions": 2 * decode, "Transformer": 2 * transformer, "RVQ": 2 * projections},
    }


def seanet_products(config: MimiConfig, steps: int, outer_kernel: int, inner_kernel: int) -> int:
    """Multiply-adds of the SEANet encoder or decoder.

    Args:
        steps: of 25 Hz.
        outer_kernel: the size of the kernel next to the waveform.
        inner_kernel: the size of the kernel next to the Transformer.
    """
    channels, time = config.num_filters, steps * math.prod(config.upsampling_ratios)
    total = time * outer_kernel * config.audio_channels * channels
    for ratio in reversed(config.upsampling_ratios):
        block = (config.residual_kernel_size + 1) * channels * (channels // config.compress)
        block += channels * channels * config.use_conv_shortcut
        total += time * config.num_residual_layers * block
        total += time * 2 * channels * (2 * channels)  # time / ratio outputs, and a kernel of two ratios
        channels, time = 2 * channels, time // ratio
    return total + steps * inner_kernel * channels * config.hidden_size


def transformer_products(config: MimiConfig, steps: int) -> int:
    """Multiply-adds of all layers of one Transformer. A query counts only the keys that it sees."""
    size, window = config.hidden_size, config.sliding_window
    head_dim = config.head_dim or size // config.num_attention_heads
    queries, keys = config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim
    linear = 2 * size * queries + 2 * size * keys + 2 * size * config.intermediate_size
    seen = sum(min(step + 1, window) for step in range(steps))
    return config.num_hidden_layers * (steps * linear + 2 * seen * queries)
