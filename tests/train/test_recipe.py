from pathlib import Path

import pytest

from mimi_jax import MimiConfig
from mimi_jax.train.recipe import Recipe

CONFIGS = Path(__file__).parents[2] / "configs"


def read(tmp_path: Path, text: str) -> Recipe:
    file = tmp_path / "recipe.toml"
    file.write_text(text)
    return Recipe.from_toml(file)


def test_the_defaults_are_the_published_values():
    assert Recipe.from_toml(CONFIGS / "mimi.toml") == Recipe(checkpoint_every=10_000)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.toml")), ids=lambda path: path.stem)
def test_configs_are_read(path: Path):
    assert isinstance(Recipe.from_toml(path), Recipe)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.toml")), ids=lambda path: path.stem)
def test_only_the_bundled_model_learned_from_magnitudes(path: Path):
    of_magnitudes = path.stem.startswith("mini") and path.stem != "mini_power"
    assert Recipe.from_toml(path).losses.mel_power == (1 if of_magnitudes else 2)


def test_fields_of_all_types(tmp_path: Path):
    recipe = read(
        tmp_path,
        """
        steps = 10
        precision = "default"
        [model]
        num_filters = 8
        [data]
        seconds = 4
        gain = [0, 3.5]
        weights = {a = 1, b = 2.5}
        [quantizer]
        same = false
        """,
    )
    assert recipe.model == MimiConfig(num_filters=8, num_quantizers=8)
    assert recipe.data.seconds == 4.0 and type(recipe.data.seconds) is float
    assert recipe.data.gain == (0.0, 3.5) and recipe.data.weights == {"a": 1.0, "b": 2.5}
    assert not recipe.quantizer.same and recipe.steps == 10


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("step = 3", "unknown field step; the fields here are model, data"),
        ("[losses]\nmels = 1", "unknown field losses.mels"),
        ("[model]\nfilters = 1", "unknown field 'filters'"),
        ("steps = 1.5", "steps must be an integer, got 1.5"),
        ("[data]\ngain = [1]", r"data.gain must be two numbers, got \[1\]"),
        ("[data]\nweights = {a = 'x'}", "data.weights must be a table of numbers"),
        ("[data]\ngain = [6, -10]", r"data.gain must be finite, the lower number first, got \(6.0, -10.0\)"),
        ("[data]\ngain = [-inf, 0]", "data.gain must be finite"),
        ("[data]\nweights = {a = 1, b = -1}", "data.weights must be finite, at least 0, and not all 0, got"),
        ("[data]\nweights = {a = 0, b = 0}", "data.weights must be finite, at least 0, and not all 0"),
        ("[losses]\nmel_power = 3", r"losses.mel_power must be 1 \(magnitudes\) or 2 \(power\), got 3.0"),
        ("data = 3", "data must be a table"),
        ("mode = 'encoder'", "mode must be one of full, decoder, got 'encoder'"),
        ("mode = 'decoder'", "init must name the model whose decoder to tune, got ''"),
        ("[data]\nseconds = 1.03", "data.seconds must be a multiple of a frame, 0.08 s, got 1.03"),
        ("checkpoint_every = 150", "checkpoint_every must be a positive multiple of log_every=100"),
        ("steps_at_once=3", "steps_at_once must be positive and divide log_every=100"),
        ("[discriminator]\nwindows=[1023]", "discriminator.windows must be multiples of 4"),
        ("[discriminator]\nwindows=[1.5]", "discriminator.windows must be a list of integers"),
        ("[discriminator]\nseconds=0.05", "discriminator.seconds must be 0, or at least the longest window"),
        ("[losses]\nwaveform=0\nmel=0\nadversarial=0\nfeatures=0", "losses must not all be 0"),
        ("checkpoint_every = 0", "checkpoint_every must be a positive multiple of log_every=100"),
        ("steps = 0", "steps must be positive, got 0"),
        ("[optimizer]\nema_decay = 9.9", r"optimizer.ema_decay must lie in \[0, 1\], got 9.9"),
        (
            "[optimizer]\nlearning_rate = -1",
            "optimizer.learning_rate must be finite and at least 0, got -1.0",
        ),
        (
            "[discriminator]\nhead_start = -1",
            "discriminator.head_start must be finite and at least 0, got -1",
        ),
        ("[losses]\nwaveform=0\nmel=0\nadversarial_start=5", "losses.adversarial_start must be 0 if"),
        (
            "mode='decoder'\ninit='mini'\n[losses]\ndistillation=1",
            "losses.distillation must be 0 in mode dec",
        ),
        ("steps = ", "Invalid value"),
    ],
)
def test_errors_name_the_field(tmp_path: Path, text: str, error: str):
    with pytest.raises(ValueError, match=error) as caught:
        read(tmp_path, text)
    assert str(caught.value).startswith(str(tmp_path / "recipe.toml"))
