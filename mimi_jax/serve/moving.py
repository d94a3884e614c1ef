"""Sessions on their way from one server to another.

A session that is moved is a safetensors file in memory, signed with a key that both servers have (HMAC of
SHA-256, in front). Its arrays are the states of its streams and its samples that do not make a frame yet. Its
metadata say what kind of session it is.
"""

import hashlib
import hmac
import json
from typing import Any, NamedTuple

import jax
import numpy as np
import safetensors.numpy

from mimi_jax.checkpoint.identity import model_id
from mimi_jax.files.arrays import differences, named_leaves
from mimi_jax.model import Mimi
from mimi_jax.streams.push import fresh_state

FORMAT = "mimi_jax.session"
SIGNATURE_BYTES = hashlib.sha256().digest_size


class Moved(NamedTuple):
    """A session between two servers."""

    kind: str  # "encode", "decode" or "loopback"
    options: dict[str, Any]  # of its address
    states: dict[str, Any]  # by half
    pending: np.ndarray  # float32 [channels, samples]
    codes: bytes  # of a code stream that do not make a frame yet
    num_received: int  # bytes of the client's stream that it has taken


def to_bytes(session: Moved, model: Mimi, num_quantizers: int, key: bytes) -> bytes:
    """A session, signed.

    Args:
        num_quantizers: codebooks of the server.
    """
    arrays = {name: np.asarray(leaf) for name, leaf in named_leaves(session.states, "/").items()}
    arrays |= {"pending": session.pending, "codes": np.frombuffer(session.codes, np.uint8)}
    about = {
        "kind": session.kind,
        "options": session.options,
        "received": session.num_received,
        "model": model_id(model, num_quantizers),
    }
    data = safetensors.numpy.save(
        {name: np.ascontiguousarray(array) for name, array in arrays.items()},
        {"format": FORMAT, "about": json.dumps(about)},
    )
    return hmac.digest(key, data, "sha256") + data


def from_bytes(data: bytes, model: Mimi, num_quantizers: int, key: bytes) -> Moved:
    """The session that `to_bytes` gave.

    Raises:
        ValueError: the signature is wrong, or the session is of another model or number of codebooks.
    """
    signature, data = data[:SIGNATURE_BYTES], data[SIGNATURE_BYTES:]
    if not hmac.compare_digest(signature, hmac.digest(key, data, "sha256")):
        raise ValueError("the session was not signed with the key of this server")
    size = int.from_bytes(data[:8], "little")
    about = json.loads(json.loads(data[8 : 8 + size])["__metadata__"]["about"])
    if about["model"] != model_id(model, num_quantizers):
        raise ValueError(
            "the session is of another model, or its server had another --num-quantizers than this one,"
            f" {num_quantizers}"
        )
    arrays = safetensors.numpy.load(data)
    pending, codes = arrays.pop("pending"), arrays.pop("codes").tobytes()
    halves = {name.split("/")[0] for name in arrays}
    like = {half: fresh_state(getattr(model, f"init_{half}_state"), 1) for half in halves}
    expected = named_leaves(like, "/")
    if problems := differences(arrays, expected):
        raise ValueError(f"the session does not fit this server: {'; '.join(problems)}")
    states = jax.tree.unflatten(jax.tree.structure(like), [arrays[name] for name in expected])
    return Moved(about["kind"], about["options"], states, pending, codes, about["received"])
