"""mimi_jax beside other implementations of Mimi: speed, start-up and memory, on the same audio and weights.

    python -m benchmarks.compare [--device gpu] [--only CASE ...] [--systems SYSTEM ...] [--json FILE]

Full size, random weights, 8 codebooks in every system; one that is not installed is left out (`make parity`
installs transformers and moshi, `pip install rustymimi` the other). Systems take turns, run by run, in one
process, so that a noisy machine is noisy for all; a number is the median of the runs. Cases:

    start                           a whole process that encodes 10 s, by the clock
    memory                          the peak (resident) of a whole process that encodes 8 clips of 10 s
    gemm                            products of square matrices: what this machine can do at most
    encode-8x10, decode-8x10, ...   8 clips of 10 s, on a GPU with the input there, to the host
    encode-step-8, ...              a frame of 80 ms of 8 streams, host to host

Other numbers than those of the default cases work too. The share of the ceiling is that of the matrix
products a case needs, counted from the configuration, of what `gemm` reaches in the same arithmetic in
JAX, measured between the runs of the case. Only an idle machine gives fair ratios; see
`benchmarks/latency.py`.
"""

import argparse
import contextlib
import functools
import importlib.metadata
import importlib.util
import itertools
import json
import math
import multiprocessing
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from tqdm import tqdm

if TYPE_CHECKING:
    from mimi_jax import MimiConfig

# mimi_jax, jax and torch are imported inside functions: after the choice of a device, and after the processes
# of `start` and `memory`, whose peak would include that of the process they are born of.

CODEBOOKS = 8
CLIPS = {"cpu": ("1x10", "8x10", "1x60"), "gpu": ("1x10", "8x10", "1x60", "64x30")}
STREAMS = (1, 8)
DIRECTIONS = ("encode", "decode")
CASE = re.compile(r"start|memory|gemm|(encode|decode)-(step-\d+|\d+x\d+)")
KINDS = {"cpu": ("float32", "bfloat16"), "gpu": ("float32", "tf32", "bfloat16")}  # of arithmetic
MODES = ("eager", "compile", "graphs")  # of torch; the last is "reduce-overhead", which uses CUDA graphs
SYSTEMS = {
    "cpu": (
        *(f"mimi_jax-{kind}" for kind in KINDS["cpu"]),
        *(f"transformers-{mode}-float32" for mode in MODES[:2]),
        "moshi-float32",
        "rustymimi-float32",
    ),
    "gpu": (
        *(f"mimi_jax-{kind}" for kind in KINDS["gpu"]),
        *(f"transformers-{mode}-{kind}" for mode, kind in itertools.product(MODES, KINDS["gpu"])),
        "moshi-float32",
    ),
}
TORCH_DEVICE = {"cpu": "cpu", "gpu": "cuda"}
BASELINE, STEP_BASELINE = "transformers-eager-float32", "moshi-float32"
REFERENCE = "mimi_jax-float32"  # with whose codes those of the others are compared
GEMM_SIZE = {"cpu": 2048, "gpu": 8192}  # on a GPU 2048 would measure launches
STEPS_IN_TURN = 5
SHORT = 10  # seconds of audio: runs that what another system leaves behind makes slower
WARMUP = 3  # runs, of steps and on a GPU: CUDA graphs are recorded in the second
MAXRSS_BYTES = 1 if sys.platform == "darwin" else 1024  # the unit of `ru_maxrss`

# What a user would write. Arguments: a model folder, a WAV file, how many rows of it, torch's device.
PROGRAMS = {
    "mimi_jax": """
import sys
import mimi_jax, numpy as np
folder, clip, rows, device = sys.argv[1:]
model = mimi_jax.Mimi.from_pretrained(folder)
audio = np.repeat(mimi_jax.load_audio(clip)[None], int(rows), axis=0)
np.asarray(mimi_jax.encode(model, audio, num_quantizers=8).audio_codes)
""",
    "transformers": """
import sys
import numpy as np, soundfile, torch, transformers
folder, clip, rows, device = sys.argv[1:]
model = transformers.MimiModel.from_pretrained(folder).to(device)
audio = np.repeat(soundfile.read(clip, dtype="float32")[0][None, None], int(rows), axis=0)
with torch.no_grad():
    model.encode(torch.from_numpy(audio).to(device), num_quantizers=8).audio_codes.cpu().numpy()
""",
}

