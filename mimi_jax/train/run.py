"""A training run: data, steps, logs, and checkpoints from which a killed run goes on to the same numbers."""

import contextlib
import dataclasses
import hashlib
import importlib.util
import json
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tqdm import tqdm

from mimi_jax.config import ceil_div
from mimi_jax.files.atomic import atomic_path, file_lock
from mimi_jax.train.data import Clip, Sampler, find_clips, fit_features, make_iterator
from mimi_jax.train.recipe import Recipe
from mimi_jax.train.step import Trainer, TrainState, start_model

# Audio [batch, channels, samples] to features [batch, time, dim].
Teacher = Callable[[np.ndarray], np.ndarray]

KEPT = 2  # checkpoints
LOCK = "lock"
MAY_CHANGE = ("steps", "log_every", "checkpoint_every")  # in the recipe of a run that is resumed
IN_BAR = ("loss/mel", "loss/features", "loss/discriminator")


class NotFiniteError(ValueError):
    """A loss or a gradient became NaN or infinite; the last checkpoint is from before."""


def train(
    recipe: Recipe,
    data: str | Path,
    out: str | Path,
    *,
    resume: bool = False,
    teacher: Teacher | None = None,
    devices: list[Any] | None = None,
) -> Path:
    """Train, and keep in a folder

        recipe.json         what it was started with, and which clips
        log.jsonl           the means of all losses, every `log_every` steps; tensorboard/ the same
        checkpoints/        the newest states, with the position in the data
        model/              the running mean of the weights, as `Mimi.from_pretrained` reads it

    Args:
        recipe: what to do.
        data: a folder of audio or a manifest; see `mimi_jax.train.data.find_clips`.
        out: the folder; it must not hold a run, unless that is to be resumed.
        resume: go on from the newest checkpoint, or from the start where there is none yet.
        teacher: gives the features to distill, where they are not precomputed.
        devices: of JAX, which share each batch; None for all.

    Returns:
        The folder of the model.

    Raises:
        NotFiniteError: the run diverged.
        ValueError: the folder holds another run, or data and recipe do not fit each other.
    """
    out = Path(out)
    model = start_model(recipe)
    recipe = dataclasses.replace(recipe, model=model.config)
    features = bool(recipe.losses.distillation) and teacher is None
    clips = find_clips(Path(data), recipe.data.include)
    sampler = Sampler(clips, recipe.data, model.config, features)
    batches = make_iterator(sampler, recipe.seed, recipe.data.batch_size, recipe.steps)
    trainer = Trainer(recipe, model)
    put = _sharder(devices or jax.devices(), recipe.data.batch_size)
    fields = recipe.to_dict() | {"clips": _describe(clips)}
    _check_out(out, fields, resume)
    out.mkdir(parents=True, exist_ok=True)
    with _alone(out, fields), _checkpoints(out / "checkpoints") as checkpoints:
        size = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
        device = (devices or jax.devices())[0].device_kind
        hours = sum(clip.num_samples / clip.sampling_rate for clip in clips) / 3600
        _say(
            f"a model of {size / 1e6:.1f} M parameters, {len(clips)} clips of {hours:.2f} h, on"
            f" {device}; the first step is compiled, which can take minutes"
        )
        with _saying_what_is_kept(checkpoints, recipe):
            state = _start(trainer, checkpoints, batches, put, sampler)
            with _Log(out, int(state.step)) as log:
                _loop(trainer, state, batches, put, checkpoints, log, out / "model", teacher)
    return out / "model"


def _say(line: str) -> None:
    tqdm.write(line, file=sys.stderr)


@contextmanager
def _saying_what_is_kept(checkpoints: Any, recipe: Recipe) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt as interrupt:
        step, first = checkpoints.latest_step(), min(recipe.checkpoint_every, recipe.steps)
        if step is None:
            kept = f"before step {first} there is no checkpoint: resume it (--resume), and it begins anew"
        else:
            kept = f"resume it (--resume), and it goes on from step {step}"
        interrupt.args = (f"interrupted; {kept}",)
        raise


