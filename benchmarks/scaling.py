"""Scaling on paper: what limits pre-training on 1 to 1024 chips. `python -m benchmarks.scaling [--batch=4096]`.

Nothing here is measured. Each resource's time for one step of a batch is work / rate, with the library's own counts of
FLOPs, parameters and communication; the step takes as long as the slowest of them, as if everything overlapped. Prints
Markdown tables.
"""

import argparse
import math
from typing import NamedTuple

from benchmarks.collectives import RING, Collective, ideal
from mae_jax.models.config import SIZES, MAEConfig
from mae_jax.models.flops import train_flops
from mae_jax.models.mae import abstract_params
from mae_jax.models.parameters import count_parameters
from mae_jax.runtime.chips import CHIPS as FACTS

GIB = 2**30


class Chip(NamedTuple):
    """One accelerator in a cluster."""

    name: str
    peak_flops: float  # bfloat16, dense, a second
    achievable: float  # share of it that training is taken to reach
    memory: float  # bytes
    memory_bandwidth: float  # bytes a second
    near: int  # chips that the fast network joins
    near_bandwidth: float  # bytes a second that a chip sends in it
    far_bandwidth: float  # bytes a second that a chip sends beyond it
    cores: float  # physical cores of the host for each chip


V5P, H100 = FACTS["v5p"], FACTS["h100"]
CHIPS = (
    # cloud.google.com/tpu/docs/v5p: 1200 GB/s of links in both directions over the three axes of a torus, of which a
    # collective is taken to use one, 1200 / 2 / 3 (XLA may use all); 50 Gbit/s beyond the pod of 8960 chips; 104 cores
    # for 4 chips. Share, on the TPU v4 before it: a ViT-B/16 27 % (deit3-jax's README: 300 epochs in 4 h 40 min on a
    # v4-64), ViT-22B 55 % (arXiv 2302.05442).
    Chip("TPU v5p", V5P.peak_flops, 0.40, V5P.memory, V5P.memory_bandwidth, 8960, 200e9, 6.25e9, 26),
    # NVIDIA H100 data sheet, SXM: NVLink 900 GB/s in both directions between 8; DGX H100 data sheet: one 400 Gbit/s
    # ConnectX-7 a GPU, 112 cores for 8. Share: 40 % of the 790 TFLOP/s that large products reach on this architecture.
    Chip("H100 SXM", H100.peak_flops, 0.32, H100.memory, H100.memory_bandwidth, 8, 450e9, 50e9, 14),
)
IMAGES_PER_CORE = 400  # full ImageNet JPEGs read, decoded and cropped a second; we measured 400 to 700 a core
IMAGE_BYTES = 115e3  # of an ImageNet JPEG: the training set's 138 GiB / 1.28 million
OPTIMIZER_BYTES = 28  # a parameter that AdamW moves: reads it, gradient, two moments (16), writes all but the gradient
STATE_BYTES = 16  # a parameter in memory: itself, gradient, two moments, float32
BLOCK_PASSES = 90  # times that a block moves its [tokens, width] bfloat16 to or from memory, forward and backward
USABLE = 0.9  # share of the memory that may be filled
CHIP_COUNTS = tuple(2**exponent for exponent in range(11))


class Model(NamedTuple):
    """What counts about a named size."""

    flops: int  # forward and backward, an image
    parameters: int
    kernels: int  # of them in the blocks' kernels, which fsdp splits
    largest_block: int  # parameters of the largest block's kernels
    moved: int  # bytes that the blocks move to or from memory, an image
    kept: int  # bytes that remat keeps from the forward to the backward pass, an image
    working: int  # bytes of the largest block at work, an image


class Estimate(NamedTuple):
    """Seconds of one step, bytes of one chip."""

    compute: float
    memory_traffic: float
    network: float
    decoding: float
    memory: float
    parts: int  # train.accumulate_steps that make it fit; 0 if none does

    @property
    def seconds(self) -> float:
        """Of a step in which everything overlaps."""
        return max(self[:4])

    @property
    def limit(self) -> str:
        """What takes longest."""
        return ("compute", "memory traffic", "network", "decoding")[self[:4].index(self.seconds)]