Run = Callable[[], Any]
Step = Callable[[np.ndarray], Any]


class System(NamedTuple):
    """One implementation, loaded, in one arithmetic."""

    clip: Callable[[str, np.ndarray], Run]  # direction, input on the host -> what computes a host array of it
    stream: Callable[[str, int], AbstractContextManager[Step]] | None = None  # direction, batch


class Result(NamedTuple):
    """What was measured of one system in one case."""

    unit: str
    values: list[float]
    audio_seconds: float | None = None  # in all clips of the batch
    flops: int | None = None  # of the matrix products these need
    equal_codes: float | None = None  # the share of codes that are those of `REFERENCE`
    ceiling: float | None = None  # GFLOP/s of `gemm` in the same turns

    @property
    def median(self) -> float:
        return statistics.median(self.values)


def warn(message: str) -> None:
    tqdm.write(message, file=sys.stderr)


# Systems


def load_mimi_jax(folder: Path, kind: str) -> System:
    import jax
    import jax.numpy as jnp

    import mimi_jax
    from benchmarks import latency

    precision = "default" if kind == "tf32" else "highest"
    model = mimi_jax.Mimi.from_pretrained(folder / "transformers", precision=precision)
    model = model.astype(jnp.bfloat16) if kind == "bfloat16" else model

    def clip(direction: str, array: np.ndarray) -> Run:
        x = array if jax.default_backend() == "cpu" else jax.block_until_ready(jax.device_put(array))
        if direction == "encode":
            return lambda: np.asarray(mimi_jax.encode(model, x, num_quantizers=CODEBOOKS).audio_codes)
        return lambda: np.asarray(mimi_jax.decode(model, x).audio_values)

    def stream(direction: str, batch: int) -> AbstractContextManager[Step]:
        return contextlib.nullcontext(latency.make_step(model, direction, batch))

    return System(clip, stream)


def load_transformers(folder: Path, mode: str, kind: str, device: str) -> System:
    import torch
    import transformers

    dtype = torch.bfloat16 if kind == "bfloat16" else torch.float32
    model: Any = transformers.MimiModel.from_pretrained(folder / "transformers", dtype=dtype)
    model.to(device)

    def compute(direction: str, x: torch.Tensor) -> torch.Tensor:
        if direction == "encode":
            return model.encode(x, num_quantizers=CODEBOOKS).audio_codes
        return model.decode(x).audio_values.float()  # NumPy has no bfloat16

    def clip(direction: str, array: np.ndarray) -> Run:
        x = torch.from_numpy(array).to(device)
        x = x.to(dtype) if direction == "encode" else x
        call = compute
        if mode != "eager":
            torch._dynamo.reset()  # or the programs of earlier cases would count against its limit,
            torch._dynamo.config.recompile_limit = 64  # beyond which it runs layers eagerly
            call = torch.compile(compute, dynamic=False, mode="reduce-overhead" if mode == "graphs" else None)

        @torch.no_grad()
        def run() -> np.ndarray:
            allow_tf32(kind == "tf32")
            return call(direction, x).cpu().numpy()

        return run

    return System(clip)


def allow_tf32(allowed: bool) -> None:
    """Of all that torch runs next: the flags are those of the process."""
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
    tokenizer_class: Any = rustymimi.Tokenizer  # whose stubs are out of date
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
        step = getattr(make_tokenizer(), f"{direction}_step")  # `reset` keeps the batch size of earlier steps
        return contextlib.nullcontext(lambda frame: step(typed(direction, frame)))

    return System(clip, stream)


def load_system(name: str, folder: Path, device: str) -> System:
    match name.split("-"):
        case ["mimi_jax", kind]:
            return load_mimi_jax(folder, kind)
        case ["transformers", mode, kind]:
            return load_transformers(folder, mode, kind, TORCH_DEVICE[device])
        case ["moshi", _]:
            return load_moshi(folder, TORCH_DEVICE[device])
        case _:
            return load_rustymimi(folder)


# How runs are timed


