"""Ten minutes on an NVIDIA GPU that settle everything: is it right, how fast is it, where does the time go.

    python -m benchmarks.gpu [--parts PART ...] [--budget 540] [--output FOLDER]
    python -m benchmarks.gpu --small    # a tiny model on a CPU, to try the program itself

It needs JAX with CUDA, and this package with its `dev` extra. Where torch, `transformers` and `moshi` are
installed they are measured too, and where `jax_triton` is, so are the fused device kernels. The parts:

    tests     `pytest -m gpu`: codes and audio are those of a CPU
    profile   the time of the device by groups of device kernels, beside a copy and a product of matrices
    compare   clips and streaming steps, beside torch (eager and compiled) and moshi
    training  a step of `configs/mini.toml` in bfloat16 and float32
    sweep     the sizes of the Triton device kernels: a table, and the constants to commit

Each part is a process with a time limit. It prints as it goes. If it fails, hangs or crashes, the next part
begins. The weights are random, of the published size, and made once. At the end comes a summary in Markdown.
`--output` keeps it and what each part printed: at most eight files of at most 16 MiB.
"""

import argparse
import os
import re
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.gpu.parts import PARTS, Folders
from benchmarks.gpu.processes import Outcome, run

SLOWER = 3  # times the limit of a part, on a CPU that compiles with few threads
LEAST = 10  # seconds without which no part begins
# Without these optimizations XLA takes a fraction of the time, which is all that matters for a tiny model.
COMPILE_FAST = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
WEIGHTS = """
import pathlib, sys
from benchmarks.compare.systems import save_models
from benchmarks.inputs import SMALL
save_models(pathlib.Path(sys.argv[1]), SMALL if sys.argv[2:] else None)
"""
# What the parts import. Without one of the first, parts fail; without one of the others, less is measured.
NEEDED = (
    "beartype",
    "cffi",
    "flax",
    "jaxtyping",
    "lazy_loader",
    "optax",
    "pytest",
    "soundfile",
    "soxr",
    "tqdm",
)
WANTED = ("jax_triton", "moshi", "torch", "transformers", "triton", "xdist")
DEVICE = f"""
import importlib.util, jax
assert jax.default_backend() == "gpu", f"JAX found no GPU, only {{jax.devices()}}"
print("-", jax.devices()[0].device_kind, "with JAX", jax.__version__)
for word, names in (("fail without", {NEEDED}), ("measure less without", {WANTED})):
    if missing := [name for name in names if importlib.util.find_spec(name) is None]:
        print("- parts", word, ", ".join(missing))
"""


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", choices=list(PARTS), nargs="+", default=list(PARTS), metavar="PART")
    parser.add_argument("--budget", type=float, default=540, metavar="SECONDS", help="of all parts together")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="keep logs and tables here")
    parser.add_argument("--small", action="store_true", help="a tiny model, to try this on a CPU")
    return parser.parse_args()


def environment(work: Path, small: bool) -> dict[str, str]:
    on_cpu = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": COMPILE_FAST}
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    return {
        "CUDA_VISIBLE_DEVICES": visible,  # programs for several GPUs do without the fastest device kernels
        **(on_cpu if small else {"JAX_PLATFORMS": "cuda,cpu"}),
        "JAX_COMPILATION_CACHE_DIR": str(work / "cache"),  # so that parts share what they compile
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # torch needs memory too
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",  # whatever plugins there are, warnings of theirs are errors
        "PYTHONUNBUFFERED": "1",
        "COLUMNS": "110",
    }


def run_parts(
    names: list[str], budget: float, folders: Folders, work: Path, small: bool
) -> dict[str, Outcome]:
    """Run the parts in order, as long as the time lasts."""
    end, variables = time.perf_counter() + budget, environment(work, small)
    outcomes = {}
    python = [sys.executable, "-u", "-c"]
    if not small:
        outcomes["device"] = run([*python, DEVICE], 60, work / "device.log", variables)
        if outcomes["device"].text != "ok":
            return outcomes
    words = [*python, WEIGHTS, str(folders.models), *(["small"] if small else [])]
    outcomes["weights"] = run(words, 90, work / "weights.log", {**variables, "JAX_PLATFORMS": "cpu"})
    for name, part in PARTS.items():
        if name not in names:
            continue
        left = end - time.perf_counter()
        print(f"\n== {name}: {part.title} ({left:.0f} s are left)", flush=True)
        if left < LEAST:
            outcomes[name] = Outcome("no time was left", 0.0, [])
            continue
        log = folders.output / f"{name}.log"
        seconds = part.seconds * (SLOWER if small else 1) if len(names) > 1 else budget
        outcomes[name] = run(part.command(folders, small), min(seconds, left), log, variables)
        print(f"== {name}: {outcomes[name].text}, {outcomes[name].seconds:.0f} s", flush=True)
    return outcomes


def summarize(outcomes: dict[str, Outcome]) -> str:
    """What of all parts is worth keeping, in Markdown."""
    lines = ["# Ten minutes on a GPU", "", "| part | outcome | seconds |", "|---|---|---|"]
    lines += [f"| {name} | {outcome.text} | {outcome.seconds:.0f} |" for name, outcome in outcomes.items()]
    lines += (
        ["", *(line for line in outcomes["device"].lines if line.startswith("- "))]
        if "device" in outcomes
        else []
    )
    for name, outcome in outcomes.items():
        if name not in PARTS:
            continue
        lines += ["", f"## {PARTS[name].title}", ""]
        kept, was_kept = re.compile(PARTS[name].keeps), True
        for line in outcome.lines:
            if kept.match(line):
                lines += [line] if was_kept else ["", line]
            was_kept = bool(kept.match(line))
    return "\n".join(lines) + "\n"


def main() -> None:
    options = parse_options()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        folders = Folders(work / "models", options.output or work / "output")
        folders.output.mkdir(parents=True, exist_ok=True)
        outcomes = run_parts(options.parts, options.budget, folders, work, options.small)
        summary = summarize(outcomes)
        (folders.output / "summary.md").write_text(summary)
    print(f"\n{summary}", flush=True)
    sys.exit(any(outcome.text != "ok" for outcome in outcomes.values()))


if __name__ == "__main__":
    main()
