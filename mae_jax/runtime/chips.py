"""Accelerators that programs can be compiled for without one: what they can do, and their description for XLA."""

import importlib.util
import os
from typing import NamedTuple

import jax

from mae_jax.runtime.errors import UserError, first_line

GIB = 2**30
MEMORY_FRACTION = "XLA_CLIENT_MEM_FRACTION"  # the variable that sets which share of a GPU's memory JAX takes
# Measured on an H200: 790 of the data sheet's 989 TFLOP/s in large bfloat16 products, and 4.2 of its 4.8 TB/s. The
# other GPUs are taken to reach the same shares of theirs.
REACHED_FLOPS, REACHED_BANDWIDTH = 790 / 989, 4.2 / 4.8


class Chip(NamedTuple):
    """One accelerator, from its maker's data sheet if not said otherwise."""

    name: str
    kinds: tuple[str, ...]  # JAX's `device_kind`
    peak_flops: float  # bfloat16, dense, a second
    memory: int  # bytes
    memory_bandwidth: float  # bytes a second
    description: dict[str, int | float] = {}  # of a GPU: XLA's fields that differ from chip to chip
    clock: float = 0.0  # of a TPU: cycles a second

    @property
    def usable_memory(self) -> int:
        """Bytes that JAX takes by default: three quarters of a GPU's, all of a TPU's."""
        if not self.description:
            return self.memory
        older = os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION")
        return int(self.memory * float(os.environ.get(MEMORY_FRACTION) or older or 0.75))

    @property
    def product_rate(self) -> float:
        """FLOPs a second that large bfloat16 products reach on a GPU."""
        return self.peak_flops * REACHED_FLOPS

    @property
    def bandwidth(self) -> float:
        """Bytes a second that a GPU's kernels reach."""
        return self.memory_bandwidth * REACHED_BANDWIDTH


# Facts of XLA's own descriptions: openxla/xla, xla/backends/gpu/target_config/specs/{h100_sxm,h200,a100_sxm_*}.txtpb.
HOPPER = dict(
    shared_memory_per_core=233472, shared_memory_per_block_optin=232448, core_count=132, fpus_per_core=128,
    l2_cache_size=52428800, clock_rate_ghz=1.98, major=9,
)  # fmt: skip
AMPERE = dict(
    shared_memory_per_core=167936, shared_memory_per_block_optin=166912, core_count=108, fpus_per_core=64,
    l2_cache_size=41943040, clock_rate_ghz=1.41, major=8,
)  # fmt: skip
_CHIPS = (
    # NVIDIA's data sheets of the H100 and H200 (SXM; half of the TFLOP/s that they give with sparsity) and of the A100.
    Chip("h200", ("NVIDIA H200",), 989e12, 151397597184, 4.8e12, HOPPER),
    Chip("h100", ("NVIDIA H100 80GB HBM3",), 989e12, 84942979072, 3.35e12, HOPPER),
    Chip("a100-80", ("NVIDIA A100-SXM4-80GB",), 312e12, 85100068864, 2.039e12, AMPERE),
    Chip("a100-40", ("NVIDIA A100-SXM4-40GB",), 312e12, 42331013120, 1.555e12, AMPERE),
    # cloud.google.com/tpu/docs: v5e, v5p, v6e. No clock is published. It is peak / FLOPs a cycle: of four 128 x 128
    # matrix units in a v5e and eight in a v5p; of a v6e 524,288, since the compiler counts up to 410,000 a cycle.
    Chip("v5e", ("TPU v5 lite", "TPU v5e"), 197e12, 16 * GIB, 819e9, clock=197e12 / (4 * 2 * 128**2)),
    Chip("v5p", ("TPU v5", "TPU v5p"), 459e12, 95 * GIB, 2765e9, clock=459e12 / (8 * 2 * 128**2)),
    Chip("v6e", ("TPU v6 lite", "TPU v6e"), 918e12, 32 * GIB, 1638e9, clock=918e12 / 524288),
)  # fmt: skip
CHIPS = {chip.name: chip for chip in _CHIPS}
GPUS = {name: chip for name, chip in CHIPS.items() if chip.description}
# What does not differ, and what XLA only copies: text of a GpuTargetConfigProto.
DESCRIPTION = """
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048 shared_memory_per_block: 49152
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  device_address_bits: 64 pcie_bandwidth: 34359738368 ecc_enabled: true device_vendor: "NVIDIA Corporation"
  driver_version: "13.0.0" runtime_version: "12.8.0" compile_time_toolkit_version: "12.8.0" dnn_version: "9.10.0"
  name: "{kind}" memory_bandwidth: {bandwidth} device_memory_size: {memory}
  cuda_compute_capability {{ major: {major} }} {rest}
}}
platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 10 }} device_description_str: "{kind}"
"""


def chip_of(device: jax.Device) -> Chip | None:
    """The facts of a device; None if it is none of `CHIPS`."""
    return next((chip for chip in CHIPS.values() if device.device_kind in chip.kinds), None)


def has_cuda_compiler() -> bool:
    try:
        return any(importlib.util.find_spec(f"jax_plugins.xla_cuda{version}") for version in (12, 13))
    except ModuleNotFoundError:  # there are no plugins at all
        return False


def gpu_devices(name: str, count: int) -> list[jax.Device]:
    """`count` GPUs of a kind of `GPUS` that are not here: programs compile for them and do not run.

    Needs NVIDIA's compiler, which is a Python package, but neither GPU nor driver.
    """
    packages = " ".join(f"{package}=={jax.__version__}" for package in ("jax-cuda12-pjrt", "jax-cuda12-plugin"))
    remedy = f"pip install --no-deps {packages}"
    if not has_cuda_compiler():
        raise UserError(f"{name} needs XLA's compiler for NVIDIA, but no GPU: {remedy}")
    chip = GPUS[name]
    fields = dict(chip.description)
    text = DESCRIPTION.format(
        kind=chip.kinds[0], bandwidth=int(chip.memory_bandwidth), memory=chip.memory, major=fields.pop("major"),
        rest=" ".join(f"{key}: {value}" for key, value in fields.items()),
    )  # fmt: skip
    from jax.experimental import topologies

    try:
        found = topologies.get_topology_desc("", platform="cuda", target_config=text, topology=f"1x1x{count}")
    except (RuntimeError, AttributeError) as error:  # errors of JAX, and of a compiler for another JAX
        raise UserError(f"XLA's compiler for NVIDIA fails ({first_line(error)}); {remedy}") from error
    return list(found.devices)