def warm_up(case: str, runs: dict[str, Run], count: int) -> dict[str, Any]:
    """What each system gives; one that cannot run here is left out of `runs`, such as for want of memory."""
    outputs = {}
    for name, run in tqdm(list(runs.items()), desc=f"{case}: warm-up", leave=False, disable=None):
        try:
            outputs[name] = run()
            for _ in range(count - 1):
                run()
        except (RuntimeError, ValueError, subprocess.CalledProcessError) as error:
            warn(f"{case} without {name}: {str(error).strip().splitlines()[0]}")
            del runs[name]
    return outputs


def timed(run: Run) -> Callable[[], float]:
    """A run that returns its milliseconds."""

    def measure() -> float:
        start = time.perf_counter()
        run()
        return 1000 * (time.perf_counter() - start)

    return measure


def take_turns(
    case: str,
    measures: dict[str, Callable[[], float]],
    options: argparse.Namespace,
    counted: int = 1,
    uncounted: int = 0,
) -> dict[str, list[float]]:
    """What each measure gives, again and again: `repeats` turns, or fewer where the time is over.

    Args:
        counted: how often a system is measured before it is the other's turn.
        uncounted: how often before that: the first time finds the other's data in the caches, and its
            threads, which spin a while after their work, on the cores.
    """
    values: dict[str, list[float]] = {name: [] for name in measures}
    end = time.perf_counter() + options.seconds * len(measures)
    for _ in tqdm(range(options.repeats), desc=case, leave=False, disable=None, unit="turn"):
        for name, measure in measures.items():
            values[name] += [measure() for _ in range(uncounted + counted)][uncounted:]
        if time.perf_counter() > end:
            break
    return values


# Cases


def measure_clips(case: str, systems: dict[str, System], options: argparse.Namespace) -> dict[str, Result]:
    import mimi_jax

    direction, clips = case.split("-")
    batch, seconds = map(int, clips.split("x"))
    config = mimi_jax.MimiConfig()
    array = make_input(config, direction, batch, seconds)
    if options.device == "gpu" and (torch := sys.modules.get("torch")):
        torch.cuda.empty_cache()  # of the case before
    runs: dict[str, Run] = {}
    for name, system in systems.items():
        runs[name] = system.clip(direction, array)
        package, kind = name.split("-")[0], name.split("-")[-1]
        if package == "mimi_jax":  # right after it, when no thread of another library spins
            runs[f"gemm-{kind}"] = make_gemm(kind, options.device)
    outputs = warm_up(case, runs, WARMUP if options.device == "gpu" else 1)
    equal = {}
    if direction == "encode" and REFERENCE in outputs:
        equal = {
            name: float(np.mean(outputs[name] == outputs[REFERENCE])) for name in systems if name in runs
        }
    measures = {name: timed(run) for name, run in runs.items()}
    values = take_turns(case, measures, options, uncounted=int(batch * seconds <= SHORT))
    flops = batch * count_flops(config, seconds)[direction]
    gemms = [name for name in values if name.startswith("gemm")]
    ceilings = {
        name.replace("gemm", "mimi_jax"): gemm_speed(values.pop(name), options.device) for name in gemms
    }
    return {
        name: Result("ms", times, batch * seconds, flops, equal.get(name), ceilings.get(name))
        for name, times in values.items()
    }


def measure_steps(case: str, systems: dict[str, System], options: argparse.Namespace) -> dict[str, Result]:
    import mimi_jax
    from benchmarks import latency

    direction, _, batch = case.split("-")
    frames = latency.make_frames(mimi_jax.MimiConfig(), direction, int(batch))

    def run_of(step: Step) -> Run:
        endless = itertools.cycle(frames)
        return lambda: step(next(endless))

    with contextlib.ExitStack() as stack:
        runs = {
            name: run_of(stack.enter_context(system.stream(direction, int(batch))))
            for name, system in systems.items()
            if system.stream is not None
        }
        warm_up(case, runs, WARMUP)
        measures = {name: timed(run) for name, run in runs.items()}
        values = take_turns(case, measures, options, STEPS_IN_TURN, uncounted=1)
    return {name: Result("ms", values[name]) for name in values}


