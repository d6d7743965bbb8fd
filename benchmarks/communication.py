"""What the compiled training step sends, beside what theory says: `python -m benchmarks.communication`.

Compiles the pre-training step of a small ViT in float32 for meshes of 8 emulated devices, reads the collectives from
the compiled programs, and prints their bytes (payload, of one device and one step) beside those of
`training.communication.ideal`, as a Markdown table. Nothing is run.
"""

import functools
from collections import defaultdict

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

from configs import common
from mae_jax.mesh import AXES, make_mesh
from mae_jax.models.mae import init_params
from mae_jax.models.mae_config import MAEConfig
from mae_jax.models.masking import num_visible
from mae_jax.tasks.pretrain import make_loss_fn
from mae_jax.training.communication import Collective, ideal
from mae_jax.training.dry_run import devices_for, try_step
from mae_jax.training.optimizers import make_optimizer, make_schedule
from mae_jax.training.state import Variables, abstract_state, make_init
from mae_jax.training.step import make_train_step

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
        sent, expected = collectives(shape, parts, devices), theory(shape, parts)
        for key in sorted(sent.keys() | expected.keys()):
            times, size = sent.get(key, (0, 0))
            _, wanted = expected.get(key, (0, 0))
            ratio = f"{size / wanted:.4f}" if wanted else "(numbers)"
            print(
                f"| {' x '.join(map(str, shape))} | {parts} | {key[0]} | {'+'.join(key[1])} | {times} | "
                f"{size / 1024:,.1f} | {wanted / 1024:,.1f} | {ratio} |",
                flush=True,
            )


def settings() -> ConfigDict:
    config = common.get_config()
    config.model.update(SIZES)
    return config


def collectives(shape: tuple[int, int, int], parts: int, devices: list) -> dict[tuple, tuple[int, int]]:
    """(kind, axes) -> (executions, bytes) of the compiled step."""
    config = settings()
    model = MAEConfig(**config.model)
    mesh = make_mesh(ConfigDict(dict(zip(AXES, shape, strict=True))), devices)
    schedule = make_schedule(config.optimizer, BATCH, warmup_steps=1, total_steps=10)
    optimizer = make_optimizer(config.optimizer, schedule)
    state = abstract_state(make_init(lambda key: Variables(init_params(model, key)), optimizer), mesh)
    step_fn = make_train_step(make_loss_fn(config, model), optimizer, schedule, mesh, parts)
    images = {"image": jax.ShapeDtypeStruct((BATCH, *model.image_size, model.channels), jnp.uint8)}
    return total(try_step(step_fn, state, images, jax.random.key(0), mesh).collectives)


def theory(shape: tuple[int, int, int], parts: int) -> dict[tuple, tuple[int, int]]:
    """The same as it should be: parameters by kind, and activations of blocks of two widths."""
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
    visible = 1 + num_visible(model.num_patches, model.mask_ratio)
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
    sums: dict[tuple, list[int]] = defaultdict(lambda: [0, 0])
    for collective in found:
        row = sums[collective.kind, collective.axes]
        row[0] += collective.executions
        row[1] += collective.bytes
    return {key: tuple(row) for key, row in sums.items()}


if __name__ == "__main__":
    main()
