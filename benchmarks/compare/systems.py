"""The implementations of Mimi that are compared, each behind the same two functions."""

import contextlib
import functools
import importlib.util
import itertools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from benchmarks.inputs import CODEBOOKS, random_model, write_speech
from benchmarks.timing import Run, warn
from mimi_jax import MimiConfig

if TYPE_CHECKING:
    import torch

    from mimi_jax import Mimi

# JAX and torch are imported inside functions: the device is chosen first, and what this process has resident
# counts in the peaks of the processes that the case `memory` starts.

KINDS = {"cpu": ("float32", "bfloat16"), "gpu": ("float32", "tf32", "bfloat16")}  # of arithmetic
MODES = ("eager", "compile", "graphs")  # of torch; "graphs" is "reduce-overhead", which uses CUDA graphs
SYSTEMS = {
    "cpu": (
        *(f"mimi_jax-{kind}" for kind in KINDS["cpu"]),
        *(f"mimi_jax-step-{kind}" for kind in KINDS["cpu"]),
        *(f"transformers-{mode}-float32" for mode in MODES[:2]),
        "moshi-float32",
        "rustymimi-float32",
    ),
    "gpu": (
        *(f"mimi_jax-{kind}" for kind in KINDS["gpu"]),
        *(f"mimi_jax-step-{kind}" for kind in KINDS["gpu"]),
        *(f"transformers-{mode}-{kind}" for mode, kind in itertools.product(MODES, KINDS["gpu"])),
        "moshi-float32",
    ),
}
TORCH_DEVICE = {"cpu": "cpu", "gpu": "cuda"}
BASELINE, STEP_BASELINE = "transformers-eager-float32", "moshi-float32"
REFERENCE = "mimi_jax-float32"  # the other systems' codes are compared with its codes

Step = Callable[[np.ndarray], Any]


class System(NamedTuple):
    """One implementation, loaded, in one arithmetic."""

    # From "encode" or "decode" and an input on the host to a function that computes the output, on the host.
    clip: Callable[[str, np.ndarray], Run] | None
    # From "encode" or "decode" and a batch size to a context that gives the function of one streaming step.
    stream: Callable[[str, int], AbstractContextManager[Step]] | None = None


def save_models(folder: Path, config: MimiConfig | None = None) -> None:
    """The same random weights in the layouts of all systems, and a clip of 10 s.

    Args:
        config: of another size than the published one, which Kyutai's layout cannot hold.
    """
    from mimi_jax.checkpoint import save

    model = random_model(config)
    for layout in ("transformers", "kyutai") if config is None else ("transformers",):
        save(model, folder / layout, layout)
    write_speech(folder / "clip.wav", 10 / 60, model.config.sampling_rate)


def installed(names: list[str]) -> list[str]:
    """The systems whose packages are installed; the others are reported."""
    found = []
    for name in names:
        package = name.split("-")[0]
        needed = [package, "torch"] if package in ("transformers", "moshi") else [package]
        missing = [package for package in needed if importlib.util.find_spec(package) is None]
        if missing:
            warn(f"without {name}: {' and '.join(missing)} not installed")
        else:
            found.append(name)
    return found


def load_system(name: str, folder: Path, device: str) -> System:
    """One of `SYSTEMS`, with the weights in `folder`.

    Args:
        folder: where `save_models` wrote them.
        device: "cpu" or "gpu".
    """
    match name.split("-"):
        case ["mimi_jax", kind]:
            return load_mimi_jax(folder, kind)
        case ["mimi_jax", "step", kind]:
            return load_bare_steps(folder, kind)
        case ["transformers", mode, kind]:
            return load_transformers(folder, mode, kind, TORCH_DEVICE[device])
        case ["moshi", _]:
            return load_moshi(folder, TORCH_DEVICE[device])
        case _:
            return load_rustymimi(folder)


def load_model_of_kind(folder: Path, kind: str) -> "Mimi":
    import jax.numpy as jnp

    import mimi_jax

    precision = "default" if kind == "tf32" else "highest"
    model = mimi_jax.Mimi.from_pretrained(folder / "transformers", precision=precision)
    return model.astype(jnp.bfloat16) if kind == "bfloat16" else model


def load_mimi_jax(folder: Path, kind: str) -> System:
    import jax

    import mimi_jax

    model = load_model_of_kind(folder, kind)

    def clip(direction: str, array: np.ndarray) -> Run:
        x = array if jax.default_backend() == "cpu" else jax.block_until_ready(jax.device_put(array))
        if direction == "encode":
            return lambda: np.asarray(mimi_jax.encode(model, x, num_quantizers=CODEBOOKS).audio_codes)
        return lambda: np.asarray(mimi_jax.decode(model, x).audio_values)

    def stream(direction: str, batch: int) -> AbstractContextManager[Step]:
        return contextlib.nullcontext(make_step(model, direction, batch))

    return System(clip, stream)


