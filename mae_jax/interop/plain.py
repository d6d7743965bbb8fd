"""Plain content of other programs' files, such as JSON and what stands beside tensors, read without trusting it."""

import argparse
import json
import re
from pathlib import Path, PurePath
from typing import Any

LARGEST_JSON = 2**24  # bytes; config.json of a classifier of 20,000 classes has 2^20
NOT_READ = "not read"


def read_json(path: Path) -> dict[str, Any]:
    """The object that a JSON file holds.

    Raises:
      OSError: if it cannot be read.
      ValueError, RecursionError: if it holds anything else.
    """
    if path.stat().st_size > LARGEST_JSON:
        raise ValueError(f"it has {path.stat().st_size:,} bytes")
    found = parse_json(path.read_bytes())
    if not isinstance(found, dict):
        raise ValueError("it holds no object")
    return found


def parse_json(text: str | bytes) -> Any:
    """What JSON says. Integers of 20 digits and more, which are no sizes or counts, become floats, maybe infinite."""
    return json.loads(text, parse_int=lambda digits: int(digits) if len(digits) < 20 else float(digits))


def make_plain(torch: Any, name: str, value: Any) -> Any:
    """An entry of a PyTorch file as JSON could hold it; NOT_READ if it is huge, or a state of training."""

    def simplify(part: Any) -> Any:
        if isinstance(part, argparse.Namespace):
            return vars(part)
        return str(part) if isinstance(part, PurePath | torch.device | torch.dtype) else NOT_READ

    if isinstance(value, dict | list) and re.search("optim|scaler|sched", name):
        return NOT_READ
    text = ""
    try:
        for piece in json.JSONEncoder(default=simplify).iterencode(value):
            text += piece
            if len(text) > 1_000_000:  # a small pickle can hold an endless structure
                return NOT_READ
        return parse_json(text)
    except (TypeError, ValueError, RecursionError):
        return NOT_READ
