"""Models are found under every kind of name; other names get a helpful error."""

from pathlib import Path

import huggingface_hub
import pytest
from safetensors.numpy import save_file

from mimi_jax import Mimi, checkpoint
from tests.checkpoint.folders import assert_same_model


def test_bundled_models_load():
    assert checkpoint.bundled_models() == ["mini"]
    config = Mimi.from_pretrained("mini").config
    assert (config.sampling_rate, config.frame_rate, config.frame_size) == (24_000, 12.5, 1920)


def test_unknown_names(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"unknown model 'maxi': give a bundled model \(mini\)"):
        Mimi.from_pretrained("maxi")
    with pytest.raises(FileNotFoundError, match=r"unknown model 'out/model\.safetensors'"):
        Mimi.from_pretrained("out/model.safetensors")
    with pytest.raises(FileNotFoundError, match=r"holds model\.safetensors or params/, found neither"):
        Mimi.from_pretrained(tmp_path)
    save_file({}, tmp_path / "model.safetensors")
    with pytest.raises(FileNotFoundError, match=r"holds a config\.json, found none"):
        Mimi.from_pretrained(tmp_path)


def test_hub(base: Path, monkeypatch: pytest.MonkeyPatch):
    asked = []

    def download(repository: str, filename: str) -> str:
        asked.append((repository, filename))
        return str(base / filename)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert_same_model(Mimi.from_pretrained("kyutai/mimi"), Mimi.from_pretrained(base))
    assert asked == [("kyutai/mimi", "config.json"), ("kyutai/mimi", "model.safetensors")]


def test_hub_offline_is_one_clear_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(FileNotFoundError) as error:
        Mimi.from_pretrained("kyutai/mimi")
    assert str(error.value).startswith("cannot get model 'kyutai/mimi' from the Hugging Face Hub: ")
    assert "\n" not in str(error.value)
