"""Random, well-conditioned reference models in PyTorch, for parity tests without a download.

A freshly initialised `transformers.MimiModel` is a poor reference: its codebooks are all zeros, its
LayerScales hide the Transformers, and its norms are the identity. Here every parameter is random and
has an effect, and the codebooks fit the latents, so that each level reduces the residual.
`moshi_model_from` puts the same weights into Kyutai's own implementation.
"""

import math
import re
from typing import Any

import torch
from moshi.models.compression import MimiModel as MoshiModel
from moshi.models.loaders import get_mimi
from transformers import MimiConfig, MimiModel
from transformers.activations import ACT2FN

CALIBRATION_FRAMES = 640
LEVEL_FRAMES = 50  # enough to measure the decoder's loudness
AUDIO_STD = 0.1
SHRINKS = (1.0, 0.85, 0.7, 0.6, 0.5, 0.4, 0.3, 0.25, 0.2, 0.15, 0.1)

# Module names of transformers 5.23 -> flat names of published checkpoints, in order.
FLAT_NAMES = (
    (r"^encoder\.encoder_seanet\.", "encoder."),
    (r"^decoder\.decoder_seanet\.", "decoder."),
    (r"^(?:en|de)coder\.((?:en|de)coder_transformer|downsample|upsample)\.", r"\1."),
)

# Flat names of transformers -> Kyutai's names, in order.
KYUTAI_NAMES = (
    (r"^(encoder|decoder)\.layers\.", r"\1.model."),
    (r"^(downsample)\.conv\.", r"\1.conv.conv.conv."),
    (r"^(upsample)\.conv\.", r"\1.convtr.convtr.convtr."),
    (r"^((?:en|de)coder\.model\..*)conv\.", r"\1conv.conv."),
    (r"^((?:en|de)coder_transformer)\.", r"\1.transformer."),
    (r"self_attn\.o_proj", "self_attn.out_proj"),
    (r"input_layernorm", "norm1"),
    (r"post_attention_layernorm", "norm2"),
    (r"self_attn_layer_scale", "layer_scale_1"),
    (r"mlp_layer_scale", "layer_scale_2"),
    (r"mlp\.fc", "linear"),
    (r"semantic_residual_vector_quantizer", "rvq_first"),
    (r"acoustic_residual_vector_quantizer", "rvq_rest"),
    (r"\.layers\.(\d+)\.codebook\.", r".vq.layers.\1._codebook."),
    (r"initialized$", "_initialized"),
    (r"embed_sum$", "embedding_sum"),
)


