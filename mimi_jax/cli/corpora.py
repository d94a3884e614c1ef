"""`mimi-jax tokenize`, `mimi-jax pack`, `mimi-jax train` and `mimi-jax evaluate`."""

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mimi_jax.cli.checks import (
    UsageError,
    check_input,
    check_installed,
    check_is_no_pipe,
    check_num_quantizers,
    check_output,
    check_picture,
)
from mimi_jax.cli.terminal import print_table

if TYPE_CHECKING:
    from mimi_jax.quality.evaluation import Evaluation
    from mimi_jax.tokenization import Summary


def run_tokenize(arguments: argparse.Namespace) -> None:
    check_installed("tokenize", "pyarrow")
    tokenize, own = _ray_engine(arguments) if arguments.engine == "ray" else _local_engine(arguments)
    from mimi_jax.tokenization import Settings

    settings = Settings(
        num_quantizers=arguments.num_quantizers,
        dtype=arguments.dtype,
        clips_per_shard=arguments.clips_per_shard,
        max_seconds=arguments.max_seconds,
        audio_column=arguments.audio_column,
    )
    summary = tokenize(
        arguments.sources,
        arguments.output,
        arguments.model,
        settings,
        batch_size=arguments.batch_size,
        workers=arguments.workers,
        strict=arguments.strict,
        retry_errors=arguments.retry_errors,
        **own,
    )
    _print_summary(summary)
    print(f"wrote {arguments.output}")
    transient = summary.total.transient
    if summary.total.errors:
        lost = f", {transient} of them for reasons that may pass; run again" if transient else ""
        errors = f"{summary.total.errors} clips could not be encoded{lost}"
        raise ValueError(f"{errors}; the reasons are in {arguments.output}/errors")


def _print_summary(summary: "Summary") -> None:
    now, total = summary.now, summary.total
    programs = "by the actors" if summary.compilations is None else str(summary.compilations)
    print_table(
        {
            "this run": f"{now.clips:,} clips, {summary.hours:.2f} h, {now.errors:,} errors",
            "speed": f"{summary.realtime:.0f}x realtime, {summary.seconds:.1f} s",
            "programs compiled": programs,
            "all runs": f"{total.clips:,} clips, {total.errors:,} errors, {total.frames:,} frames",
            "shards": f"{summary.num_done:,} of {summary.num_shards:,} are done",
            **({"left out": summary.left_out} if summary.left_out else {}),
        }
    )


def _local_engine(arguments: argparse.Namespace) -> tuple[Callable[..., Any], dict[str, Any]]:
    """Return the function that tokenizes in this process, and the options that it alone takes."""
    if arguments.ray_address or arguments.ray_actors or arguments.ray_resources:
        raise UsageError("--ray-address, --ray-actors and --ray-resources need --engine ray")
    from mimi_jax.tokenization import tokenize
    from mimi_jax.tokenization.processes import process_from_environment

    index, count = arguments.process_index, arguments.process_count
    if (index is None) != (count is None):
        raise UsageError("--process-index and --process-count must be given together")
    if arguments.distributed:
        if index is not None:
            raise UsageError(
                "--distributed finds --process-index and --process-count; give either it or them"
            )
        return tokenize, {"distributed": True}
    if index is None or count is None:
        index, count = process_from_environment(os.environ)
    if not 0 <= index < count:
        raise UsageError(f"the process index must lie in [0, {count}), got {index}")
    return tokenize, {"process_index": index, "process_count": count}


def _ray_engine(arguments: argparse.Namespace) -> tuple[Callable[..., Any], dict[str, Any]]:
    """Return the function that tokenizes on a Ray cluster, and the options that it alone takes."""
    check_installed("ray", "ray")
    if arguments.process_index is not None or arguments.process_count is not None:
        raise UsageError("--process-index and --process-count need --engine local; Ray shares out the work")
    if arguments.distributed:
        raise UsageError("--distributed needs --engine local; Ray shares out the work")
    import jax

    jax.config.update("jax_platforms", "cpu")  # in this process; it leaves the accelerators to the actors
    from mimi_jax.tokenization import tokenize_on_ray

    options = {"address": arguments.ray_address, "actors": arguments.ray_actors}
    return tokenize_on_ray, options | _ray_resources(arguments.ray_resources)