def describe_model(size: str) -> Model:
    """The counts of a named size in bfloat16 with the paper's decoder."""
    config = MAEConfig(**SIZES[size], dtype="bfloat16", remat=True)
    params = abstract_params(config)
    visible = config.num_visible()
    stacks = (  # depth, tokens, width, heads
        (config.depth, 1 + visible, config.width, config.num_heads),
        (config.decoder_depth, 1 + config.num_patches, config.decoder_width, config.decoder_num_heads),
    )
    kernels = [_kernels(params[name]["blocks"]) for name in ("encoder", "decoder")]
    return Model(
        train_flops(config),
        count_parameters(params),
        sum(kernels),
        max(count // stack[0] for count, stack in zip(kernels, stacks, strict=True)),
        sum(2 * BLOCK_PASSES * depth * tokens * width for depth, tokens, width, _ in stacks),
        # The residual stream of each block, float32; and a block's activations by Korthikanti et al. 2022 (arXiv
        # 2205.05198, equation 1), 17 of the stream's size and 2.5 of the attention's, here in float32.
        sum(4 * depth * tokens * width for depth, tokens, width, _ in stacks),
        max(int(4 * (17 * tokens * width + 2.5 * heads * tokens**2)) for _, tokens, width, heads in stacks),
    )


def _kernels(blocks: dict) -> int:
    layers = [layer for part in ("attention", "mlp") for layer in blocks[part].values()]
    return sum(math.prod(layer["kernel"].shape) for layer in layers)


def estimate(model: Model, chip: Chip, chips: int, batch: int, layout: str) -> Estimate:
    """Times and memory of a step with the layout "data" (whole copies) or "fsdp" (split over all chips)."""
    images, fsdp = batch / chips, layout == "fsdp"
    shape = {"data": 1 if fsdp else chips, "fsdp": chips if fsdp else 1, "tensor": 1}
    sent = ideal(shape, split=model.kernels, whole=model.parameters - model.kernels, gather_bytes=2)
    whole = model.parameters - (model.kernels if fsdp else 0)
    own = whole + (model.kernels / chips if fsdp else 0)
    fixed = STATE_BYTES * own + (2 * 4 * model.largest_block if fsdp else 0)
    activations = model.kept + model.working
    room = USABLE * chip.memory - fixed
    fits = (parts for parts in CHIP_COUNTS if parts <= images and activations * images / parts <= room)
    return Estimate(
        compute=model.flops * images / (chip.peak_flops * chip.achievable),
        memory_traffic=(OPTIMIZER_BYTES * own + model.moved * images) / chip.memory_bandwidth,
        network=sum(collective_seconds(collective, chip) for collective in sent),
        decoding=images / (chip.cores * IMAGES_PER_CORE),
        memory=fixed + activations * images,
        parts=next(fits, 0),
    )  # fmt: skip


def collective_seconds(collective: Collective, chip: Chip) -> float:
    """Seconds of sending: first round the near ring, then its share round the far one; no latency is counted."""
    near = min(collective.group_size, chip.near)
    far = collective.group_size // near
    ring = RING[collective.kind]
    return collective.bytes * (ring(near) / chip.near_bandwidth + ring(far) / near / chip.far_bandwidth)


def scaling_table(model: Model, chip: Chip, batch: int) -> str:
    """A row for each number of chips."""
    lines = [
        "| chips | images a chip | compute ms | memory traffic ms | network ms, data | fsdp | decoding ms "
        "| images/s at most | limit | GiB (parts), data | fsdp | GB/s read |",
        "|--:|--:|--:|--:|--:|--:|--:|--:|---|--:|--:|--:|",
    ]
    for chips in CHIP_COUNTS:
        data, fsdp = (estimate(model, chip, chips, batch, layout) for layout in ("data", "fsdp"))
        best = data if data.parts and data.network <= fsdp.network else fsdp
        rate = batch / best.seconds
        sizes = (f"{e.memory / GIB:,.1f} ({e.parts or 'never'})" for e in (data, fsdp))
        times = (data.compute, best.memory_traffic, data.network, fsdp.network, data.decoding)
        cells = [f"{1000 * seconds:,.1f}" for seconds in times] + [f"{rate:,.0f}", best.limit, *sizes]
        lines.append(f"| {chips} | {batch / chips:g} | {' | '.join(cells)} | {rate * IMAGE_BYTES / 1e9:,.1f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=4096, help="images a step, over all chips")
    args = parser.parse_args()
    for size in ("base", "large", "huge"):
        model = describe_model(size)
        for chip in CHIPS:
            print(f"### ViT-{size}, {model.parameters / 1e6:.0f} M parameters, {model.flops / 1e9:.1f} GFLOP an image, "
                  f"{chip.name} at {chip.achievable:.0%} of {chip.peak_flops / 1e12:.0f} TFLOP/s\n")  # fmt: skip
            print(scaling_table(model, chip, args.batch), end="\n\n")


if __name__ == "__main__":
    main()
