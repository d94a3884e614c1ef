"""Everything that decides a training run, from a TOML file.

The defaults are what the Moshi paper (arXiv 2410.00037, section 3.3) says of Mimi, or audiocraft's default
solver, to which it refers; `configs/mimi.toml` names the source of each, and what nobody has published.
"""

import dataclasses
import tomllib
from pathlib import Path
from typing import Any, get_type_hints

from mimi_jax.config import MimiConfig

MODES = ("full", "decoder")
SCHEDULES = ("constant", "cosine")
PRECISIONS = ("highest", "default")
PUBLISHED_QUANTIZERS = 8  # in training; the released file has 32


@dataclasses.dataclass(frozen=True)
class DataRecipe:
    seconds: float = 12.0  # of each crop, a whole number of frames
    batch_size: int = 128
    gain: tuple[float, float] = (-10.0, 6.0)  # dB, drawn for each crop
    weights: dict[str, float] = dataclasses.field(default_factory=dict)  # of sources; others by duration
    include: str = "*"  # a pattern that the paths in a manifest must match


@dataclasses.dataclass(frozen=True)
class OptimizerRecipe:
    learning_rate: float = 8e-4
    betas: tuple[float, float] = (0.5, 0.9)
    weight_decay: float = 5e-2  # of the Transformers alone
    warmup_steps: int = 0
    schedule: str = "constant"  # or "cosine", to zero at the last step
    max_norm: float = 0.0  # of the gradient, which is scaled down to it; 0 leaves it
    ema_decay: float = 0.99  # of the parameters and codebooks that are exported


@dataclasses.dataclass(frozen=True)
class LossRecipe:
    """Weights: of the audio's losses in the balancer, where only ratios matter; of the others as they are."""

    waveform: float = 0.1
    mel: float = 2.0
    mel_floor: float = 1e-5  # what magnitudes are raised by before their logarithm
    adversarial: float = 4.0
    features: float = 4.0
    commitment: float = 1.0
    distillation: float = 0.0
    adversarial_start: int = 0  # the first step with a discriminator


@dataclasses.dataclass(frozen=True)
class QuantizerRecipe:
    dropout: bool = True  # whether a batch uses a random number of acoustic codebooks
    rate: float = 0.5  # the share of clips that are quantized
    same: bool = True  # whether semantic and acoustic codes are left out together
    kmeans_vectors: int = 50_000  # latents that the codebooks are first fitted to


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A training run.

    Args:
        mode: "full", or "decoder" for the decoder half alone on frozen codes.
        model: the architecture; with `init`, leave it out.
        init: a model to start from, as for `Mimi.from_pretrained`; empty for random parameters.
        precision: of matrix products on GPUs and TPUs, as in `jax.default_matmul_precision`.
        teacher_dim: channels of the teacher's features; used where `losses.distillation` is not 0.
    """

    model: MimiConfig = dataclasses.field(
        default_factory=lambda: MimiConfig(num_quantizers=PUBLISHED_QUANTIZERS)
    )
    data: DataRecipe = DataRecipe()
    optimizer: OptimizerRecipe = OptimizerRecipe()
    losses: LossRecipe = LossRecipe()
    quantizer: QuantizerRecipe = QuantizerRecipe()
    mode: str = "full"
    init: str = ""
    seed: int = 0
    steps: int = 4_000_000
    precision: str = "highest"
    discriminator_filters: int = 32
    teacher_dim: int = 1024
    log_every: int = 100
    checkpoint_every: int = 1000

    def __post_init__(self) -> None:
        frames = self.data.seconds * self.model.sampling_rate / self.model.frame_size
        rules = [
            ("mode", self.mode in MODES, f"must be one of {', '.join(MODES)}"),
            ("precision", self.precision in PRECISIONS, f"must be one of {', '.join(PRECISIONS)}"),
            ("optimizer.schedule", self.optimizer.schedule in SCHEDULES, f"must be one of {SCHEDULES}"),
            ("init", bool(self.init) or self.mode == "full", "must name the model whose decoder to tune"),
            ("data.seconds", frames >= 1 and abs(frames - round(frames)) < 1e-6, "must be whole frames"),
            ("data.batch_size", self.data.batch_size > 0, "must be positive"),
            ("quantizer.rate", 0 <= self.quantizer.rate <= 1, "must lie in [0, 1]"),
            ("losses.mel_floor", self.losses.mel_floor > 0, "must be positive"),
            ("losses", self.losses.waveform + self.losses.mel > 0 or self.adversarial, "must not all be 0"),
            (
                "losses.adversarial_start",
                self.losses.waveform + self.losses.mel > 0 or self.losses.adversarial_start == 0,
                "must be 0 without waveform and mel losses, or the first steps have none",
            ),
            (
                "losses.distillation",
                self.losses.distillation == 0 or self.mode == "full",
                "must be 0 in mode decoder, where nothing that it could teach learns",
            ),
            ("steps", self.steps > 0, "must be positive"),
            (
                "checkpoint_every",
                self.log_every > 0
                and self.checkpoint_every > 0
                and self.checkpoint_every % self.log_every == 0,
                f"must be a multiple of log_every={self.log_every}, so that no log line is cut in two",
            ),
        ]
        broken = [f"{name} {rule}, got {_get(self, name)!r}" for name, holds, rule in rules if not holds]
        if broken:
            raise ValueError(f"unsupported recipe: {'; '.join(broken)}")

    @property
    def adversarial(self) -> bool:
        """Whether there is a discriminator at all."""
        return self.losses.adversarial + self.losses.features > 0

    @property
    def num_samples(self) -> int:
        """Samples of each crop."""
        return round(self.data.seconds * self.model.sampling_rate)

    @classmethod
    def from_toml(cls, path: str | Path) -> "Recipe":
        """Read a recipe.

        Raises:
            ValueError: naming each unknown field, and each value that is not supported.
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
    dict[str, float]: "a table of numbers",
}


def _check(kind: Any, value: Any, name: str) -> Any:
    """A value as the type of its field, which TOML may have written as another."""

    def is_number(x: Any) -> bool:
        return type(x) in (int, float)

    if kind is float and is_number(value):
        return float(value)
    if kind == tuple[float, float] and isinstance(value, list) and list(map(is_number, value)) == [True] * 2:
        return float(value[0]), float(value[1])
    if kind == dict[str, float] and isinstance(value, dict) and all(map(is_number, value.values())):
        return {key: float(number) for key, number in value.items()}
    if type(value) is kind:
        return value
    raise ValueError(f"{name} must be {_WORDS[kind]}, got {value!r}")
