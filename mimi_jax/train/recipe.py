"""Everything that decides a training run, read from a TOML file.

The defaults come from the Moshi paper (arXiv 2410.00037, section 3.3) or from audiocraft's default solver, to
which the paper refers. `configs/mimi.toml` gives the source of each value and says which are not published.
"""

import dataclasses
import math
import tomllib
from pathlib import Path
from typing import Any, get_type_hints

from mimi_jax.config import MimiConfig

# The fields that have one of several words.
CHOICES = {
    "mode": ("full", "decoder"),
    "precision": ("highest", "default", "bfloat16"),
    "optimizer.schedule": ("constant", "cosine"),
    "validation.measure": ("mel", "stoi", "newest"),
}
NOT_NEGATIVE = (
    "optimizer.learning_rate",
    "optimizer.weight_decay",
    "optimizer.warmup_steps",
    "optimizer.max_norm",
    "losses.waveform",
    "losses.mel",
    "losses.adversarial",
    "losses.features",
    "losses.commitment",
    "losses.distillation",
    "losses.adversarial_start",
    "discriminator.learning_rate",
    "discriminator.head_start",
)
PUBLISHED_QUANTIZERS = 8  # in training; the released model has 32


@dataclasses.dataclass(frozen=True)
class DataRecipe:
    """The crops of audio that a run sees."""

    seconds: float = 12.0  # of a crop, a multiple of a frame
    batch_size: int = 128
    gain: tuple[float, float] = (-10.0, 6.0)  # dB; drawn for each crop
    weights: dict[str, float] = dataclasses.field(default_factory=dict)  # by source; empty: by duration
    include: str = "*"  # a pattern; only clips whose paths match it are used
    in_memory: bool = False  # each clip is decoded once and stays in memory: 0.35 GB an hour at 24 kHz


@dataclasses.dataclass(frozen=True)
class OptimizerRecipe:
    """AdamW, for the model and for the discriminator."""

    learning_rate: float = 8e-4
    betas: tuple[float, float] = (0.5, 0.9)
    weight_decay: float = 5e-2  # of the Transformers only
    warmup_steps: int = 0
    schedule: str = "constant"  # or "cosine", which reaches zero at the last step
    max_norm: float = 0.0  # gradients with a larger norm are scaled down to it; 0 turns this off
    ema_decay: float = 0.99  # of the running mean of the model, which is what a run exports


@dataclasses.dataclass(frozen=True)
class LossRecipe:
    """The weights of the losses.

    For the losses of the audio (waveform, mel, adversarial, features) only the ratios matter, because the
    balancer scales them.
    """

    waveform: float = 0.1
    mel: float = 2.0
    mel_power: float = 2.0  # of magnitudes in mel bands: 2, or 1 for the magnitudes themselves
    mel_floor: float = 1e-5  # is added to mel bands before their logarithm
    adversarial: float = 4.0
    features: float = 4.0
    commitment: float = 1.0
    distillation: float = 0.0
    adversarial_start: int = 0  # the first step with a discriminator


@dataclasses.dataclass(frozen=True)
class DiscriminatorRecipe:
    """The discriminator. Its cost is proportional to the number of windows and to what it hears."""

    filters: int = 32  # of each convolution
    windows: tuple[int, ...] = (1024, 2048, 512, 256, 128)  # samples; each has a sub-discriminator
    seconds: float = 0.0  # of each crop that it hears, at a random place in each step; 0: all of the crop
    learning_rate: float = 0.0  # before warmup and schedule; 0: that of the model
    head_start: int = 0  # steps that it learns while the model waits
    init: str = ""  # the folder of a run whose discriminator it begins as; empty: random parameters


@dataclasses.dataclass(frozen=True)
class QuantizerRecipe:
    """How training quantizes."""

    dropout: bool = True  # each batch uses a random number of acoustic codebooks
    rate: float = 0.5  # the share of clips that are quantized; the others keep their latents
    same: bool = True  # the semantic and the acoustic quantizer skip the same clips
    kmeans_vectors: int = 50_000  # latents that the codebooks are first fitted to


