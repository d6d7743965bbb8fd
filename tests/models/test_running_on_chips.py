import types

import numpy as np
import pytest

from mae_jax.models.config import SIZES, MAEConfig
from mae_jax.models.execution import describe_execution, fit_step, kept_bytes


def fitted(platform: str, size: str = "base", rows: int = 128, fsdp: int = 1, gib: int = 100, **model) -> MAEConfig:
    device = types.SimpleNamespace(platform=platform, memory_stats=lambda: {"bytes_limit": gib * 2**30})
    shape = {"data": 1, "fsdp": fsdp, "tensor": 1}
    mesh = types.SimpleNamespace(devices=np.array([device] * fsdp), local_devices=[device], shape=shape)
    dtype = "float32" if platform == "cpu" else "bfloat16"
    return fit_step(MAEConfig(**SIZES[size] | dict(dtype=dtype) | model), mesh, rows)


@pytest.mark.parametrize(
    "arguments, unroll, remat",
    [
        (dict(platform="cpu"), (12, 12), (None, None)),
        (dict(platform="cpu", size="large"), (1, 1), (None, None)),
        (dict(platform="cpu", fsdp=2), (1, 1), (None, None)),
        (dict(platform="cpu", remat=True), (1, 1), (True, True)),
        (dict(platform="gpu"), (12, 8), (False, False)),
        (dict(platform="gpu", size="huge"), (32, 8), (False, False)),
        (dict(platform="gpu", depth=33), (1, 8), (False, False)),
        (dict(platform="gpu", gib=2), (12, 8), (True, True)),
        (dict(platform="gpu", gib=2, fsdp=8), (12, 8), (False, False)),  # an eighth of the images each
        (dict(platform="gpu", gib=2, remat=False), (12, 8), (False, False)),
        (dict(platform="gpu", scan_unroll=2), (2, 2), (False, False)),
        (dict(platform="tpu"), (1, 8), (True, False)),
        (dict(platform="tpu", depth=4), (4, 8), (False, False)),
    ],
    ids=str,
)
def test_blocks_are_unrolled_and_recomputed_as_the_chip_and_its_memory_ask(arguments, unroll, remat):
    model = fitted(**arguments)
    stacks = model.blocks, model.decoder_blocks
    assert tuple(blocks.unroll for blocks in stacks) == unroll
    assert tuple(blocks.remat for blocks in stacks) == remat


def test_what_blocks_keep_is_estimated_within_a_fifth_of_what_is_compiled_for_an_h200():
    """Temporaries of `benchmarks.chip_cost`, jax 0.10.2: GiB that contain the gradients, too."""
    for size, rows, compiled, parameters in (("base", 512, 20.9, 112e6), ("large", 256, 16.9, 330e6)):
        model = MAEConfig(**SIZES[size], dtype="bfloat16", attention="pallas")
        found = kept_bytes(model, rows, masked=True) / 2**30
        assert found == pytest.approx(compiled - 4 * parameters / 2**30, rel=0.2)


def test_a_run_says_how_its_blocks_are_computed():
    assert describe_execution(fitted("cpu")) == "float32 products, attention by xla, blocks unrolled"
    text = describe_execution(fitted("tpu"))
    assert text == "bfloat16 products, attention by xla, encoder in a loop, recomputed, decoder unrolled"
    assert describe_execution(fitted("tpu"), masked=False).endswith("blocks in a loop, recomputed")