def make_gemm(kind: str, device: str) -> Run:
    """A product in JAX of square matrices that lie on the device, with float32 sums."""
    import jax
    import jax.numpy as jnp

    dtype = jnp.bfloat16 if kind == "bfloat16" else jnp.float32
    x, y = (jnp.asarray(matrix, dtype) for matrix in gemm_matrices(device))
    precision = "highest" if kind == "float32" else "default"
    product = jax.jit(lambda x, y: jnp.matmul(x, y, precision=precision, preferred_element_type="float32"))
    return lambda: product(x, y).block_until_ready()


def make_torch_gemm(kind: str, device: str) -> Run:
    import torch

    dtype = torch.bfloat16 if kind == "bfloat16" else torch.float32
    x, y = (torch.from_numpy(matrix).to(TORCH_DEVICE[device], dtype) for matrix in gemm_matrices(device))

    def run() -> None:
        allow_tf32(kind == "tf32")
        torch.matmul(x, y)
        if device == "gpu":
            torch.cuda.synchronize()

    return run


def gemm_matrices(device: str) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((2, GEMM_SIZE[device], GEMM_SIZE[device]), np.float32)


def gemm_speed(times: list[float], device: str) -> float:
    """GFLOP/s of milliseconds."""
    return 2 * GEMM_SIZE[device] ** 3 / 1e6 / statistics.median(times)


def measure_gemm(systems: dict[str, System], options: argparse.Namespace) -> dict[str, Result]:
    # Only what is compared: torch takes minutes for bfloat16 on a CPU that has no such products.
    kinds = [kind for kind in KINDS[options.device] if any(name.endswith(kind) for name in systems)]
    runs = {f"jax-{kind}": make_gemm(kind, options.device) for kind in kinds}
    if any(name.startswith(("transformers", "moshi")) for name in systems):
        runs |= {f"torch-{kind}": make_torch_gemm(kind, options.device) for kind in kinds}
    warm_up("gemm", runs, WARMUP)
    measures = {name: timed(run) for name, run in runs.items()}
    values = take_turns("gemm", measures, options, STEPS_IN_TURN, uncounted=1)
    return {
        name: Result("GFLOP/s", [gemm_speed([time], options.device) for time in times])
        for name, times in values.items()
    }


def run_program(package: str, folder: Path, rows: int, device: str) -> float:
    """The peak of the memory of one of `PROGRAMS`, in MB."""
    arguments = [str(folder / "transformers"), str(folder / "clip.wav"), str(rows)]
    command = [sys.executable, "-c", PROGRAMS[package], *arguments, TORCH_DEVICE[device]]
    environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": str(folder / "cache")}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, f"python -c of {package}")
    return usage.ru_maxrss * MAXRSS_BYTES / 1e6


def measure_start(folder: Path, names: list[str], options: argparse.Namespace) -> dict[str, Result]:
    """Seconds from the shell to the codes: `mimi-jax encode`, and the same in a script of transformers."""
    from benchmarks import startup

    model, clip = str(folder / "transformers"), folder / "clip.wav"

    def cold() -> float:
        with tempfile.TemporaryDirectory() as cache:
            return startup.run(model, clip, cache)

    runs: dict[str, Run] = {}
    if REFERENCE in names:
        runs[f"{REFERENCE}-cold-cache"] = cold
        runs[f"{REFERENCE}-warm-cache"] = lambda: startup.run(model, clip, str(folder / "cache"))
    if BASELINE in names:
        runs[BASELINE] = lambda: run_program("transformers", folder, 1, options.device)
    warm_up("start", runs, 1)
    values = take_turns("start", {name: timed(run) for name, run in runs.items()}, options)
    return {name: Result("ms", values[name]) for name in values}


def measure_memory(folder: Path, names: list[str], options: argparse.Namespace) -> dict[str, Result]:
    """MB, with a warm compilation cache."""

    def measure(package: str) -> Run:
        return lambda: run_program(package, folder, 8, options.device)

    packages = {REFERENCE: "mimi_jax", BASELINE: "transformers"}
    runs = {name: measure(package) for name, package in packages.items() if name in names}
    warm_up("memory", runs, 1)
    return {name: Result("MB", values) for name, values in take_turns("memory", runs, options).items()}


