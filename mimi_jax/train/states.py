"""The states of a run on disk: the newest ones, in Orbax folders, with the position in the data."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax

from mimi_jax.train.step import TrainState

KEPT = 2  # states


@contextmanager
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