def speech_like(
    num_samples: int, frame_size: int, seed: int, *, batch_size: int = 1, channels: int = 1
) -> torch.Tensor:
    """A voiced sound with a gliding pitch and a changing loudness, plus noise; different in each row.

    The pitch changes in units of samples (96 to 300 Hz at 24 kHz) and the loudness in units of frames,
    so that full-size and tiny models both see a signal that changes from frame to frame.

    Args:
        num_samples: length of each row.
        frame_size: samples in a frame of the model.
        seed: of all random numbers.
        batch_size: rows.
        channels: of each row.

    Returns:
        float32 [batch_size, channels, num_samples], in [-1, 1], standard deviation about 0.15.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = (batch_size, channels, 1)

    def uniform(low: float, high: float) -> torch.Tensor:
        return low + (high - low) * torch.rand(rows, generator=generator, dtype=torch.float64)

    def slow_wave() -> torch.Tensor:
        """A sine with a period of 3 to 9 frames."""
        return torch.sin(2 * math.pi * (time / (uniform(3, 9) * frame_size) + uniform(0, 1)))

    time = torch.arange(num_samples, dtype=torch.float64)
    frequency = (1 + 0.2 * slow_wave()) / uniform(100, 200)
    phase = 2 * math.pi * frequency.cumsum(-1)
    audio = 0.3 * torch.randn((*rows[:2], num_samples), generator=generator, dtype=torch.float64)
    for harmonic in range(1, 25):
        audio = audio + (1 + slow_wave()) / harmonic**0.7 * torch.sin(harmonic * phase)
    audio = audio * (1.2 + slow_wave())
    audio = 0.15 * audio / audio.std(-1, keepdim=True)
    return audio.clamp(-1, 1).float()


def random_transformers_model(config: dict, seed: int, audio: torch.Tensor | None = None) -> MimiModel:
    """Build a random reference model whose every part contributes to its output.

    Args:
        config: keyword arguments of `transformers.MimiConfig`.
        seed: of all weights, and of the default `audio`.
        audio: float32 [batch, channels, samples], to which codebooks and output level are
            fitted; by default a `speech_like` signal of 640 frames. The frames should outnumber
            the dimensions of a codebook at least twice.

    Returns:
        A float32 model in evaluation mode. Codebooks are stored as `embed_sum` with a random
        `cluster_usage`; audio decoded from the codes of `audio` has a standard deviation near 0.1.
    """
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model: Any = MimiModel(MimiConfig(**config)).eval()
        _randomize(model)
        if audio is None:
            frame_size = samples_per_frame(model.config)
            channels = model.config.audio_channels
            length = CALIBRATION_FRAMES // 2 * frame_size
            audio = speech_like(length, frame_size, seed, batch_size=2, channels=channels)
        latents = encode_latents(model, audio)
        for quantizer in _split_quantizers(model):
            _fit_codebooks(quantizer, latents)
        codes = model.quantizer.encode(latents).transpose(0, 1)
        level = model.decode(codes[..., :LEVEL_FRAMES]).audio_values.std()
        for parameter in model.decoder.decoder_seanet.layers[-1].parameters():
            parameter.mul_(AUDIO_STD / level)
    return model


def samples_per_frame(config: MimiConfig) -> int:
    """Samples in a frame. Unlike `config.frame_size`, this is right for an explicit frame rate."""
    return math.prod(config.upsampling_ratios or ()) * config.latent_stride


def encode_latents(model: MimiModel, audio: torch.Tensor) -> torch.Tensor:
    """The latents before quantization, float32 [batch, hidden_size, frames]."""
    encoder: Any = model.encoder
    return encoder(audio).latents


def code_gaps(model: MimiModel, latents: torch.Tensor) -> torch.Tensor:
    """How clearly each code was chosen: the second smallest distance to the codebook minus the smallest.

    The unit is the norm of the vector that enters the residual quantizer, because the rounding errors
    of every level are relative to it. A code whose gap is within rounding may differ between platforms.

    Args:
        model: gives the codebooks.
        latents: float32 [batch, hidden_size, frames], from `encode_latents`.

    Returns:
        float64 [batch, codebooks, frames], in the order of `audio_codes`.
    """
    gaps = []
    for quantizer in _split_quantizers(model):
        residual = latents if quantizer.input_proj is None else quantizer.input_proj(latents)
        residual = residual.transpose(1, 2)
        norm = residual.double().norm(dim=-1)
        for layer in quantizer.layers:
            codebook = layer.codebook
            distances = torch.cdist(residual.double(), codebook.embed.double()[None])
            best, second = distances.topk(2, largest=False).values.unbind(-1)
            gaps.append((second - best) / norm)
            residual = residual - codebook.decode(codebook.encode(residual))
    return torch.stack(gaps, dim=1)


def _split_quantizers(model: MimiModel) -> list[Any]:
    split = model.quantizer
    return [split.semantic_residual_vector_quantizer, split.acoustic_residual_vector_quantizer]


def _randomize(model: MimiModel) -> None:
    """Replace what transformers initialises to constants, or to values that are too small for its width."""
    for name, parameter in model.named_parameters():
        if "layer_scale" in name:
            parameter.uniform_(0.1, 0.4)
        elif "layernorm" in name:
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
        elif "transformer" in name and name.endswith("bias"):
            parameter.normal_(std=0.2)
        elif "transformer" in name:
            parameter.normal_(std=(2 / parameter.shape[1]) ** 0.5)


def _fit_codebooks(quantizer: Any, latents: torch.Tensor) -> None:
    """Give each level of a residual quantizer a random codebook that fits its residual.

    The entries are random mixtures of half of the residual vectors, so they have the same mean and
    covariance. They are moved towards the mean by the factor that fits the other half best.
    """
    if quantizer.input_proj is not None:
        latents = quantizer.input_proj(latents)
    residual = latents.transpose(1, 2).flatten(0, 1)
    for layer in quantizer.layers:
        codebook = layer.codebook
        basis, probe = residual.chunk(2)
        mean = basis.mean(0)
        mixing = torch.randn(codebook.codebook_size, len(basis)) / len(basis) ** 0.5
        spread = mixing @ (basis - mean)
        shrink = min(SHRINKS, key=lambda s: torch.cdist(probe, mean + s * spread).amin(1).sum())
        codebook.cluster_usage.uniform_(0.5, 50)
        codebook.embed_sum.copy_((mean + shrink * spread) * codebook.cluster_usage[:, None])
        codebook._embed = None  # drop the cached codebook, if any
        residual = residual - codebook.decode(codebook.quantize(residual))


def flat_state(model: MimiModel) -> dict[str, torch.Tensor]:
    """A model's tensors under the names of published transformers checkpoints."""
    return {_rename(name, FLAT_NAMES): tensor for name, tensor in model.state_dict().items()}


