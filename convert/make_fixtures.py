"""Write tests/fixtures: tiny random models with what the references compute from them.

Run `python -m convert.make_fixtures` from the root of the repository; it gives the same bytes
each time. Tests that read the files need neither torch nor the references.

A file `NAME.safetensors` holds, besides `config` (a config.json) in its metadata:
    weights/<name>    the model, under the names of published transformers checkpoints
    kyutai/<name>     the same model in the layout of Kyutai's file (`kyutai.safetensors` only)
    audio/<i>         float32 [batch, channels, samples], clip `i`
    latents/<i>       float32 [batch, frames, hidden_size], before quantization
    audio_codes/<i>   int32 [batch, codebooks, frames]
    audio_values/<i>  float32 [batch, channels, samples], decoded from the codes, not trimmed
The outputs are those of transformers, in `kyutai.safetensors` those of moshi.
"""

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save_file
from transformers import MimiConfig, MimiModel

from convert.reference_models import (
    code_gaps,
    encode_latents,
    flat_state,
    kyutai_state,
    moshi_model_from,
    random_transformers_model,
    samples_per_frame,
    speech_like,
)

FIXTURES = Path("tests/fixtures")
MIMI_FIELDS = {"model_type", *MimiConfig.__annotations__}

# Codes chosen this clearly are the same on every platform in float32.
MIN_GAP = 5e-4

TINY = {
    "hidden_size": 16,
    "num_filters": 2,
    "upsampling_ratios": [4, 2],
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 24,
    "sliding_window": 5,
    "codebook_size": 16,
    "codebook_dim": 8,
    "vector_quantization_hidden_dimension": 8,
    "num_quantizers": 4,
    "upsample_groups": 16,
}

CASES = {
    "base": {"num_hidden_layers": 2},
    "shortcut": {
        "use_conv_shortcut": True,
        "num_residual_layers": 2,
        "dilation_growth_rate": 3,
        "compress": 1,
    },
    "gqa": {"num_key_value_heads": 1, "head_dim": 6, "attention_bias": True},
    "stereo": {"audio_channels": 2},
    "noncausal": {"use_causal_conv": False, "upsampling_ratios": [5, 2]},
    "replicate": {"pad_mode": "replicate"},
    "trim": {"trim_right_ratio": 0.5, "upsampling_ratios": [5, 3]},
    "no_projection": {"codebook_dim": 16, "vector_quantization_hidden_dimension": 16},
    "semantic2": {"num_semantic_quantizers": 2},
    "groups1": {"upsample_groups": 1},
    "groups4": {"upsample_groups": 4},
    "activation": {"hidden_act": "gelu_new", "rope_theta": 300.0, "norm_eps": 1e-2},
    "kernels": {"kernel_size": 4, "last_kernel_size": 5, "residual_kernel_size": 2},
    "slow_frames": {"frame_rate": 750.0},
}


def main() -> None:
    torch.set_num_threads(1)  # the order of additions must not depend on the machine's load
    FIXTURES.mkdir(parents=True, exist_ok=True)
    for name, changes in CASES.items():
        batch_size = 2 if name == "base" else 1
        write_case(name, changes, whole_frames=False, batch_size=batch_size)
    write_case("kyutai", {}, whole_frames=True, batch_size=2)


@torch.no_grad()
def write_case(name: str, changes: dict, *, whole_frames: bool, batch_size: int) -> None:
    """Write the first seed's model whose codes are all clear; print its seed, gap and size."""
    for seed in itertools.count():
        model = random_transformers_model({**TINY, **changes}, seed)
        clips = make_clips(model.config, seed, whole_frames=whole_frames, batch_size=batch_size)
        gap = min(code_gaps(model, encode_latents(model, clip)).min().item() for clip in clips)
        if gap > MIN_GAP:
            break
    tensors = {f"weights/{key}": tensor for key, tensor in flat_state(model).items()}
    if name == "kyutai":
        tensors |= {f"kyutai/{key}": tensor for key, tensor in kyutai_state(model).items()}
        outputs = [moshi_outputs(model, clip) for clip in clips]
    else:
        outputs = [transformers_outputs(model, clip) for clip in clips]
    for index, (clip, output) in enumerate(zip(clips, outputs, strict=True)):
        clip_tensors = {"audio": clip, **output}
        tensors |= {f"{key}/{index}": tensor for key, tensor in clip_tensors.items()}
    arrays = {key: np.ascontiguousarray(tensor.numpy()) for key, tensor in tensors.items()}
    path = FIXTURES / f"{name}.safetensors"
    save_file(arrays, path, metadata={"config": json.dumps(config_fields(model.config))})
    print(f"{name:14} seed {seed:3}  gap {gap:.1e}  {path.stat().st_size:6} bytes")


def make_clips(config: MimiConfig, seed: int, *, whole_frames: bool, batch_size: int) -> list[torch.Tensor]:
    """A clip six attention windows long and shorter ones, of partial frames where allowed."""
    frame_size = samples_per_frame(config)
    lengths = [16 * frame_size, 7 * frame_size]
    if not whole_frames:
        lengths = [16 * frame_size, 7 * frame_size + frame_size // 2 - 1, 3]
    return [
        speech_like(
            length,
            frame_size,
            seed=1000 * (index + 1) + seed,
            batch_size=batch_size,
            channels=config.audio_channels,
        )
        for index, length in enumerate(lengths)
    ]


def transformers_outputs(model: Any, audio: torch.Tensor) -> dict[str, torch.Tensor]:
    codes = model.encode(audio).audio_codes
    return {
        "latents": encode_latents(model, audio).transpose(1, 2),
        "audio_codes": codes.int(),
        "audio_values": model.decode(codes).audio_values,
    }


def moshi_outputs(model: MimiModel, audio: torch.Tensor) -> dict[str, torch.Tensor]:
    moshi = moshi_model_from(model)
    codes = moshi.encode(audio)
    return {
        "latents": moshi.encode_to_latent(audio, quantize=False).transpose(1, 2),
        "audio_codes": codes.int(),
        "audio_values": moshi.decode(codes),
    }


def config_fields(config: MimiConfig) -> dict:
    """What config.json says about Mimi, without what every transformers config repeats."""
    fields = {key: value for key, value in config.to_dict().items() if key in MIMI_FIELDS}
    if config._frame_rate is not None:
        fields["frame_rate"] = config._frame_rate
    return fields


if __name__ == "__main__":
    main()
