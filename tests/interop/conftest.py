import functools

import pytest

from tests.interop.others import save_safetensors


@pytest.fixture
def write_model(tmp_path):
    """Writes a safetensors file, with this config.json beside it."""
    return functools.partial(save_safetensors, tmp_path / "model" / "model.safetensors")