def _describe(clips: list[Clip]) -> str:
    """Which clips a run learns from: their names and lengths, and not where they lie."""
    stretches = [(clip.path.name, clip.source, clip.speaker, clip.start, clip.num_samples) for clip in clips]
    return f"{len(clips)}, {hashlib.sha256(json.dumps(stretches).encode()).hexdigest()[:16]}"


def _check_out(out: Path, fields: dict[str, Any], resume: bool) -> None:
    file = out / "recipe.json"
    if not file.exists():
        # What a run leaves that was killed before it had written its recipe.
        if out.is_dir() and any(not path.name.startswith((LOCK, ".tmp-")) for path in out.iterdir()):
            raise ValueError(f"{out} holds files but no run; name another folder")
        return
    if not resume:
        raise ValueError(f"{out} holds a run already; resume it (--resume) or name another folder")
    old, new = (dict(_flat(json.loads(text))) for text in (file.read_text(), json.dumps(fields)))
    changes = [
        f"{name} was {old.get(name)!r} and is {new.get(name)!r}"
        for name in old | new
        if old.get(name) != new.get(name) and name not in MAY_CHANGE
    ]
    if changes:
        raise ValueError(f"{out} holds a run with another recipe or other data: {'; '.join(changes)}")


@contextmanager
def _alone(out: Path, fields: dict[str, Any]) -> Iterator[None]:
    """Take the folder, in which two processes would overwrite each other's checkpoints."""
    with file_lock(out / LOCK, wait=False) as is_alone:
        if not is_alone:
            raise ValueError(f"{out} is the folder of a run that is going on; wait for it, or stop it first")
        with atomic_path(out / "recipe.json") as file:
            file.write_text(json.dumps(fields, indent=2) + "\n")
        yield


