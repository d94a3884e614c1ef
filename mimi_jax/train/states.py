"""The states of a run on disk: the newest ones, in Orbax folders, with the position in the data."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from mimi_jax.train.step import TrainState
from mimi_jax.train.weight_norm import NormalizedKernel
from mimi_jax.train.weights import Weights

KEPT = 2  # states


@contextlib.contextmanager
def open_states(folder: Path) -> Iterator[Any]:
    """Orbax's manager of the states in a folder, which is created if it does not exist."""
    import orbax.checkpoint as ocp

    options = ocp.CheckpointManagerOptions(max_to_keep=KEPT, create=True, enable_async_checkpointing=False)
    with ocp.CheckpointManager(folder.absolute(), options=options) as manager:
        yield manager


def save_state(manager: Any, state: TrainState, batches: Any) -> None:
    """Save a state, with the position of the Grain iterator `batches`."""
    import orbax.checkpoint as ocp

    items = ocp.args.Composite(
        state=ocp.args.StandardSave(state), data=ocp.args.JsonSave(batches.get_state())
    )
    manager.save(int(state.step), args=items)


def restore_state(manager: Any, step: int, like: TrainState, batches: Any) -> TrainState:
    """The state after `step` steps; `batches` is moved to its position.

    Args:
        like: a state with the same shapes, placed on devices as the result will be.
    """
    import orbax.checkpoint as ocp

    items = ocp.args.Composite(
        state=ocp.args.StandardRestore(jax.tree.map(ocp.utils.to_shape_dtype_struct, like)),
        data=ocp.args.JsonRestore(),
    )
    restored = manager.restore(step, args=items)
    batches.set_state(restored["data"])
    return restored["state"]


def read_discriminator(run: str | Path, like: Weights) -> Weights:
    """The discriminator of the newest state of a run.

    Args:
        run: its folder.
        like: a discriminator with the same shapes, placed on devices as the result will be.

    Raises:
        ValueError: the folder has no state with a discriminator, or its shapes differ.
    """
    import orbax.checkpoint as ocp

    state = _newest_state(Path(run))
    handler: Any = ocp.PyTreeCheckpointHandler()
    with contextlib.closing(handler):
        found = handler.metadata(state).tree["discriminator"] if state else {}
        if not found:
            raise ValueError(f"discriminator.init: {run} holds no run with a discriminator and a checkpoint")
        saved = {name: NormalizedKernel(**w) if isinstance(w, dict) else w for name, w in found.items()}
        if jax.tree.map(lambda x: x.shape, saved) != jax.tree.map(jnp.shape, like):
            raise ValueError(f"discriminator.init: the discriminator of {run} has other windows or filters")
        item = {"discriminator": like}
        # By default, arrays go to the devices that they were saved from, which may not be here.
        placed = ocp.checkpoint_utils.construct_restore_args(item)
        args = ocp.args.PyTreeRestore(item, restore_args=placed, partial_restore=True)
        return handler.restore(state, args=args)["discriminator"]


def _newest_state(run: Path) -> Path | None:
    """Where the newest state of a run is, if there is one."""
    folder = (run / "checkpoints").absolute()
    if not folder.is_dir():
        return None
    with open_states(folder) as manager:
        step = manager.latest_step()
    return None if step is None else folder / str(step) / "state"