def make_input(config: "MimiConfig", direction: str, batch: int, seconds: int) -> np.ndarray:
    """Speech, float32 [batch, 1, samples], or random codes, int64 [batch, codebooks, frames]."""
    import mimi_jax
    from benchmarks.latency import SAMPLE

    samples = seconds * config.sampling_rate
    if direction == "encode":
        return np.resize(mimi_jax.load_audio(SAMPLE), (batch, 1, samples))
    shape = (batch, CODEBOOKS, math.ceil(samples / config.frame_size))
    return np.random.default_rng(0).integers(config.codebook_size, size=shape)


# The work of a clip


def count_flops(config: "MimiConfig", seconds: float, codebooks: int = CODEBOOKS) -> dict[str, int]:
    """FLOPs of the matrix products that encoding and decoding one clip needs, two for each multiply-add."""
    frames = math.ceil(seconds * config.sampling_rate / config.frame_size)
    steps, size, dim = frames * config.latent_stride, config.hidden_size, config.codebook_dim
    projections = 2 * frames * size * dim if dim != size else 0  # of the semantic and the acoustic half
    distances = frames * codebooks * config.codebook_size * dim
    resampling = 2 * steps * size * size  # a kernel of two strides
    kernels = config.kernel_size, config.last_kernel_size
    both = transformer_products(config, steps)
    encode = seanet_products(config, steps, *kernels) + both + resampling + projections + distances
    decode = seanet_products(config, steps, *reversed(kernels)) + both + projections
    return {"encode": 2 * encode, "decode": 2 * (decode + resampling // config.upsample_groups)}


def seanet_products(config: "MimiConfig", steps: int, outer_kernel: int, inner_kernel: int) -> int:
    """Multiply-adds of either half, which differ only in the kernels next to the waveform and the latents."""
    channels, time = config.num_filters, steps * math.prod(config.upsampling_ratios)
    total = time * outer_kernel * config.audio_channels * channels
    for ratio in reversed(config.upsampling_ratios):
        block = (config.residual_kernel_size + 1) * channels * (channels // config.compress)
        block += channels * channels * config.use_conv_shortcut
        total += time * config.num_residual_layers * block
        total += time * 2 * channels * (2 * channels)  # time / ratio steps, and a kernel of two ratios
        channels, time = 2 * channels, time // ratio
    return total + steps * inner_kernel * channels * config.hidden_size


def transformer_products(config: "MimiConfig", steps: int) -> int:
    """Multiply-adds of all layers; a query has as many keys as it sees."""
    size, window = config.hidden_size, config.sliding_window
    head_dim = config.head_dim or size // config.num_attention_heads
    queries, keys = config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim
    linear = 2 * size * queries + 2 * size * keys + 2 * size * config.intermediate_size
    seen = sum(min(step + 1, window) for step in range(steps))
    return config.num_hidden_layers * (steps * linear + 2 * seen * queries)


# The report


def versions() -> dict[str, str]:
    found = {}
    for package in ("mimi_jax", "jax", "torch", "transformers", "moshi", "rustymimi"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def heading(systems: dict[str, System], load: float, options: argparse.Namespace) -> str:
    """The machine and its load average, the versions, and how it was measured."""
    import jax

    cpuinfo = Path("/proc/cpuinfo")
    name = re.search(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else None
    machine = f"{name[1] if name else platform.machine()}, {os.cpu_count()} threads, load {load:.1f}"
    software = [f"{package} {version}" for package, version in versions().items()]
    software.append(f"JAX on {jax.devices()[0].device_kind}")
    if any(name.startswith(("transformers", "moshi")) for name in systems):
        import torch

        software.append(f"torch with {torch.get_num_threads()} threads")
    return (
        f"{machine}; {', '.join(software)}; full size, {CODEBOOKS} codebooks, medians of at most"
        f" {options.repeats} turns; ratios are to {BASELINE}, of steps to {STEP_BASELINE}: 2x takes half"
    )


def table_rows(case: str, results: dict[str, Result]) -> Iterator[str]:
    baseline = results.get(STEP_BASELINE if "step" in case else BASELINE)
    for name, result in results.items():
        cells = [case, name, f"{result.median:,.1f} {result.unit}", str(len(result.values)), *[""] * 4]
        if baseline:
            cells[4] = f"{baseline.median / result.median:.2f}x"
        if result.audio_seconds:
            cells[5] = f"{1000 * result.audio_seconds / result.median:,.1f}"
        if result.flops and result.ceiling:
            cells[6] = f"{result.flops / 1e6 / result.median / result.ceiling:.0%}"
        if result.equal_codes is not None:
            cells[7] = f"{result.equal_codes:.2%}"
        yield f"| {' | '.join(cells)} |"


def write_json(path: str, first_line: str, load: float, results: dict[str, dict[str, Result]]) -> None:
    cases = {
        case: {name: {"median": result.median, **result._asdict()} for name, result in by_system.items()}
        for case, by_system in results.items()
    }
    report = {"heading": first_line, "load": load, "versions": versions(), "results": cases}
    Path(path).write_text(json.dumps(report, indent=2) + "\n")


# The command


def save_models(folder: Path) -> None:
    """The random weights in the layouts of all systems, and a clip of 10 s."""
    from flax import nnx

    import mimi_jax
    from benchmarks.memory import write_speech
    from mimi_jax.checkpoint import save

    model = mimi_jax.Mimi(mimi_jax.MimiConfig(), rngs=nnx.Rngs(0))
    for layout in ("transformers", "kyutai"):
        save(model, folder / layout, layout)
    write_speech(folder / "clip.wav", 10 / 60, model.config.sampling_rate)


def case_name(text: str) -> str:
    if not CASE.fullmatch(text):
        raise argparse.ArgumentTypeError(
            f"cases are such as start, encode-8x10 and encode-step-8, got {text!r}"
        )
    return text


def default_cases(device: str) -> list[str]:
    clips = [f"{direction}-{clip}" for clip in CLIPS[device] for direction in DIRECTIONS]
    steps = [f"{direction}-step-{batch}" for batch in STREAMS for direction in DIRECTIONS]
    return ["start", "memory", "gemm", *clips, *steps]


def installed(names: list[str]) -> list[str]:
    """Those whose packages are there; says which are not."""
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


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    every = sorted({*SYSTEMS["cpu"], *SYSTEMS["gpu"]})
    parser.add_argument("--device", choices=list(SYSTEMS), default="cpu")
    parser.add_argument("--only", type=case_name, nargs="+", metavar="CASE", help="instead of all cases")
    parser.add_argument(
        "--systems", choices=every, nargs="+", metavar="SYSTEM", help=f"of {', '.join(every)}"
    )
    parser.add_argument("--repeats", type=int, default=7, help="turns of each system in each case")
    parser.add_argument(
        "--seconds", type=float, default=60.0, help="that a system may take in a case, at most"
    )
    parser.add_argument("--json", metavar="FILE", help="where to write all numbers")
    options = parser.parse_args()
    options.systems = options.systems or list(SYSTEMS[options.device])
    if unknown := set(options.systems) - set(SYSTEMS[options.device]):
        parser.error(f"not on {options.device}: {', '.join(sorted(unknown))}")
    return options


def measure_all(folder: Path, options: argparse.Namespace) -> None:
    """Prints each row as soon as it is measured."""
    load = os.getloadavg()[0]  # before this process adds to it
    cases, names = options.only or default_cases(options.device), installed(options.systems)
    results: dict[str, dict[str, Result]] = {}
    # In a process of its own, for the sake of `start` and `memory`.
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        pool.submit(save_models, folder).result()
    for case, measure in (("start", measure_start), ("memory", measure_memory)):
        if case in cases:
            results[case] = measure(folder, names, options)
    systems = {name: load_system(name, folder, options.device) for name in names}
    first_line = heading(systems, load, options)
    columns = ["case", "system", "median", "runs", "ratio", "x realtime", "of the ceiling", "equal codes"]
    print(f"{first_line}\n\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}", flush=True)
    for case in sorted(cases, key=lambda case: case not in ("start", "memory", "gemm")):
        if case == "gemm":
            results[case] = measure_gemm(systems, options)
        elif case not in results:
            measure = measure_steps if "step" in case else measure_clips
            results[case] = measure(case, systems, options)
        for row in table_rows(case, results[case]):
            print(row, flush=True)
    if options.json:
        write_json(options.json, first_line, load, results)


def main() -> None:
    options = parse_options()
    os.environ["JAX_PLATFORMS"] = "cuda,cpu" if options.device == "gpu" else "cpu"
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # torch needs memory too
    with tempfile.TemporaryDirectory() as folder:
        measure_all(Path(folder), options)


if __name__ == "__main__":
    main()
