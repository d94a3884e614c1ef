"""What the codes of a model mean: their identity, their `CodeSpec`, and which bundled model made them."""

import hashlib

import numpy as np

from mimi_jax.checkpoint.find import bundled_models
from mimi_jax.checkpoint.parameters import parameters
from mimi_jax.checkpoint.pretrained import load
from mimi_jax.files.codes import CodeSpec
from mimi_jax.model import Mimi
from mimi_jax.nn.quantizer import CodebookStatistic


def model_id(model: Mimi, num_quantizers: int | None = None) -> str:
    """16 hexadecimal digits that identify what the model's codes mean: a hash of its quantizer's weights.

    The encoder and the decoder do not count. So half a model has the identity of the whole model, and a
    decoder that was fine-tuned on frozen codes keeps its identity. Codebooks that are not used do not count
    either: codes of the first 8 codebooks have the same identity from a model of 8 and from a model of 32.

    Args:
        num_quantizers: how many codebooks the codes are of, the first ones; None for all.

    Raises:
        ValueError: the model does not have that many codebooks, or they do not include the semantic ones.
    """
    quantizer = model.quantizer
    num_acoustic = quantizer.resolve_count(num_quantizers) - quantizer.num_semantic
    # The hash covers the names as tuples, such as ('quantizer', 'acoustic', 'cluster_usage').
    places = {str(tuple(name.split("."))): parameter for name, parameter in parameters(model).items()}
    digest = hashlib.sha256()
    for place, parameter in sorted(places.items()):
        if place.startswith("('quantizer', "):
            array = np.ascontiguousarray(parameter[...])
            if "'acoustic'" in place and isinstance(parameter, CodebookStatistic):
                array = array[:num_acoustic]
            digest.update(f"{place} {array.dtype} {array.shape}".encode())
            digest.update(array.data)
    return digest.hexdigest()[:16]


def code_spec(model: Mimi, num_quantizers: int | None = None) -> CodeSpec:
    """What a code file says of the model's codes.

    Args:
        num_quantizers: how many codebooks the codes are of, the first ones; None for all.

    Raises:
        ValueError: as for `model_id`.
    """
    config = model.config
    return CodeSpec(
        model_id=model_id(model, num_quantizers),
        sampling_rate=config.sampling_rate,
        frame_size=config.frame_size,
        codebook_size=config.codebook_size,
        num_codebooks=model.quantizer.resolve_count(num_quantizers),
    )


def check_same_codes(spec: CodeSpec, model: Mimi) -> None:
    """Check that codes with this spec mean the same to the model, so that it can decode them.

    Raises:
        ValueError: the model has fewer codebooks, or it is another model than the one that made the codes.
    """
    count = model.config.num_quantizers
    if spec.num_codebooks > count:
        raise ValueError(f"the codes have {spec.num_codebooks} codebooks, but the model has only {count}")
    expected = code_spec(model, spec.num_codebooks)
    for field in ("model_id", "sampling_rate", "frame_size", "codebook_size"):
        if (found := getattr(spec, field)) != (value := getattr(expected, field)):
            raise ValueError(
                f"another model made the codes: their {field} is {found}, that of the model {value}"
            )


def bundled_with(spec: CodeSpec) -> str | None:
    """The name of the bundled model that makes such codes; None where no bundled model does."""
    for name in bundled_models():
        model = load(name, decoder=False)
        if spec.num_codebooks <= model.config.num_quantizers and spec == code_spec(model, spec.num_codebooks):
            return name
    return None
