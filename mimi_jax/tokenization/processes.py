"""Which process this is, and how many there are: each process takes its own share of the shards."""

from collections.abc import Mapping

import jax

# Variables that launchers set: the index of a process and the number of processes. JAX reads the same ones.
LAUNCHERS = (
    ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS"),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
)


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
            return int(environment[index]), int(environment[count])
    if "TPU_WORKER_ID" in environment and "TPU_WORKER_HOSTNAMES" in environment:  # set by GKE
        return int(environment["TPU_WORKER_ID"]), len(environment["TPU_WORKER_HOSTNAMES"].split(","))
    return 0, 1


def process_from_jax() -> tuple[int, int]:
    """The index and number of processes of `jax.distributed`; (0, 1) if it is not initialized."""
    if jax.distributed.is_initialized():
        return jax.process_index(), jax.process_count()
    return 0, 1
