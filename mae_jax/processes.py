"""The processes of a run: one, or one for each host of a pod. Process 0 is the one that writes."""

import json
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils


def is_main() -> bool:
    """Whether this is process 0, the only one that writes metrics, pictures and results."""
    return jax.process_index() == 0


def from_main(value: Any) -> Any:
    """The value that process 0 gives, in all processes; anything that JSON can hold. All must call it."""
    if jax.process_count() == 1:
        return value
    text = np.frombuffer(json.dumps(value).encode(), np.uint8) if is_main() else np.zeros(0, np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(text))))
    padded = np.resize(text, size) if len(text) else np.zeros(size, np.uint8)
    return json.loads(bytes(multihost_utils.broadcast_one_to_all(padded)).decode())


def wait_for_all(place: str) -> None:
    """Returns when every process has come to this place."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(place)
