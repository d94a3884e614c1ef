"""Where a model is: in this package, in a folder or file, or on the Hugging Face Hub."""

import re
from pathlib import Path

BUNDLED = Path(__file__).parents[1] / "models"


def bundled_models() -> list[str]:
    """The names of the models that come with this package."""
    return sorted(file.parent.name for file in BUNDLED.glob("*/config.json"))


def find(name: str | Path) -> Path:
    """The folder or the .safetensors file of a model.

    Args:
        name: a bundled model, a folder, a file, or a repository of the Hugging Face Hub, which is downloaded
            if it is not in the Hub's cache yet.

    Raises:
        FileNotFoundError: there is no model of that name, or the Hub cannot be reached.
    """
    if str(name) in bundled_models():
        return BUNDLED / name
    path = Path(name)
    if path.exists():
        if path.is_dir() and not ((path / "params").is_dir() or (path / "model.safetensors").is_file()):
            raise FileNotFoundError(
                f"{path}: a model folder holds model.safetensors or params/, found neither"
            )
        return path
    if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", str(name)) and path.suffix != ".safetensors":
        return _download(str(name))
    raise FileNotFoundError(
        f"unknown model {str(name)!r}: give a bundled model ({', '.join(bundled_models())}), a folder, a"
        " .safetensors file, or a Hugging Face repository such as kyutai/mimi"
    )


def _download(repository: str) -> Path:
    """Get a model from the Hugging Face Hub or from its cache, and return its folder."""
    import huggingface_hub

    try:
        config = huggingface_hub.hf_hub_download(repository, "config.json")
        huggingface_hub.hf_hub_download(repository, "model.safetensors")
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise FileNotFoundError(
            f"cannot get model {repository!r} from the Hugging Face Hub: {reason} (check the name and the"
            " connection, or give a local folder)"
        ) from None
    return Path(config).parent
