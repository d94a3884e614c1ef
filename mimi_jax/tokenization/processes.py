"""Which process this is, and how many there are: each process takes its own share of the shards."""

import functools
import os
from collections.abc import Mapping

import jax

# Variables that launchers set: the index of a process and the number of processes. JAX reads the same ones.
LAUNCHERS = (
    ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS"),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
)
# What makes the TPU runtime use the chips of this host alone. Else it waits for all hosts of the slice as it
# starts, and a host that is started again waits forever. A host of a slice of several has four chips.
THIS_HOST_ALONE = {
    "TPU_PROCESS_BOUNDS": "1,1,1",
    "TPU_CHIPS_PER_PROCESS_BOUNDS": "2,2,1",
    "TPU_WORKER_ID": "0",
    "TPU_WORKER_HOSTNAMES": "localhost",
}


def process_from_environment(environment: Mapping[str, str]) -> tuple[int, int]:
    """The index and number of processes, as SLURM, Open MPI or the TPUs of GKE set them.

    Args:
        environment: variables by name, such as `os.environ`.

    Returns:
        The index of this process and the number of processes; (0, 1) if no launcher is found.

    Raises:
        ValueError: a variable does not hold an integer.
    """
    for index, count in LAUNCHERS:
        if index in environment and count in environment:
            return _number(environment, index), _number(environment, count)
    if "TPU_WORKER_ID" in environment and "TPU_WORKER_HOSTNAMES" in environment:  # set by GKE
        return _number(environment, "TPU_WORKER_ID"), len(environment["TPU_WORKER_HOSTNAMES"].split(","))
    return 0, 1


def _number(environment: Mapping[str, str], name: str) -> int:
    try:
        return int(environment[name])
    except ValueError:
        raise ValueError(
            f"the variable {name} must be a whole number, got {environment[name]!r}; correct it, or name"
            " process_index and process_count"
        ) from None


def process_from_jax() -> tuple[int, int]:
    """The index and number of processes of `jax.distributed`; (0, 1) if it is not initialized."""
    if jax.distributed.is_initialized():
        return jax.process_index(), jax.process_count()
    return 0, 1


@functools.cache  # JAX finds the index in variables of the TPU runtime, and the first call changes those
def process_from_cluster() -> tuple[int, int]:
    """The index and number of processes, from where `jax.distributed.initialize` has them.

    These are slices of TPUs, SLURM, Open MPI and Kubernetes.
    `initialize` itself is not called. Its service needs all processes at each start, and ends them all when
    one dies. Nothing is exchanged here, so a process that was lost can begin again alone. On a slice of TPUs,
    the runtime is told to use only the chips of this host.

    Raises:
        ValueError: nothing tells of other processes, or what does is incomplete.
    """
    from jax._src.clusters import ClusterEnv  # there is no public way to ask without a connection

    if jax.distributed.is_initialized():
        return process_from_jax()
    try:
        # The coordinator's address and the devices are given, so that JAX does not look for them.
        _, count, index, _ = ClusterEnv.auto_detect_unset_distributed_params("", None, None, [], None, None)
    except (KeyError, RuntimeError) as error:
        raise ValueError(f"JAX cannot find out which process this is: {error}") from error
    if index is None or count is None:
        index, count = process_from_environment(os.environ)
        if count == 1:
            raise ValueError(
                "nothing tells JAX of other processes: this is no host of a TPU slice, and neither srun nor"
                " mpirun nor Kubernetes (which needs `pip install kubernetes`) started it; give process_index"
                " and process_count instead (--process-index, --process-count)"
            )
    if count > 1 and "TPU_PROCESS_BOUNDS" not in os.environ:
        os.environ.update(THIS_HOST_ALONE)
    return index, count
