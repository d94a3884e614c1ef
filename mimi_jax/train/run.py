"""A training run: data, steps, logs, and states from which a killed run continues with the same numbers."""

import dataclasses
import hashlib
import json
import operator
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tqdm import tqdm

from mimi_jax.config import ceil_div
from mimi_jax.files.atomic import atomic_path, file_lock
from mimi_jax.files.changes import describe_changes
from mimi_jax.files.corpus import Clip, find_clips
from mimi_jax.train.data import Sampler, fit_features, make_iterator
from mimi_jax.train.log import LeftOutLog, Log, finite_means, say
from mimi_jax.train.recipe import Recipe
from mimi_jax.train.states import open_states, read_discriminator, restore_state, save_state
from mimi_jax.train.step import Trainer, TrainState
from mimi_jax.train.validation import Validation
from mimi_jax.train.weights import start_model

# Audio [batch, channels, samples] to features [batch, vectors, dim].
Teacher = Callable[[np.ndarray], np.ndarray]

LOCK = "lock"
MAY_CHANGE = ("steps", "log_every", "checkpoint_every")  # in the recipe of a run that is resumed
IN_BAR = ("loss/mel", "loss/features", "loss/discriminator")


def train(
    recipe: Recipe,
    data: str | Path,
    out: str | Path,
    *,
    resume: bool = False,
    teacher: Teacher | None = None,
    devices: list[Any] | None = None,
) -> Path:
    """Train a model, in a folder that will hold

        recipe.json         the recipe, and which clips it was trained on
        log.jsonl           the means of all losses, every `log_every` steps, and with validation what was
                            measured, in lines of their own; the same in tensorboard/
        left_out.jsonl      clips that cannot be read, with the reasons; training draws others instead
        checkpoints/        the newest states, with the position in the data
        model/              the running mean of the model, which `Mimi.from_pretrained` loads: that of the
                            newest checkpoint, or with validation the best one
        best.json           with validation: the step of the model, and what was measured

    Args:
        recipe: what to do.
        data: a folder of audio, a manifest or one audio file, or the URL of one; see
            `mimi_jax.files.corpus.find_clips`.
        out: the folder. It may hold a run only if `resume` is true.
        resume: continue from the newest checkpoint, or begin if there is none yet.
        teacher: computes the features to distill. Without it, the manifest must name their files.
        devices: JAX devices that share each batch; None for all.

    Returns:
        The folder of the model.

    Raises:
        NotFiniteError: a loss or a gradient is not finite.
        ImportError: the recipe has a validation, and pystoi is not installed.
        ValueError: the folder holds another run, the data does not fit the recipe, or hardly any of it can be
            read.
    """
    out = Path(out)
    model = start_model(recipe)
    recipe = dataclasses.replace(recipe, model=model.config)
    features = bool(recipe.losses.distillation) and teacher is None
    clips, unreadable = find_clips(data, recipe.data.include)
    left_out = LeftOutLog(out)
    sampler = Sampler(clips, recipe.data, model.config, features, left_out.add)
    batches = make_iterator(sampler, recipe.seed, recipe.data.batch_size, recipe.steps)
    validation = None
    if recipe.validation.include:
        validation = Validation(recipe.validation, model.config, data, clips, out)
    devices = devices or jax.devices()
    put = _placer(devices, recipe.data.batch_size)
    fields = recipe.to_dict() | {"clips": _describe(clips)}
    _check_out(out, fields, resume)
    out.mkdir(parents=True, exist_ok=True)
    with _alone(out, fields), open_states(out / "checkpoints") as states:
        for clip in unreadable:
            left_out.add(clip)
        say(_first_line(model, clips, devices))
        with _resume_hint(states, recipe):
            run = _Run(Trainer(recipe, model), batches, sampler, put, states, out, validation, teacher)
            state = run.first_state()
            with Log(out, int(state.step)) as log:
                run.loop(state, log)
        if left_out:
            say(f"{len(left_out)} clips cannot be read and were left out; see {out / 'left_out.jsonl'}")
    return out / "model"


