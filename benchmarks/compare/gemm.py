"""The ceiling of a machine: how fast JAX and torch multiply square matrices."""

import statistics

import numpy as np

from benchmarks.compare.systems import TORCH_DEVICE, allow_tf32
from benchmarks.timing import Run

SIZE = {"cpu": 2048, "gpu": 8192}  # on a GPU, 2048 would measure the time of launches


def make_gemm(kind: str, device: str) -> Run:
    """A product in JAX of square matrices that lie on the device, with float32 sums."""
    import jax
    import jax.numpy as jnp

    from mimi_jax.ops import policy, tensor_cores

    dtype = jnp.bfloat16 if kind == "bfloat16" else jnp.float32
    x, y = (jnp.asarray(matrix, dtype) for matrix in matrices(device))
    exact = tensor_cores.ALGORITHM if policy.resolve("auto").tensor_cores else "highest"
    precision = exact if kind == "float32" else "default"
    product = jax.jit(lambda x, y: jnp.matmul(x, y, precision=precision, preferred_element_type="float32"))
    return lambda: product(x, y).block_until_ready()


def make_torch_gemm(kind: str, device: str) -> Run:
    """The same product in torch."""
    import torch

    dtype = torch.bfloat16 if kind == "bfloat16" else torch.float32
    x, y = (torch.from_numpy(matrix).to(TORCH_DEVICE[device], dtype) for matrix in matrices(device))

    def run() -> None:
        allow_tf32(kind == "tf32")
        torch.matmul(x, y)
        if device == "gpu":
            torch.cuda.synchronize()

    return run


def matrices(device: str) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((2, SIZE[device], SIZE[device]), np.float32)


def gemm_speed(times: list[float], device: str) -> float:
    """GFLOP/s of products that took these milliseconds."""
    return 2 * SIZE[device] ** 3 / 1e6 / statistics.median(times)
