import gc
import importlib.util
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh

from mae_jax.objectives.objective import LossDetails, Variables
from mae_jax.runtime.chips import has_cuda_compiler
from mae_jax.runtime.errors import UserError
from mae_jax.runtime.mesh import AXES
from mae_jax.training import plan as training_plan
from mae_jax.training.plan import compile_train_step, describe_chip, describe_cost, devices_for, memory_in_bytes
from mae_jax.training.step import abstract_state, make_init, make_train_step
from tests.runs import ROOT

HAS_LIBTPU = importlib.util.find_spec("libtpu") is not None


def compiled_for(devices):
    """A linear model's step, 16 rows of 8 values to 4, and its mesh."""

    def loss_fn(params, frozen, batch, keys):
        return jnp.mean((batch["x"] @ params["kernel"]) ** 2), LossDetails()

    mesh = Mesh(np.asarray(devices).reshape(-1, 1, 1), AXES)
    optimizer, schedule = optax.adam(0.1), optax.constant_schedule(0.1)
    init = make_init(lambda key: Variables({"kernel": jax.random.normal(key, (8, 4))}), optimizer)
    batch = {"x": jax.ShapeDtypeStruct((16, 8), jnp.float32)}
    step_fn = make_train_step(loss_fn, optimizer, schedule, mesh)
    state, key = abstract_state(init, mesh), jax.eval_shape(lambda: jax.random.key(0))
    return compile_train_step(step_fn, state, batch, key, mesh), state, mesh


def test_a_step_is_measured_without_an_array(monkeypatch):
    gc.collect()
    before = len(jax.live_arrays())
    step, state, mesh = compiled_for(devices_for(None))
    gc.collect()
    assert len(jax.live_arrays()) <= before
    params, adam, total = 8 * 4 * 4, 2 * 8 * 4 * 4 + 4, memory_in_bytes(step)  # and Adam's count
    assert total >= params + adam + 16 // 8 * 8 * 4
    monkeypatch.setattr(training_plan, "MIB", 1)
    text = "\n".join(describe_cost(step, state, mesh, step_flops=8 * 2**30, seconds=0.5))
    assert "in 0.5 s for 8 x" in text and "1.07 GFLOP needed" in text
    assert f"{total:,.1f} MiB: parameters {params:.1f}, optimizer {adam:.1f}, batch" in text


@pytest.mark.parametrize(
    "topology",
    ["", "v5p", "v5p:", "cpu:2x2", "v5p:2x2x2x2", "8", "cpu:-1", "cpu:abc", "cpu:1e9", "v5p:0x0x0", "v5e:4x1234567",
     "h100", "h100:0", "h100:2x2", "h300:8", "cpu:8\n"],
)  # fmt: skip
def test_a_topology_that_cannot_be_read_is_refused(topology):
    with pytest.raises(UserError, match="neither cpu:COUNT nor a TPU slice"):
        devices_for(topology)


@pytest.mark.parametrize("count", [0, 5000, 10**20])
def test_a_number_of_cpus_that_cannot_be_is_refused(count):
    with pytest.raises(UserError, match=f"topology cpu:{count} must be 1 ... 4096"):
        devices_for(f"cpu:{count}")


@pytest.mark.skipif(HAS_LIBTPU, reason="libtpu is here")
def test_tpus_without_libtpu_are_refused_with_the_remedy():
    with pytest.raises(UserError, match=r'pip install "jax\[tpu\]"'):
        devices_for("v5p:2x2x1")


@pytest.mark.skipif(not HAS_LIBTPU, reason="needs libtpu")
def test_a_step_is_compiled_for_tpus_that_are_not_here():
    *_, mesh = compiled_for(devices_for("v5e:2x4"))
    assert mesh.devices.size == 8
    with pytest.raises(UserError, match="unknown to libtpu"):
        devices_for("v0x:2x2")


@pytest.mark.skipif(has_cuda_compiler(), reason="the compiler is here")
def test_gpus_without_their_compiler_are_refused_with_the_remedy():
    with pytest.raises(UserError, match=f"h100 needs .* pip install --no-deps jax-cuda12-pjrt=={jax.__version__}"):
        devices_for("h100:8")


@pytest.mark.skipif(not has_cuda_compiler(), reason="needs jax-cuda12-pjrt")
def test_a_step_is_compiled_for_gpus_that_are_not_here(monkeypatch):
    step, _, mesh = compiled_for(devices_for("a100-40:2"))
    assert mesh.devices.size == 2
    fits, speed = describe_chip(step, mesh, batch_size=16)
    assert fits.endswith("a100-40: the step fits into 30,278 MiB, 75% of its memory (XLA_CLIENT_MEM_FRACTION)")
    assert re.search("[0-9] images/s at most by roofline: .* kernels move .*B, multiply .*FLOP, without what", speed)
    monkeypatch.setenv("XLA_CLIENT_MEM_FRACTION", "1e-9")
    with pytest.raises(UserError, match="a step needs .* but a device has 0 MiB"):
        describe_chip(step, mesh, batch_size=16)


def test_a_chip_that_is_not_known_is_not_described():
    step, _, mesh = compiled_for(jax.devices())
    assert describe_chip(step, mesh, batch_size=16) == []


def test_a_large_mesh_is_emulated_by_one_cpu():
    program = "from mae_jax.training.plan import devices_for; print(len(devices_for('cpu:64')))"
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, text=True, capture_output=True, timeout=120)
    assert run.stdout.strip() == "64", run.stderr
