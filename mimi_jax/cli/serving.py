"""mimi-jax serve."""

import argparse
import logging
import os
import sys
from pathlib import Path

from mimi_jax.cli.checks import UsageError, check_installed

TOKEN = "MIMI_JAX_TOKEN"
FEWEST_KEY_BYTES = 16


def run_serve(arguments: argparse.Namespace) -> None:
    check_installed("serve", "prometheus_client", "starlette", "uvicorn", "uvloop", "websockets")
    rows = arguments.rows
    if rows & (rows - 1):
        raise UsageError(f"--rows must be a power of two, such as 64, got {rows}")
    if not 0 <= arguments.port < 2**16:
        raise UsageError(f"--port must be from 0 to 65535, got {arguments.port}")
    token = _secret(arguments.token_file) if arguments.token_file else os.environ.get(TOKEN, "").encode()
    if not token.isascii():
        raise UsageError("a token must be ASCII, as HTTP headers are; openssl rand -hex 16 makes one")
    key = _secret(arguments.key_file) if arguments.key_file else None
    if key is not None and len(key) < FEWEST_KEY_BYTES:
        raise UsageError(
            f"{arguments.key_file}: a key must have at least {FEWEST_KEY_BYTES} bytes, got {len(key)}"
        )

    import functools

    import uvloop

    from mimi_jax.model import Mimi
    from mimi_jax.serve.app import serve_until_signal
    from mimi_jax.serve.limits import LOOPBACK, Access, Limits
    from mimi_jax.streams.pool import Pool

    host = arguments.host
    is_local = host in LOOPBACK
    if not is_local and not token:
        print(f"{host} is open to others, and no token is set; see --token-file", file=sys.stderr)
    # Elsewhere, a token protects better than a name.
    names = tuple(map(str.lower, arguments.allow_host))
    hosts = (*LOOPBACK, host, *names) if is_local or names else ()
    model = Mimi.from_pretrained(arguments.model)
    config = model.config
    shown = f"[{host}]" if ":" in host else host
    logging.disable(logging.NOTSET)  # what goes wrong from here on is for the operator
    print(f"compiling the steps of 1{f' to {rows}' if rows > 1 else ''} streams", file=sys.stderr)
    uvloop.run(
        serve_until_signal(
            lambda port: print(f"http://{shown}:{port}/  (Ctrl-C to stop)", flush=True),
            make_pool=functools.partial(Pool, model, rows, arguments.num_quantizers),
            frame_seconds=config.frame_size / config.sampling_rate,
            host=host,
            port=arguments.port,
            limits=Limits(idle_seconds=arguments.idle_seconds, total_seconds=arguments.total_seconds),
            access=Access(token.decode() or None, hosts, tuple(arguments.allow_origin)),
            key=key,
        )
    )


def _secret(path: Path) -> bytes:
    if not (secret := path.read_bytes().strip()):
        raise ValueError(f"{path}: the file is empty")
    return secret