class _Run(NamedTuple):
    """What a run works with."""

    trainer: Trainer
    batches: Any  # a Grain iterator
    sampler: Sampler
    put: Callable  # from `_placer`
    states: Any  # from `open_states`
    out: Path  # the folder of the run
    validation: Validation | None
    teacher: Teacher | None

    def first_state(self) -> TrainState:
        """The newest state on disk, with the data at its position, or a new one."""
        recipe = self.trainer.recipe
        state = self.put(self.trainer.init())
        step = self.states.latest_step()
        if step is not None and step > recipe.steps:
            raise ValueError(f"the run is at step {step} already, beyond steps={recipe.steps}; raise steps")
        if step is not None:
            return restore_state(self.states, step, state, self.batches)
        if recipe.adversarial and recipe.discriminator.init:
            judge = read_discriminator(recipe.discriminator.init, state.discriminator)
            state = self.put(state._replace(discriminator=judge))
        if recipe.init:
            return state
        latents = self._first_latents(state)
        return self.put(self.trainer.fit_codebooks(state, latents, self._latents_per_batch()))

    def _latents_per_batch(self) -> int:
        recipe = self.trainer.recipe
        return recipe.data.batch_size * recipe.num_samples // self.trainer.model.config.frame_size

    def _first_latents(self, state: TrainState) -> jax.Array:
        """Latents [vectors, hidden_size] of the untrained encoder, from crops of another seed."""
        recipe, config = self.trainer.recipe, self.trainer.model.config
        wanted = max(recipe.quantizer.kmeans_vectors, config.codebook_size)
        count = ceil_div(wanted, self._latents_per_batch())
        batches = make_iterator(self.sampler, recipe.seed + 1, recipe.data.batch_size, count)
        latents = [
            np.asarray(self.trainer.encode_latents(state, batch["audio"])).reshape(-1, config.hidden_size)
            for batch in tqdm(batches, total=count, desc="fitting codebooks", disable=None, leave=False)
        ]
        return jnp.concatenate(latents)[:wanted]

    def loop(self, state: TrainState, log: Log) -> None:
        """Do the remaining steps, and write the log, the states and the model."""
        recipe = self.trainer.recipe
        first, since_log = int(state.step), []
        if first:  # the run may have been killed when it had saved this state, but not its model
            self._keep_model(state, log)
        with tqdm(initial=first, total=recipe.steps, desc="training", disable=None, smoothing=0.05) as bar:
            done = first
            while done < recipe.steps:
                state, logs = self._advance(state, done)
                since_log += logs
                bar.update(len(logs))
                done += len(logs)
                is_last = done == recipe.steps
                if done % recipe.log_every == 0 or is_last:
                    means, since_log = finite_means(since_log, done), []
                    log.write(done, means)
                    text = ", ".join(f"{name}={means[name]:.3f}" for name in IN_BAR if name in means)
                    bar.set_postfix_str(text)
                    if bar.disable:  # stderr is not a terminal, but may be a log file
                        say(f"step {done} of {recipe.steps}: {text}")
                if done % recipe.checkpoint_every == 0 or is_last:
                    save_state(self.states, state, self.batches)  # first, since a validation may fail
                    self._keep_model(state, log)

    def _advance(self, state: TrainState, done: int) -> tuple[TrainState, list[Any]]:
        """Do the next step, or several at once. Returns the state, and the logs of each step."""
        recipe, trainer = self.trainer.recipe, self.trainer
        phase, count = trainer.phase(done), recipe.steps_at_once
        whole = done % count == 0 and done + count <= recipe.steps
        if count == 1 or not whole or phase != trainer.phase(done + count - 1):
            state, logs = trainer.step(state, self.put(self._next_batch(), by_rows=True), phase=phase)
            return state, [logs]
        batches = [self._next_batch() for _ in range(count)]
        stacked = jax.tree.map(lambda *arrays: np.stack(arrays), *batches)
        state, logs = trainer.steps(state, self.put(stacked, by_rows=True, steps=True), phase=phase)
        return state, [jax.tree.map(operator.itemgetter(i), logs) for i in range(count)]

    def _keep_model(self, state: TrainState, log: Log) -> None:
        """Write the model of a saved state, or with validation measure it, and write it if it is the best."""
        step, recipe = int(state.step), self.trainer.recipe
        if self.validation is None:
            self.trainer.export(state).save_pretrained(self.out / "model")
        elif (step % recipe.validation.every == 0 or step == recipe.steps) and not log.has(step, "valid/mel"):
            log.write(step, self.validation(self.trainer.export(state), step))

    def _next_batch(self) -> Any:
        batch = next(self.batches)
        if self.teacher is not None:
            frames = self.trainer.recipe.num_samples // self.trainer.model.config.frame_size
            batch["features"] = fit_features(np.asarray(self.teacher(batch["audio"])), frames)
        return batch