def kyutai_state(model: MimiModel) -> dict[str, torch.Tensor]:
    """A model's tensors in the layout of Kyutai's released file.

    There q, k and v are one tensor, and the rows of q and k are in the order of interleaved rotary pairs.
    """
    decoder: Any = model.decoder
    last = len(decoder.decoder_seanet.layers) - 1
    transposed = (
        rf"^decoder\.layers\.(?!0\.|{last}\.)(\d+)\.conv",
        r"decoder.model.\1.convtr.convtr",
    )
    rules = (transposed, *KYUTAI_NAMES)
    state = {_rename(name, rules): tensor for name, tensor in flat_state(model).items()}
    heads = model.config.num_attention_heads
    for name in [name for name in state if name.endswith("q_proj.weight")]:
        prefix = name.removesuffix("q_proj.weight")
        q, k, v = (state.pop(f"{prefix}{part}_proj.weight") for part in "qkv")
        q, k = (_interleave_pairs(weight, heads) for weight in (q, k))
        state[f"{prefix}in_proj_weight"] = torch.cat([q, k, v])
    return state


def moshi_model_from(model: MimiModel) -> MoshiModel:
    """Build Kyutai's implementation with the weights of a transformers model.

    Args:
        model: causal, with as many key-value heads as heads, norm_eps 1e-5 and trim_right_ratio 1.
            moshi supports nothing else.

    Returns:
        A float32 model in evaluation mode, all codebooks active.

    Raises:
        RuntimeError: names or shapes of the weights do not fit moshi's model.
    """
    config = model.config
    moshi = get_mimi(None, _moshi_config(config), num_codebooks=config.num_quantizers)
    moshi.load_state_dict(kyutai_state(model), strict=True)
    return moshi


def _moshi_config(config: Any) -> dict:
    width = config.hidden_size
    seanet = {
        "channels": config.audio_channels,
        "dimension": width,
        "causal": config.use_causal_conv,
        "n_filters": config.num_filters,
        "n_residual_layers": config.num_residual_layers,
        "activation": "ELU",
        "compress": config.compress,
        "dilation_base": config.dilation_growth_rate,
        "kernel_size": config.kernel_size,
        "residual_kernel_size": config.residual_kernel_size,
        "last_kernel_size": config.last_kernel_size,
        "norm": "none",
        "pad_mode": config.pad_mode,
        "ratios": config.upsampling_ratios,
        "true_skip": not config.use_conv_shortcut,
    }
    transformer = {
        "d_model": width,
        "num_heads": config.num_attention_heads,
        "num_layers": config.num_hidden_layers,
        "causal": True,
        "layer_scale": config.layer_scale_initial_scale,
        "context": config.sliding_window,
        "conv_layout": True,
        "max_period": config.rope_parameters["rope_theta"],
        "gating": "none",
        "norm": "layer_norm",
        "activation": ACT2FN[config.hidden_act],
        "positional_embedding": "rope",
        "dim_feedforward": config.intermediate_size,
        "input_dimension": width,
        "output_dimensions": [width],
    }
    quantizer = {
        "dimension": config.codebook_dim,
        "n_q": config.num_quantizers,
        "n_q_semantic": config.num_semantic_quantizers,
        "bins": config.codebook_size,
        "input_dimension": width,
        "output_dimension": width,
    }
    return {
        "channels": config.audio_channels,
        "sample_rate": config.sampling_rate,
        "frame_rate": config.frame_rate,
        "seanet": seanet,
        "transformer": transformer,
        "quantizer": quantizer,
    }


def _interleave_pairs(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Reorder the rows of each head from (first halves, second halves) to pairs."""
    rows, columns = weight.shape
    halves = weight.view(heads, 2, rows // heads // 2, columns)
    return halves.transpose(1, 2).reshape(rows, columns)


def _rename(name: str, rules: tuple[tuple[str, str], ...]) -> str:
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name
