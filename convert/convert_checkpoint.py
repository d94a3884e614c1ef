"""Convert a Mimi checkpoint between the layouts of this package, `transformers` and Kyutai.

    python convert/convert_checkpoint.py SRC DST --to flax|transformers|kyutai

This is `mimi-jax convert` for one more kind of source, which needs torch: SRC may also be a PyTorch file
(.bin, .pt, .pth, .ckpt). A `config.json` must be beside it, unless it has the published architecture.
"""

import shutil
import sys
import tempfile
from pathlib import Path

from mimi_jax import cli
from mimi_jax.checkpoint.find import PYTORCH_SUFFIXES


def unpickle(source: Path, folder: Path) -> None:
    """Rewrite a PyTorch file as a model folder. The tensors do not change."""
    import torch
    from safetensors.torch import save_file

    tensors = torch.load(source, map_location="cpu", weights_only=True)
    for wrapper in ("model", "best_state", "state_dict"):  # a training loop may have wrapped the model
        tensors = tensors.get(wrapper, tensors)
    tensors = {name: value.clone().contiguous() for name, value in tensors.items() if torch.is_tensor(value)}
    save_file(tensors, folder / "model.safetensors")
    config = source.parent / "config.json"
    if config.is_file():
        shutil.copy(config, folder)
    else:
        (folder / "config.json").write_text("{}")


def main(arguments: list[str]) -> int:
    pickles = [
        i for i, word in enumerate(arguments) if word.endswith(PYTORCH_SUFFIXES) and Path(word).is_file()
    ]
    with tempfile.TemporaryDirectory() as folder:
        for i in pickles[:1]:
            try:
                unpickle(Path(arguments[i]), Path(folder))
            except Exception as error:  # unpickling can fail in any way
                reason = str(error).splitlines()[0]
                print(f"{arguments[i]}: not a PyTorch checkpoint of tensors ({reason})", file=sys.stderr)
                return 1
            arguments = [*arguments[:i], folder, *arguments[i + 1 :]]
        return cli.main(["convert", *arguments])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