@dataclasses.dataclass(frozen=True)
class ValidationRecipe:
    """How the model of a run is chosen. Without it, it is that of the newest checkpoint."""

    include: str = ""  # a pattern of the clips that are held out; empty: none are
    every: int = 1000  # steps between two validations, a multiple of `checkpoint_every`
    num_quantizers: int = 8  # codebooks that the clips are decoded from
    # The smallest mel distance decides, or with "stoi" the largest STOI. With "newest", the last model is
    # kept: what a discriminator teaches can make both worse.
    measure: str = "mel"


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A training run.

    Args:
        model: the architecture. Leave it out with `init`.
        data, optimizer, losses, discriminator, quantizer, validation: see the class of each.
        mode: "full", or "decoder" to train only the decoder half, on codes that stay as they are.
        init: a model to start from, as for `Mimi.from_pretrained`; empty for random parameters.
        seed: of all random numbers.
        steps: how many steps the run takes.
        precision: of matrix products on GPUs and TPUs, "highest" or "default" as in
            `jax.default_matmul_precision`. "bfloat16" is "default", and both halves of the codec compute in
            bfloat16. Weights, quantizer, losses, discriminator and optimizer stay in float32.
        teacher_dim: channels of the teacher's features; not used if `losses.distillation` is 0.
        steps_at_once: steps that an accelerator does before the host hears of it; divides `log_every`.
        log_every: steps between two lines of the log.
        checkpoint_every: steps between two checkpoints, a multiple of `log_every`.

    Raises:
        ValueError: a value is not allowed. The error names all such values.
    """

    model: MimiConfig = dataclasses.field(
        default_factory=lambda: MimiConfig(num_quantizers=PUBLISHED_QUANTIZERS)
    )
    data: DataRecipe = DataRecipe()
    optimizer: OptimizerRecipe = OptimizerRecipe()
    losses: LossRecipe = LossRecipe()
    discriminator: DiscriminatorRecipe = DiscriminatorRecipe()
    quantizer: QuantizerRecipe = QuantizerRecipe()
    validation: ValidationRecipe = ValidationRecipe()
    mode: str = "full"
    init: str = ""
    seed: int = 0
    steps: int = 4_000_000
    precision: str = "highest"
    teacher_dim: int = 1024
    steps_at_once: int = 1
    log_every: int = 100
    checkpoint_every: int = 1000

    def __post_init__(self) -> None:
        rules = [
            *(
                (name, _get(self, name) in words, f"must be one of {', '.join(words)}")
                for name, words in CHOICES.items()
            ),
            ("init", bool(self.init) or self.mode == "full", "must name the model whose decoder to tune"),
            *self._data_rules(),
            *self._discriminator_rules(),
            *(
                (name, 0 <= _get(self, name) < math.inf, "must be finite and at least 0")
                for name in NOT_NEGATIVE
            ),
            ("optimizer.ema_decay", 0 <= self.optimizer.ema_decay <= 1, "must lie in [0, 1]"),
            ("quantizer.rate", 0 <= self.quantizer.rate <= 1, "must lie in [0, 1]"),
            ("losses.mel_power", self.losses.mel_power in (1, 2), "must be 1 (magnitudes) or 2 (power)"),
            ("losses.mel_floor", self.losses.mel_floor > 0, "must be positive"),
            ("losses", self.losses.waveform + self.losses.mel > 0 or self.adversarial, "must not all be 0"),
            (
                "losses.adversarial_start",
                self.losses.waveform + self.losses.mel > 0 or self.losses.adversarial_start == 0,
                "must be 0 if waveform and mel are 0, because the first steps would have no loss",
            ),
            (
                "losses.distillation",
                self.losses.distillation == 0 or self.mode == "full",
                "must be 0 in mode decoder, which does not train the encoder",
            ),
            ("steps", self.steps > 0, "must be positive"),
            *self._rhythm_rules(),
        ]
        broken = [f"{name} {rule}, got {_get(self, name)!r}" for name, holds, rule in rules if not holds]
        if broken:
            raise ValueError(f"the recipe is not supported: {'; '.join(broken)}")

    def _data_rules(self) -> list[tuple[str, bool, str]]:
        frame = self.model.frame_size / self.model.sampling_rate
        frames, (lowest, highest) = self.data.seconds / frame, self.data.gain
        weights = self.data.weights.values()
        return [
            (
                "data.seconds",
                frames >= 1 and abs(frames - round(frames)) < 1e-6,
                f"must be a multiple of a frame, {frame:g} s",
            ),
            ("data.batch_size", self.data.batch_size > 0, "must be positive"),
            (
                "data.gain",
                -math.inf < lowest <= highest < math.inf,
                "must be finite, the lower number first",
            ),
            (
                "data.weights",
                all(weight >= 0 for weight in weights) and (not weights or 0 < sum(weights) < math.inf),
                "must be finite, at least 0, and not all 0",
            ),
        ]

    def _rhythm_rules(self) -> list[tuple[str, bool, str]]:
        log, checkpoint, validation = self.log_every, self.checkpoint_every, self.validation
        return [
            (
                "steps_at_once",
                self.steps_at_once > 0 and log % self.steps_at_once == 0,
                f"must be positive and divide log_every={log}",
            ),
            (
                "checkpoint_every",
                log > 0 and checkpoint > 0 and checkpoint % log == 0,
                f"must be a positive multiple of log_every={log}",
            ),
            (
                "validation.every",
                not validation.include or (validation.every > 0 and validation.every % checkpoint == 0),
                f"must be a positive multiple of checkpoint_every={checkpoint}",
            ),
        ]

    def _discriminator_rules(self) -> list[tuple[str, bool, str]]:
        judge, longest = self.discriminator, max(self.discriminator.windows, default=0)
        return [
            (
                "discriminator.windows",
                all(window > 0 and window % 4 == 0 for window in judge.windows)
                and (longest > 0 or not self.adversarial),
                "must be multiples of 4",
            ),
            (
                "discriminator.seconds",
                not self.adversarial or longest <= self.num_heard <= self.num_samples,
                "must be 0, or at least the longest window and at most data.seconds",
            ),
        ]

    @property
    def adversarial(self) -> bool:
        """Whether the run has a discriminator."""
        return self.losses.adversarial + self.losses.features > 0

    @property
    def num_samples(self) -> int:
        """Samples of a crop."""
        return round(self.data.seconds * self.model.sampling_rate)

    @property
    def num_heard(self) -> int:
        """Samples of a crop that the discriminator hears."""
        return round((self.discriminator.seconds or self.data.seconds) * self.model.sampling_rate)

    @classmethod
    def from_toml(cls, path: str | Path) -> "Recipe":
        """Read a recipe.

        Raises:
            ValueError: the file is not TOML, a field is unknown, or a value is not allowed.
        """
        try:
            return _build(cls, tomllib.loads(Path(path).read_text()), "")
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def _get(recipe: Any, name: str) -> Any:
    for part in name.split("."):
        recipe = getattr(recipe, part)
    return recipe


def _build(cls: Any, fields: dict[str, Any], prefix: str) -> Any:
    """A dataclass from the table of a TOML file."""
    if cls is MimiConfig:
        return MimiConfig.from_dict({"num_quantizers": PUBLISHED_QUANTIZERS} | fields)
    types = get_type_hints(cls)
    values = {}
    for name, value in fields.items():
        if name not in types:
            known = ", ".join(f.name for f in dataclasses.fields(cls))
            raise ValueError(f"unknown field {prefix}{name}; the fields here are {known}")
        kind = types[name]
        if dataclasses.is_dataclass(kind):
            if not isinstance(value, dict):
                raise ValueError(f"{prefix}{name} must be a table")
            value = _build(kind, value, f"{prefix}{name}.")
        else:
            value = _check(kind, value, prefix + name)
        values[name] = value
    return cls(**values)


_WORDS = {
    int: "an integer",
    float: "a number",
    bool: "true or false",
    str: "a string",
    tuple[float, float]: "two numbers",
    tuple[int, ...]: "a list of integers",
    dict[str, float]: "a table of numbers",
}


def _check(kind: Any, value: Any, name: str) -> Any:
    """The value in the type of its field: TOML may give an integer for a float, or a list for a pair."""

    def is_number(x: Any) -> bool:
        return type(x) in (int, float)

    if kind is float and is_number(value):
        return float(value)
    if kind == tuple[float, float] and isinstance(value, list) and list(map(is_number, value)) == [True] * 2:
        return float(value[0]), float(value[1])
    if kind == tuple[int, ...] and isinstance(value, list) and {type(x) for x in value} <= {int}:
        return tuple(value)
    if kind == dict[str, float] and isinstance(value, dict) and all(map(is_number, value.values())):
        return {key: float(number) for key, number in value.items()}
    if type(value) is kind:
        return value
    raise ValueError(f"{name} must be {_WORDS[kind]}, got {value!r}")
