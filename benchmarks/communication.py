"""What the compiled training step sends, beside what theory says: `python -m benchmarks.communication`.

Compiles the pre-training step of a small ViT in float32 for meshes of 8 emulated devices, reads the collectives from
the compiled programs, and prints their bytes (payload, of one device and one step) beside those of
`collectives.ideal`, as a Markdown table. Nothing is run.
"""

import functools
from collections import defaultdict

import jax
import numpy as np
from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

from benchmarks.collectives import Collective, ideal
from benchmarks.mesh_memory import step_cost
from configs import common
from mae_jax.models.config import MAEConfig
from mae_jax.models.mae import init_params
from mae_jax.runtime.mesh import AXES
from mae_jax.training.plan import devices_for

SIZES = dict(
    image_size=64, patch_size=8, width=128, depth=6, num_heads=8, decoder_width=64, decoder_depth=2, decoder_num_heads=8
)
BATCH = 64
RUNS = (  # (data, fsdp, tensor), parts that the batch is cut into
    ((8, 1, 1), 1), ((8, 1, 1), 4), ((1, 8, 1), 1), ((1, 8, 1), 4), ((1, 1, 8), 1), ((2, 2, 2), 1), ((2, 2, 2), 4),
)  # fmt: skip


def main() -> None:
    devices = devices_for("cpu:8")
    print(f"ViT of {SIZES}, batch {BATCH}, float32, jax {jax.__version__}\n")
    print("| data x fsdp x tensor | parts | collective | axes | times | KiB sent | KiB in theory | ratio |")
    print("|---|---|---|---|--:|--:|--:|--:|")
    for shape, parts in RUNS:
        _, collectives = step_cost(settings(parts), shape, devices)
        sent, expected = total(collectives), theory(shape, parts)
        for key in sorted(sent.keys() | expected.keys()):
            times, size = sent.get(key, (0, 0))
            _, wanted = expected.get(key, (0, 0))
            ratio = f"{size / wanted:.4f}" if wanted else "(numbers)"
            print(
                f"| {' x '.join(map(str, shape))} | {parts} | {key[0]} | {'+'.join(key[1])} | {times} | "
                f"{size / 1024:,.1f} | {wanted / 1024:,.1f} | {ratio} |",
                flush=True,
            )


def settings(parts: int = 1) -> ConfigDict:
    config = common.get_config()
    config.model.update(SIZES)
    config.data.batch_size, config.train.accumulate_steps = BATCH, parts
    return config


def theory(shape: tuple[int, int, int], parts: int) -> dict[tuple, tuple[int, int]]:
    """What a step should send, (kind, axes) -> (executions, bytes)."""
    model, mesh = MAEConfig(**settings().model), dict(zip(AXES, shape, strict=True))
    shapes = jax.eval_shape(functools.partial(init_params, model), jax.random.key(0))
    flat = {path: int(np.prod(leaf.shape)) for path, leaf in flatten_dict(shapes).items()}

    def count(select) -> int:
        return sum(size for path, size in flat.items() if select(path))

    def is_kernel(path) -> bool:
        return path[-1] == "kernel"

    def is_columns_bias(path) -> bool:  # split with the columns over tensor
        return path[-1] == "bias" and path[-2] in ("qkv", "fc1")

    images = BATCH // (shape[0] * shape[1])
    visible = 1 + model.num_visible()
    halves = (("encoder", model.depth, visible * model.width),
              ("decoder", model.decoder_depth, (1 + model.num_patches) * model.decoder_width))  # fmt: skip
    found: list[Collective] = []
    for half, depth, stream in halves:
        kernels = count(lambda path, half=half: is_kernel(path) and path[:2] == (half, "blocks"))
        found += ideal(mesh, split=kernels, whole=0, stream=images * stream, depth=depth)
    # What is not in the blocks is not split over tensor, and stays from the forward to the backward pass.
    others = count(lambda path: is_kernel(path) and path[1] != "blocks")
    vectors = count(lambda path: not is_kernel(path) and not is_columns_bias(path))
    vectors += count(is_columns_bias) // shape[2]
    outside = ideal(mesh | {"tensor": 1}, split=others, whole=vectors, regather=False)
    # The batch's parts repeat what is done for the blocks; gradients are summed over data once.
    repeated = [c for c in found for _ in range(parts if c.kind != "all-reduce" else 1)]
    return total(repeated + [c for c in outside for _ in range(parts if c.kind == "reduce-scatter" else 1)])


def total(found: list[Collective]) -> dict[tuple, tuple[int, int]]:
    """(kind, axes) -> (executions, bytes)."""
    sums: dict[tuple, list[int]] = defaultdict(lambda: [0, 0])
    for collective in found:
        row = sums[collective.kind, collective.axes]
        row[0] += collective.executions
        row[1] += collective.bytes
    return {key: tuple(row) for key, row in sums.items()}


if __name__ == "__main__":
    main()
