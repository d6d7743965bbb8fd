"""Memory of a device for pre-training on meshes that need not be here: `python -m benchmarks.mesh_memory --help`.

Compiles the real step of the recipe in configs/vit_*.py (bfloat16 products, with and without remat) and asks the
compiler; runs nothing. TPUs need libtpu, GPUs jax-cuda12-pjrt (see docs/running.md). Prints a Markdown table.
"""

import argparse
import sys
import time

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from benchmarks.collectives import Collective, read_collectives, table
from configs import common
from mae_jax.models.config import SIZES, MAEConfig
from mae_jax.models.execution import fit_step
from mae_jax.models.mae import init_params
from mae_jax.objectives.objective import Variables
from mae_jax.objectives.pretrain import make_loss_fn
from mae_jax.runtime.errors import UserError
from mae_jax.runtime.memory import bytes_on_a_device
from mae_jax.runtime.mesh import AXES, fit_to_chip, make_mesh
from mae_jax.runtime.seeds import make_key
from mae_jax.training.optimizers import make_optimizer, make_schedule
from mae_jax.training.plan import compile_train_step, devices_for, memory_in_bytes
from mae_jax.training.step import TrainState, abstract_state, make_init, make_train_step

GIB = 2**30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--topology", default="v5p:2x2x1", help="such as v5e:4x8, v5p:4x4x4, h100:8 or cpu:64")
    parser.add_argument("--sizes", nargs="+", default=["base", "large", "huge"], choices=SIZES)
    parser.add_argument("--batch", type=int, default=4096, help="images a step, over all devices")
    parser.add_argument("--fsdp", type=int, nargs="+", default=[1], help="sizes of this axis, one after the other")
    parser.add_argument("--tensor", type=int, nargs="+", default=[1])
    parser.add_argument("--accumulate", type=int, default=1, help="parts that a batch is cut into")
    parser.add_argument("--remat", choices=("yes", "no", "both"), default="both")
    parser.add_argument("--communication", action="store_true", help="print what each step sends, too")
    args = parser.parse_args()

    devices = devices_for(args.topology)
    kind, parts = devices[0].device_kind, args.accumulate
    print(f"{args.topology}: {len(devices)} x {kind}, batch {args.batch} in {parts} part(s), jax {jax.__version__}\n")
    print("GiB and MiB are of one device and one step; what it sends is payload (benchmarks/collectives.py).\n")
    print("| model | data x fsdp x tensor | remat | params | optimizer | temporaries | GiB | sends MiB | compiled in |")
    print("|---|---|---|---|---|---|---|---|---|")
    for size in args.sizes:
        for fsdp, tensor in [(fsdp, tensor) for fsdp in args.fsdp for tensor in args.tensor]:
            for remat in {"yes": [True], "no": [False], "both": [False, True]}[args.remat]:
                shape = (len(devices) // (fsdp * tensor), fsdp, tensor)
                head = f"| {size} | {' x '.join(map(str, shape))} | {'yes' if remat else 'no'} "
                config = common.get_config()
                config.model.update(SIZES[size], dtype="bfloat16", remat=remat)
                config.data.batch_size, config.train.accumulate_steps = args.batch, parts
                try:
                    cost = step_cost(config, shape, devices)
                except UserError as error:
                    print(f"{head}| | | | does not fit | | |", flush=True)
                    print(error, file=sys.stderr)
                    continue
                print(head + row(*cost), flush=True)
                if args.communication:
                    print(table(cost[-1] or []), file=sys.stderr)


def row(step: jax.stages.Compiled, state: TrainState, seconds: float, collectives: list[Collective] | None) -> str:
    """The cells of a table that a compiled step fills."""
    temporaries = step.memory_analysis().temp_size_in_bytes
    sizes = (bytes_on_a_device(state.params), bytes_on_a_device(state.opt_state), temporaries)
    sent = "?" if collectives is None else f"{sum(c.bytes for c in collectives) / 2**20:,.0f}"
    gib = " | ".join(f"{size / GIB:.2f}" for size in sizes)
    return f"| {gib} | **{memory_in_bytes(step) / GIB:.2f}** | {sent} | {seconds:.0f} s |"


def step_cost(config: ConfigDict, shape: tuple[int, int, int], devices: list) -> tuple:
    """The pre-training step of a config on a mesh of this shape (data, fsdp, tensor): what `row` takes.

    No data are read. What it sends is None if that is unknown.
    """
    fit_to_chip(config.model, devices[0])
    model, batch = MAEConfig(**config.model), config.data.batch_size
    mesh = make_mesh(ConfigDict(dict(zip(AXES, shape, strict=True))), devices)
    schedule = make_schedule(config.optimizer, batch, warmup_steps=1, total_steps=10)
    optimizer = make_optimizer(config.optimizer, schedule)
    state = abstract_state(make_init(lambda key: Variables(init_params(model, key)), optimizer), mesh)
    parts = config.train.accumulate_steps
    loss_fn = make_loss_fn(config, fit_step(model, mesh, batch // parts))
    step_fn = make_train_step(loss_fn, optimizer, schedule, mesh, parts)
    images = jax.ShapeDtypeStruct((batch, *model.image_size, model.channels), jnp.uint8)
    key, start = jax.eval_shape(lambda: make_key(config.seed, "train")), time.perf_counter()
    step = compile_train_step(step_fn, state, {"image": images}, key, mesh)
    seconds = time.perf_counter() - start
    try:
        return step, state, seconds, read_collectives(step.as_text(), mesh.shape)
    except jax.errors.JaxRuntimeError:  # seen with a libtpu newer than this JAX
        return step, state, seconds, None


if __name__ == "__main__":
    main()