def make_step(model: "Mimi", direction: str, batch: int) -> Step:
    """A streaming step of this package, from an array on the host to an array on the host."""
    import mimi_jax

    if direction == "encode":
        return mimi_jax.StreamingEncoder(model, batch, CODEBOOKS).push
    return mimi_jax.StreamingDecoder(model, batch).push


def load_bare_steps(folder: Path, kind: str) -> System:
    """What `push` adds to: a step as a program of one's own, without checks, pieces and masks."""
    model = load_model_of_kind(folder, kind)

    def stream(direction: str, batch: int) -> AbstractContextManager[Step]:
        compute, parameters, state = make_bare_step(model, direction, batch)

        def step(frame: np.ndarray) -> np.ndarray:
            nonlocal state
            state, output = compute(parameters, state, frame)
            return np.asarray(output)

        return contextlib.nullcontext(step)

    return System(None, stream)


def make_bare_step(model: "Mimi", direction: str, batch: int) -> tuple[Any, list, Any]:
    """A compiled function of parameters, state and frame, then its parameters and the first state.

    It gives the next state and the output. The next state takes the memory of the state before it.
    """
    import jax

    import mimi_jax

    parameters, structure = jax.tree.flatten(model)

    @functools.partial(jax.jit, donate_argnums=1)
    def step(parameters: list, state: Any, frame: Any) -> Any:
        model = jax.tree.unflatten(structure, parameters)
        if direction == "encode":
            return mimi_jax.encode_step(model, state, frame, num_quantizers=CODEBOOKS)
        return mimi_jax.decode_step(model, state, frame)

    state = model.init_encoder_state(batch) if direction == "encode" else model.init_decoder_state(batch)
    return step, parameters, state


def load_transformers(folder: Path, mode: str, kind: str, device: str) -> System:
    import torch
    import transformers

    dtype = torch.bfloat16 if kind == "bfloat16" else torch.float32
    model: Any = transformers.MimiModel.from_pretrained(folder / "transformers", dtype=dtype)
    model.to(device)

    def compute(direction: str, x: "torch.Tensor") -> "torch.Tensor":
        if direction == "encode":
            return model.encode(x, num_quantizers=CODEBOOKS).audio_codes
        return model.decode(x).audio_values

    def clip(direction: str, array: np.ndarray) -> Run:
        x = torch.from_numpy(array).to(device)
        x = x.to(dtype) if direction == "encode" else x
        call = compute
        if mode != "eager":
            # Programs of earlier cases count against a limit, beyond which torch runs layers eagerly.
            torch._dynamo.reset()
            torch._dynamo.config.recompile_limit = 64
            call = torch.compile(compute, dynamic=False, mode="reduce-overhead" if mode == "graphs" else None)

        @torch.no_grad()
        def run() -> np.ndarray:
            allow_tf32(kind == "tf32")
            result = call(direction, x).cpu()
            # NumPy has no bfloat16. To copy float32 would take longer than what `mimi_jax` copies.
            return (result.view(torch.int16) if result.dtype == torch.bfloat16 else result).numpy()

        return run

    return System(clip)


def allow_tf32(allowed: bool) -> None:
    """Choose for all that torch runs next; the flags belong to the process."""
    import torch

    torch.backends.cuda.matmul.allow_tf32 = allowed
    torch.backends.cudnn.allow_tf32 = allowed


def load_moshi(folder: Path, device: str) -> System:
    import torch
    from moshi.models.loaders import get_mimi

    model = get_mimi(folder / "kyutai" / "model.safetensors", device=device, num_codebooks=CODEBOOKS)

    @torch.no_grad()
    def compute(direction: str, x: torch.Tensor) -> np.ndarray:
        allow_tf32(False)
        return getattr(model, direction)(x.to(device)).cpu().numpy()

    def clip(direction: str, array: np.ndarray) -> Run:
        x = torch.from_numpy(array).to(device)
        return lambda: compute(direction, x)

    @contextlib.contextmanager
    def stream(direction: str, batch: int) -> Iterator[Step]:
        with model.streaming(batch):
            yield lambda frame: compute(direction, torch.from_numpy(frame))

    return System(clip, stream)


def load_rustymimi(folder: Path) -> System:
    import rustymimi

    file = str(folder / "kyutai" / "model.safetensors")
    tokenizer_class: Any = rustymimi.Tokenizer  # its type stubs are out of date
    make_tokenizer = functools.partial(tokenizer_class, file, num_codebooks=CODEBOOKS)
    tokenizer = make_tokenizer()

    def typed(direction: str, array: np.ndarray) -> np.ndarray:
        return array.astype(np.float32 if direction == "encode" else np.uint32)

    def clip(direction: str, array: np.ndarray) -> Run:
        x = typed(direction, array)

        def run() -> np.ndarray:
            tokenizer.reset()
            return getattr(tokenizer, direction)(x)

        return run

    def stream(direction: str, batch: int) -> AbstractContextManager[Step]:
        step = getattr(make_tokenizer(), f"{direction}_step")  # `reset` would keep an earlier batch size
        return contextlib.nullcontext(lambda frame: step(typed(direction, frame)))

    return System(clip, stream)