def _flat(fields: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in fields.items():
        if isinstance(value, dict) and name != "weights":
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _sharder(devices: list[Any], batch_size: int) -> Callable[[Any, bool], Any]:
    """A function that puts a tree of arrays on the devices: rows shared out, or everything on each."""
    count = math.gcd(len(devices), batch_size)
    mesh = Mesh(np.array(devices[:count]), ("data",))

    def put(tree: Any, by_rows: bool = False) -> Any:
        return jax.device_put(
            tree, NamedSharding(mesh, PartitionSpec("data") if by_rows else PartitionSpec())
        )

    return put


@contextmanager
def _checkpoints(folder: Path) -> Iterator[Any]:
    import orbax.checkpoint as ocp

    options = ocp.CheckpointManagerOptions(max_to_keep=KEPT, create=True, enable_async_checkpointing=False)
    with ocp.CheckpointManager(folder.absolute(), options=options) as manager:
        yield manager


def _save(checkpoints: Any, state: TrainState, batches: Any) -> None:
    import orbax.checkpoint as ocp

    items = ocp.args.Composite(
        state=ocp.args.StandardSave(state), data=ocp.args.JsonSave(batches.get_state())
    )
    checkpoints.save(int(state.step), args=items)


def _start(trainer: Trainer, checkpoints: Any, batches: Any, put: Callable, sampler: Sampler) -> TrainState:
    """The state of the newest checkpoint, with the data at its position, or a fresh one."""
    import orbax.checkpoint as ocp

    state = put(trainer.init())
    step = checkpoints.latest_step()
    if step is not None and step > trainer.recipe.steps:
        raise ValueError(
            f"the run is at step {step} already, beyond steps={trainer.recipe.steps}; raise steps"
        )
    if step is not None:
        items = ocp.args.Composite(
            state=ocp.args.StandardRestore(jax.tree.map(ocp.utils.to_shape_dtype_struct, state)),
            data=ocp.args.JsonRestore(),
        )
        restored = checkpoints.restore(step, args=items)
        batches.set_state(restored["data"])
        return restored["state"]
    if trainer.recipe.init:
        return state
    return put(trainer.fit_codebooks(state, _first_latents(trainer, state, sampler), _vectors(trainer)))


def _vectors(trainer: Trainer) -> int:
    """Latents in a batch."""
    recipe = trainer.recipe
    return recipe.data.batch_size * recipe.num_samples // trainer.model.config.frame_size


def _first_latents(trainer: Trainer, state: TrainState, sampler: Sampler) -> jax.Array:
    """Latents of the untrained encoder, of crops that no step will see."""
    recipe = trainer.recipe
    wanted = max(recipe.quantizer.kmeans_vectors, trainer.model.config.codebook_size)
    count = ceil_div(wanted, _vectors(trainer))
    batches = make_iterator(sampler, recipe.seed + 1, recipe.data.batch_size, count)
    size = trainer.model.config.hidden_size
    latents = [
        np.asarray(trainer.encode_latents(state, batch["audio"])).reshape(-1, size)
        for batch in tqdm(batches, total=count, desc="fitting codebooks", disable=None, leave=False)
    ]
    return jnp.concatenate(latents)[:wanted]


def _loop(
    trainer: Trainer,
    state: TrainState,
    batches: Any,
    put: Callable,
    checkpoints: Any,
    log: "_Log",
    folder: Path,
    teacher: Teacher | None,
) -> None:
    recipe = trainer.recipe
    first, since_log = int(state.step), []
    with tqdm(initial=first, total=recipe.steps, desc="training", disable=None, smoothing=0.05) as bar:
        for step in range(first, recipe.steps):
            batch = next(batches)
            if teacher is not None:
                frames = recipe.num_samples // trainer.model.config.frame_size
                batch["features"] = fit_features(np.asarray(teacher(batch["audio"])), frames)
            batch = put(batch, by_rows=True)
            state, logs = trainer.step(state, batch, adversarial=trainer.is_adversarial(step))
            since_log.append(logs)
            bar.update()
            done, is_last = step + 1, step + 1 == recipe.steps
            if done % recipe.log_every == 0 or is_last:
                means, since_log = _means(since_log, done), []
                log.write(done, means)
                text = ", ".join(f"{name}={means[name]:.3f}" for name in IN_BAR if name in means)
                bar.set_postfix_str(text)
                if bar.disable:  # no terminal, but perhaps a log
                    _say(f"step {done} of {recipe.steps}: {text}")
            if done % recipe.checkpoint_every == 0 or is_last:
                _save(checkpoints, state, batches)
                trainer.export(state).save_pretrained(folder)
    if first == recipe.steps:  # it may have been killed between its last checkpoint and its model
        trainer.export(state).save_pretrained(folder)


def _means(logs: list[dict[str, jax.Array]], done: int) -> dict[str, float]:
    """The means over the steps before `done`, of which none may hold anything but finite numbers."""
    values = jax.device_get(logs)
    for step, by_name in enumerate(values, done - len(values) + 1):
        if broken := [name for name, value in by_name.items() if not np.isfinite(value)]:
            raise NotFiniteError(
                f"step {step}: {', '.join(broken)} not finite; every checkpoint is from before that."
                " Lower optimizer.learning_rate, or set optimizer.max_norm, in a new run"
            )
    return {name: float(np.mean([by_name[name] for by_name in values])) for name in values[-1]}


class _Log:
    """`log.jsonl`, and the same for TensorBoard where tensorboardX is installed."""

    def __init__(self, out: Path, step: int):
        self._path, self._out, self._step = out / "log.jsonl", out, step

    def __enter__(self) -> "_Log":
        # A run that was killed may have logged more than its checkpoint knows, or half a line.
        kept = [line for line in _lines(self._path) if line["step"] <= self._step]
        with atomic_path(self._path) as file:
            file.write_text("".join(json.dumps(line) + "\n" for line in kept))
        self._file = self._path.open("a")
        self._board = None
        if importlib.util.find_spec("tensorboardX"):
            from tensorboardX import SummaryWriter

            self._board = SummaryWriter(str(self._out / "tensorboard"), purge_step=self._step + 1)
        return self

    def write(self, step: int, means: dict[str, float]) -> None:
        self._file.write(json.dumps({"step": step, **means}) + "\n")
        self._file.flush()
        if self._board is not None:
            for name, value in means.items():
                self._board.add_scalar(name, value, step)

    def __exit__(self, *_: object) -> None:
        self._file.close()
        if self._board is not None:
            self._board.close()


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    for line in path.read_text().splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError):
            yield json.loads(line)
