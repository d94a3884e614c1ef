"""Processes that share a job and know of each other only from their launcher. None waits for another."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from jax._src.clusters import cloud_tpu_cluster

from mimi_jax.tokenization import read_manifest, tokenize
from mimi_jax.tokenization.processes import THIS_HOST_ALONE, process_from_cluster
from tests.tokenization.corpora import codes_by_id, write_folder
from tests.tokenization.test_kills import command

WITH_THE_SERVICE = """
import sys

import jax

from mimi_jax.tokenization import tokenize

if __name__ == "__main__":
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]), initialization_timeout=60)
    assert (len(jax.devices()), len(jax.local_devices())) == (4, 2)
    print(tokenize([sys.argv[3]], sys.argv[4], sys.argv[5], workers=1).now.clips)
"""


def slurm(index: int, count: int) -> dict[str, str]:
    """The variables of a process that `srun` started."""
    return {
        "SLURM_JOB_ID": "1",
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_NTASKS": str(count),
        "SLURM_PROCID": str(index),
        "SLURM_LOCALID": str(index),
    }


def open_mpi(index: int, count: int) -> dict[str, str]:
    """The variables of a process that `mpirun` started."""
    return {
        "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1:34911",
        "OMPI_COMM_WORLD_SIZE": str(count),
        "OMPI_COMM_WORLD_RANK": str(index),
        "OMPI_COMM_WORLD_LOCAL_RANK": "0",
    }


def tpu_slice(index: int, count: int) -> dict[str, str]:
    """The variables of a host on GKE, where two slices have `count` hosts together."""
    hosts = count // 2
    return {
        "TPU_WORKER_ID": str(index % hosts),
        "TPU_WORKER_HOSTNAMES": ",".join(f"host-{number}" for number in range(hosts)),
        "MEGASCALE_NUM_SLICES": "2",
        "MEGASCALE_SLICE_ID": str(index // hosts),
    }


@pytest.fixture
def no_process(monkeypatch: pytest.MonkeyPatch):
    """A process that is on its own, and what it sets is undone."""
    for name in {
        *slurm(0, 1),
        *open_mpi(0, 1),
        *tpu_slice(0, 2),
        *THIS_HOST_ALONE,
        "KUBERNETES_SERVICE_HOST",
    }:
        monkeypatch.setenv(name, "")  # so that it is restored, even if it is set below
        monkeypatch.delenv(name)
    process_from_cluster.cache_clear()
    yield
    process_from_cluster.cache_clear()


@pytest.mark.parametrize("launcher", [slurm, open_mpi, tpu_slice])
@pytest.mark.parametrize(("index", "count"), [(0, 2), (3, 4)])
def test_the_launcher_says_which_process_this_is(
    launcher, index: int, count: int, no_process: None, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", launcher is tpu_slice)
    for name, value in launcher(index, count).items():
        monkeypatch.setenv(name, value)
    for _ in range(2):
        assert process_from_cluster() == (index, count)
        assert THIS_HOST_ALONE.items() <= os.environ.items()


def test_bounds_that_the_user_set_are_kept(no_process: None, monkeypatch: pytest.MonkeyPatch):
    for name, value in {**slurm(1, 2), "TPU_PROCESS_BOUNDS": "2,2,1"}.items():
        monkeypatch.setenv(name, value)
    assert process_from_cluster() == (1, 2)
    assert os.environ["TPU_PROCESS_BOUNDS"] == "2,2,1"
    assert "TPU_WORKER_ID" not in os.environ


def test_no_launcher_is_an_error_that_says_what_to_give(tmp_path: Path, no_process: None):
    write_folder(tmp_path / "data", [100])
    with pytest.raises(ValueError, match=r"nothing tells JAX of other processes.*\(--process-index"):
        tokenize([tmp_path / "data"], tmp_path / "out", distributed=True)
    with pytest.raises(ValueError, match="distributed finds process_index and process_count"):
        tokenize([tmp_path / "data"], tmp_path / "out", distributed=True, process_index=0, process_count=2)


def test_an_index_that_is_too_large_is_refused(
    tmp_path: Path, no_process: None, monkeypatch: pytest.MonkeyPatch
):
    for name, value in slurm(2, 2).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=r"process_index must lie in \[0, 2\), got 2"):
        tokenize([tmp_path], tmp_path / "out", distributed=True)


@pytest.mark.slow
@pytest.mark.parametrize(("count", "lost"), [(2, 0), (2, 1), (4, 2)])
def test_a_lost_process_is_started_again_alone(tmp_path: Path, tiny: Path, count: int, lost: int):
    """The others end as if nothing had happened. The codes are those of one process."""
    data, out = tmp_path / "data", tmp_path / "out"
    write_folder(data, [2000 + n % 7 for n in range(100 * count)])
    options = ["--clips-per-shard", "1", "--model", str(tiny), "--workers", "1", "--distributed"]
    line = command(data, out, *options)
    processes = [
        subprocess.Popen(line, stdout=subprocess.DEVNULL, env={**os.environ, **slurm(index, count)})
        for index in range(count)
    ]
    own = [f"codes/{shard:05}-of-{100 * count:05}.parquet" for shard in range(lost, 100 * count, count)]
    while processes[lost].poll() is None and not any((out / name).exists() for name in own):
        time.sleep(0.005)
    processes[lost].send_signal(signal.SIGKILL)
    statuses = [process.wait() for process in processes]
    assert statuses == [-signal.SIGKILL if index == lost else 0 for index in range(count)]
    num_done = sum((out / name).exists() for name in own)
    assert 0 < num_done < len(own)
    manifest = read_manifest(out)
    assert manifest["complete"] is False
    subprocess.run(line, check=True, stdout=subprocess.DEVNULL, env={**os.environ, **slurm(lost, count)})
    manifest = read_manifest(out)
    assert (manifest["complete"], manifest["totals"]["clips"]) == (True, 100 * count)
    tokenize([data], tmp_path / "alone", tiny)
    found, expected = codes_by_id(out), codes_by_id(tmp_path / "alone")
    assert found.keys() == expected.keys()
    for name, codes in expected.items():
        np.testing.assert_array_equal(found[name], codes)
    alone = read_manifest(tmp_path / "alone")["totals"]
    assert json.dumps(manifest["totals"]) == json.dumps(alone)


@pytest.mark.slow
def test_with_the_service_of_jax_each_process_uses_its_own_devices(tmp_path: Path, tiny: Path):
    write_folder(tmp_path / "data", [200 + n for n in range(6)])
    (tmp_path / "script.py").write_text(WITH_THE_SERVICE)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    words = [str(tmp_path / name) for name in ("data", "out")]
    environment = {
        **os.environ,
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
        "JAX_PLATFORMS": "cpu",
    }
    both = [
        subprocess.Popen(
            [sys.executable, str(tmp_path / "script.py"), address, str(index), *words, str(tiny)],
            stdout=subprocess.PIPE,
            env=environment,
            text=True,
        )
        for index in range(2)
    ]
    # All clips are in one shard, which is that of the first process.
    assert [int(process.communicate()[0]) for process in both] == [6, 0]
    assert [process.returncode for process in both] == [0, 0]
    assert len(codes_by_id(tmp_path / "out")) == 6
    assert not jax.distributed.is_initialized()
