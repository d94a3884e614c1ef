"""Choosing the model of a run by clips that it does not learn from.

Every so often, the running mean of the model encodes and decodes these clips. The model with the smallest mel
distance, or the largest STOI, is the one that the run leaves behind.
"""

import importlib.util
import json
from pathlib import Path

from mimi_jax.config import MimiConfig
from mimi_jax.files.atomic import atomic_path
from mimi_jax.files.corpus import Clip, find_clips
from mimi_jax.model import Mimi
from mimi_jax.quality.evaluation import evaluate
from mimi_jax.train.recipe import ValidationRecipe

BEST = "best.json"  # in the folder of a run: the step of its model, and what was measured


class Validation:
    """Held-out clips, and the best model so far.

    Args:
        recipe: which clips, and how they are compared.
        config: of the model.
        data: as for `train`.
        learned: the clips that the run learns from.
        out: the folder of the run.

    Raises:
        ImportError: pystoi is not installed.
        ValueError: there are no such clips, the run learns from one of them, or the model has fewer
            codebooks.
    """

    def __init__(
        self, recipe: ValidationRecipe, config: MimiConfig, data: str | Path, learned: list[Clip], out: Path
    ):
        if importlib.util.find_spec("pystoi") is None:  # the first validation may come after hours
            raise ImportError(
                "validation measures STOI with pystoi; install: pip install 'mimi_jax[evaluate]'"
            )
        least, most = config.num_semantic_quantizers, config.num_quantizers
        if not least <= recipe.num_quantizers <= most:
            raise ValueError(
                f"validation.num_quantizers must lie from {least} to {most}, the codebooks of the model,"
                f" got {recipe.num_quantizers}"
            )
        self._recipe, self._out = recipe, out
        self._clips = find_clips(data, recipe.include)
        if both := {clip.path for clip in learned} & {clip.path for clip in self._clips.clips}:
            raise ValueError(
                f"{min(both)} is used for training and for validation; data.include and validation.include"
                " must not match the same paths"
            )

    def __call__(self, model: Mimi, step: int) -> dict[str, float]:
        """Measure a model, and keep it if it is the best. Returns what to log."""
        recipe = self._recipe
        result = evaluate(model, self._clips, [recipe.num_quantizers], visqol=False, workers=1)
        quality = result.qualities[0]
        measured = {"valid/mel": quality.mel_distance, "valid/stoi": quality.stoi}
        best = self._best()
        # A run that was killed in a validation repeats it, and may have kept this model already.
        if best is None or step == best["step"] or self._is_better(measured, best):
            model.save_pretrained(self._out / "model")
            with atomic_path(self._out / BEST) as file:
                file.write_text(json.dumps({"step": step, **measured}) + "\n")
        return measured

    def _is_better(self, new: dict[str, float], old: dict[str, float]) -> bool:
        match self._recipe.measure:
            case "mel":
                return new["valid/mel"] < old["valid/mel"]
            case "stoi":
                return new["valid/stoi"] > old["valid/stoi"]
        return True

    def _best(self) -> dict[str, float] | None:
        file = self._out / BEST
        return json.loads(file.read_text()) if file.exists() else None