def _first_line(model: Any, clips: list[Clip], devices: list[Any]) -> str:
    size = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
    hours = sum(clip.num_samples / clip.sampling_rate for clip in clips) / 3600
    return (
        f"a model of {size / 1e6:.1f} M parameters, {len(clips)} clips of {hours:.2f} h, on"
        f" {devices[0].device_kind}; compiling the first step can take minutes"
    )


@contextmanager
def _resume_hint(states: Any, recipe: Recipe) -> Iterator[None]:
    """Make an interrupt say what `--resume` will do."""
    try:
        yield
    except KeyboardInterrupt as interrupt:
        step, first = states.latest_step(), min(recipe.checkpoint_every, recipe.steps)
        if step is None:
            hint = f"the first checkpoint would have come at step {first}; with --resume the run begins anew"
        else:
            hint = f"with --resume the run continues from step {step}"
        interrupt.args = (f"interrupted; {hint}",)
        raise


def _describe(clips: list[Clip]) -> str:
    """Which clips a run learns from: their names and lengths, but not their folder."""
    stretches = [
        (os.path.basename(clip.path), clip.source, clip.speaker, clip.start, clip.num_samples)
        for clip in clips
    ]
    return f"{len(clips)}, {hashlib.sha256(json.dumps(stretches).encode()).hexdigest()[:16]}"


def _check_out(out: Path, fields: dict[str, Any], resume: bool) -> None:
    """Refuse a folder in which this run must not write."""
    file = out / "recipe.json"
    if not file.exists():
        # A run that was killed before it wrote its recipe leaves a lock and temporary files.
        if out.is_dir() and any(not path.name.startswith((LOCK, ".tmp-")) for path in out.iterdir()):
            raise ValueError(f"{out} holds files but not a training run; name another folder")
        return
    if not resume:
        raise ValueError(f"{out} already holds a run; resume it (--resume) or name another folder")
    old, new = (dict(_flat(json.loads(text))) for text in (file.read_text(), json.dumps(fields)))
    old |= {name: new.get(name) for name in MAY_CHANGE}
    if changes := describe_changes(old, new):
        raise ValueError(f"{out} holds a run with another recipe or other data: {changes}")


def _flat(fields: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in fields.items():
        if isinstance(value, dict) and name != "weights":
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


@contextmanager
def _alone(out: Path, fields: dict[str, Any]) -> Iterator[None]:
    """Lock the folder and write the recipe. Two processes would overwrite each other's checkpoints."""
    with file_lock(out / LOCK, wait=False) as is_alone:
        if not is_alone:
            raise ValueError(f"another process is training in {out}; wait for it, or stop it first")
        with atomic_path(out / "recipe.json") as file:
            file.write_text(json.dumps(fields, indent=2) + "\n")
        yield


def _placer(devices: list[Any], batch_size: int) -> Callable[..., Any]:
    """A function that puts a tree of arrays on the devices: either all of it on each, or its rows shared.

    The rows are on the first axis, or on the second one after an axis of steps.
    """
    count = max(n for n in range(1, len(devices) + 1) if batch_size % n == 0)
    mesh = Mesh(np.array(devices[:count]), ("data",))

    def put(tree: Any, by_rows: bool = False, steps: bool = False) -> Any:
        axes = [None] * steps + ["data"] * by_rows
        return jax.device_put(tree, NamedSharding(mesh, PartitionSpec(*axes)))

    return put
