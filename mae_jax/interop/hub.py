"""Models on the Hugging Face hub: `hf://owner/name` or `hf://owner/name@revision`."""

import re
from pathlib import Path

from mae_jax.runtime.errors import UserError, first_line

SETTINGS = ("config.json", "preprocessor_config.json")
SAFETENSORS = ("*.safetensors", "*.safetensors.index.json")
PYTORCH = ("pytorch_model*.bin", "pytorch_model.bin.index.json", "*.pth")  # fetched if there are no safetensors
TIMEOUT = 20  # seconds to wait for the hub's answer


def is_hub(path: str | Path) -> bool:
    return str(path).startswith("hf:/")  # as a Path it loses one of its slashes


def fetch(address: str) -> Path:
    """Downloads a model's files, unless huggingface_hub has them in its cache; returns their folder."""
    found = re.fullmatch(r"hf:/+([\w.-]+/[\w.-]+)(?:@(\S+))?", address)
    if not found:
        raise UserError(f"{address} is not of the form hf://owner/name or hf://owner/name@revision")
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise UserError(f"reading {address} needs another package: pip install huggingface_hub") from error
    for weights in (SAFETENSORS, PYTORCH):
        patterns = [*SETTINGS, *weights]
        try:
            folder = snapshot_download(found[1], revision=found[2], allow_patterns=patterns, etag_timeout=TIMEOUT)
        except Exception as error:  # the package and its network libraries raise many types
            raise UserError(
                f"{address} cannot be downloaded ({type(error).__name__}: {first_line(error)}); check the name and the "
                "network, or fetch its files elsewhere and give their folder"
            ) from error
        if any(file.suffix in (".safetensors", ".bin", ".pth") for file in Path(folder).iterdir()):
            return Path(folder)
    raise UserError(f"{address} has no weights ({', '.join((*SAFETENSORS, *PYTORCH))})")