def _ray_resources(words: list[str]) -> dict[str, Any]:
    """Parse num_cpus=8 TPU=4 into {"num_cpus": 8.0, "resources": {"TPU": 4.0}}."""
    amounts: dict[str, float] = {}
    for word in words:
        name, _, number = word.partition("=")
        try:
            amounts[name] = float(number)
        except ValueError:
            raise UsageError(f"--ray-resources takes NAME=NUMBER, got {word}") from None
    own = {name: amounts.pop(name) for name in ("num_cpus", "num_gpus") if name in amounts}
    return {**own, "resources": amounts or None}


def run_pack(arguments: argparse.Namespace) -> None:
    check_installed("tokenize", "pyarrow")
    if arguments.format == "arrayrecord":
        check_installed("arrayrecord", "array_record")
    from mimi_jax.tokenization import pack

    packed = pack(
        arguments.tokens,
        arguments.output,
        arguments.length,
        split_by_source=arguments.split_by_source,
        format=arguments.format,
    )
    print_table(
        {
            "clips": f"{packed.clips:,}, {packed.frames:,} frames",
            "rows": f"{packed.rows:,} of {packed.length:,} frames, {packed.filled:.1%} filled",
        }
    )
    print(f"wrote {arguments.output}")


def run_train(arguments: argparse.Namespace) -> None:
    check_installed("train", "grain", "optax")
    check_input(arguments.config)
    from mimi_jax.train.recipe import Recipe
    from mimi_jax.train.run import train

    recipe = Recipe.from_toml(arguments.config)
    folder = train(recipe, arguments.data, arguments.out, resume=arguments.resume)
    which = f"after {recipe.steps} steps" if not recipe.validation.include else "of the step in best.json"
    print(f"wrote {folder}: the running mean of the weights {which}")


def run_evaluate(arguments: argparse.Namespace) -> None:
    visqol = not arguments.no_visqol
    check_installed("evaluate", "matplotlib", "pystoi", *["visqol", "ai_edge_litert"] * visqol)
    from mimi_jax.files.corpus import find_clips
    from mimi_jax.model import Mimi
    from mimi_jax.quality import evaluation

    output = arguments.output
    if isinstance(arguments.data, Path):
        check_is_no_pipe(arguments.data)
    if output is not None:
        if output.suffix == ".png":
            raise UsageError(f"-o names the file of numbers, and their picture ends in .png, got {output}")
        check_output(output, arguments.data)
        check_picture(output.with_suffix(".png"), output, arguments.data)
    corpus = find_clips(arguments.data, arguments.include)
    model = Mimi.from_pretrained(arguments.model)
    config = model.config
    counts = arguments.num_quantizers
    counts = counts or evaluation.default_counts(config.num_quantizers, config.num_semantic_quantizers)
    for count in counts:
        check_num_quantizers(model, count)
    result = evaluation.evaluate(model, corpus, counts, visqol=visqol, workers=arguments.workers)
    for clip in result.left_out:
        print(f"left out {clip.name}: {clip.reason}", file=sys.stderr)
    print(evaluation.table(result))
    shares = [perplexity / result.codebook_size for perplexity in result.perplexities]
    left_out = f", {len(result.left_out)} left out" if result.left_out else ""
    print(
        f"\n{result.num_clips} clips, {result.seconds:.0f} s{left_out}; perplexity of the codebooks:"
        f" {min(shares):.0%} to {max(shares):.0%} of their {result.codebook_size} codes\n"
        "How it sounds to people: python -m benchmarks.listening MODEL DATA, in mimi_jax's repository"
    )
    if output is not None:
        _write_evaluation(output, result, arguments.model)


def _write_evaluation(output: Path, result: "Evaluation", title: str) -> None:
    """Write the numbers as JSON, and a picture of them beside it."""
    from mimi_jax.files.atomic import atomic_path
    from mimi_jax.quality import evaluation
    from mimi_jax.quality.picture import draw_evaluation

    picture = output.with_suffix(".png")
    with atomic_path(picture) as temporary, atomic_path(output) as file:
        temporary.write_bytes(draw_evaluation(result, title))
        file.write_text(evaluation.to_json(result))
    print(f"wrote {output} and {picture}")
