"""Each launcher tells a process its index and the number of processes."""

import pytest

from mimi_jax.tokenization.processes import process_from_environment, process_from_jax


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, (0, 1)),
        ({"SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "4"}, (3, 4)),
        ({"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "5"}, (1, 5)),
        ({"TPU_WORKER_ID": "1", "TPU_WORKER_HOSTNAMES": "a,b"}, (1, 2)),
        ({"SLURM_PROCID": "3"}, (0, 1)),
        ({"TPU_WORKER_ID": "1"}, (0, 1)),
    ],
)
def test_a_process_finds_its_index_and_the_number_of_processes(
    environment: dict[str, str], expected: tuple[int, int]
):
    assert process_from_environment(environment) == expected


def test_a_variable_without_an_integer_is_refused():
    with pytest.raises(ValueError, match="SLURM_PROCID must be a whole number, got 'first'"):
        process_from_environment({"SLURM_PROCID": "first", "SLURM_STEP_NUM_TASKS": "4"})


def test_without_jax_distributed_there_is_one_process():
    assert process_from_jax() == (0, 1)
