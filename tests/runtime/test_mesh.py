import os
import subprocess
import sys
import types

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from ml_collections import ConfigDict

from mae_jax.runtime.errors import UserError
from mae_jax.runtime.mesh import (
    batch_parts,
    batch_sharding,
    create,
    fit_to_chip,
    fitting_dtype,
    make_mesh,
    parameter_shardings,
    prepare_cpu,
    process_share,
    put,
    put_batch,
    replicated,
)

ALL = ConfigDict(dict(data=-1, fsdp=1, tensor=1))


def test_the_data_axis_takes_all_devices_that_are_left():
    assert dict(make_mesh(ALL).shape) == {"data": 8, "fsdp": 1, "tensor": 1}
    assert batch_parts(make_mesh(ALL)) == 8


@pytest.mark.parametrize(
    "sizes", [dict(data=3, fsdp=1, tensor=1), dict(data=0, fsdp=1, tensor=1), dict(data=-1, fsdp=-1, tensor=1)]
)
def test_sizes_that_do_not_fit_the_devices_are_refused(sizes):
    with pytest.raises(UserError, match="mesh"):
        make_mesh(ConfigDict(sizes))


def test_each_device_gets_its_rows_of_a_batch_in_order():
    mesh = make_mesh(ALL)
    rows = np.arange(32).reshape(16, 2)
    array = put_batch({"image": rows}, batch_sharding(mesh))["image"]
    for device, shard in zip(
        mesh.devices.flat, sorted(array.addressable_shards, key=lambda s: s.index[0]), strict=True
    ):
        assert shard.device == device
        np.testing.assert_array_equal(shard.data, rows[shard.index])
    assert all(shard.data.shape == (2, 2) for shard in array.addressable_shards)


def test_matrices_are_split_by_their_names_and_vectors_stay_whole():
    mesh = make_mesh(ConfigDict(dict(data=2, fsdp=2, tensor=2)))
    mlp = {"fc1": {"kernel": np.zeros((3, 8, 16)), "bias": np.zeros((3, 16))}}
    tree = {"encoder": {"blocks": {"mlp": mlp}, "norm": {"scale": np.zeros(8)}}, "count": np.zeros(())}
    # The optimizer's state has the same names behind its own.
    found = jax.tree.map(lambda sharding: sharding.spec, parameter_shardings(mesh, (tree, {"mu": tree})))
    for specs in (found[0], found[1]["mu"]):
        assert specs["encoder"]["blocks"]["mlp"]["fc1"] == {
            "kernel": PartitionSpec(None, "fsdp", "tensor"), "bias": PartitionSpec(None, "tensor")
        }  # fmt: skip
        assert specs["encoder"]["norm"]["scale"] == PartitionSpec(None) and specs["count"] == PartitionSpec()


@pytest.mark.parametrize("count", [0, -1, 10**9])
def test_a_cpu_is_at_least_one_device_and_not_more_than_it_can_emulate(count):
    with pytest.raises(UserError, match=f"mesh.cpu_devices={count} must be 1 ... 4096"):
        prepare_cpu(ConfigDict(dict(cpu_devices=count)))


def test_variables_of_jax_that_no_run_can_go_with_are_refused(monkeypatch):
    one = ConfigDict(dict(cpu_devices=1))
    with jax.enable_x64(True), pytest.raises(UserError, match="JAX_ENABLE_X64 is on, but .*; unset it"):
        prepare_cpu(one)
    monkeypatch.setattr(type(jax.config), "jax_num_cpu_devices", 10**8, raising=False)
    with pytest.raises(UserError, match="JAX_NUM_CPU_DEVICES=100000000 must be 1 ... 4096"):
        prepare_cpu(one)


def test_platforms_that_are_not_here_are_one_line_that_names_them_and_the_remedy():
    program = (
        "import jax\nfrom mae_jax.runtime.mesh import all_devices\n"
        "for name in ('nonsense', 'nonsense,cpu', 'rocm'):\n"
        "    jax.config.update('jax_platforms', name)\n"
        "    try: all_devices()\n"
        "    except ValueError as error: print(error)\n"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    lines = found.stdout.splitlines()
    assert [line.split(":")[0] for line in lines] == [
        f"JAX_PLATFORMS={n}" for n in ("nonsense", "nonsense,cpu", "rocm")
    ]
    assert all(line.endswith("unset it to take the devices that are here, or give JAX_PLATFORMS=cpu") for line in lines)


@pytest.mark.parametrize(
    "variables, expected",
    [({}, 2), ({"XLA_FLAGS": "--xla_force_host_platform_device_count=3"}, 3), ({"JAX_NUM_CPU_DEVICES": "3"}, 3)],
)
def test_a_cpu_is_as_many_devices_as_the_setting_says_unless_the_environment_does(variables, expected):
    program = "import jax; from ml_collections import ConfigDict; from mae_jax.runtime.mesh import prepare_cpu; "
    program += "prepare_cpu(ConfigDict(dict(cpu_devices=2))); print(jax.device_count())"
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {"JAX_PLATFORMS": "cpu"} | variables
    found = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert int(found.stdout) == expected


def test_one_process_reads_all_rows():
    assert (
        process_share(make_mesh(ALL)) == process_share(make_mesh(ConfigDict(dict(data=2, fsdp=2, tensor=2)))) == (0, 1)
    )


def test_what_is_created_with_little_optimisation_has_the_bits_of_what_is_compiled_in_full(monkeypatch):
    monkeypatch.delenv("XLA_FLAGS")  # those of the tests would be kept; XLA itself has read them

    def init(key):
        kernel, bias = jax.random.split(key)
        return {"fc1": {"kernel": jax.nn.initializers.xavier_uniform()(kernel, (8, 16)),
                        "bias": 0.02 * jax.random.normal(bias, (16,))}}  # fmt: skip

    found = create(init, jax.random.key(0), make_mesh(ConfigDict(dict(data=2, fsdp=2, tensor=2))))
    expected = jax.jit(init, compiler_options={"xla_backend_optimization_level": 3})(jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.parametrize(
    "platform, capability, expected",
    [("cpu", None, "float32"), ("tpu", None, "bfloat16"), ("gpu", "9.0", "bfloat16"), ("gpu", "10.0", "bfloat16"),
     ("gpu", "7.5", "float32"), ("gpu", "gfx942", "bfloat16")],
)  # fmt: skip
def test_products_are_of_bfloat16_only_where_the_chip_has_it(platform, capability, expected):
    device = types.SimpleNamespace(platform=platform, compute_capability=capability)
    assert fitting_dtype(device) == fitting_dtype(device, "bfloat16") == expected
    assert fitting_dtype(device, "float32") == "float32"


def test_a_type_of_products_that_is_given_stays_and_an_open_one_is_as_before_where_the_chip_has_it():
    def settled(asked, earlier, platform):
        model = {"dtype": asked}
        fit_to_chip(model, types.SimpleNamespace(platform=platform), earlier and {"dtype": earlier})
        return model["dtype"]

    assert settled("bfloat16", None, "cpu") == "bfloat16"
    assert settled(None, "bfloat16", "cpu") == "float32"
    assert settled(None, "float32", "tpu") == "float32"  # a run that an earlier version began
    assert settled(None, None, "tpu") == "bfloat16"


@pytest.mark.parametrize(
    "platform, capability, dtype, expected",
    [("gpu", "9.0", None, "pallas"), ("gpu", "9.0", "float32", "xla"), ("gpu", "7.5", None, "xla"),
     ("gpu", "7.5", "bfloat16", "xla"), ("gpu", "gfx942", None, "xla"),
     ("tpu", None, None, "xla"), ("cpu", None, "bfloat16", "xla")],
)  # fmt: skip
def test_attention_keeps_no_weights_on_nvidia_s_chips_with_bfloat16(platform, capability, dtype, expected):
    model = {"dtype": dtype, "attention": None}
    device = types.SimpleNamespace(platform=platform, compute_capability=capability, device_kind="a chip")
    fit_to_chip(model, device)
    assert model["attention"] == expected
    if capability != "9.0":
        with pytest.raises(UserError, match="model.attention=cudnn needs an NVIDIA GPU .* but this is a chip"):
            fit_to_chip({"attention": "cudnn"}, device)


def test_what_is_sent_on_purpose_may_be_sent_where_transfers_are_forbidden():
    value = np.arange(65, dtype=np.int32)[1:]  # of an alignment that is copied, not shared
    with jax.transfer_guard("disallow"):
        np.testing.assert_array_equal(jax.device_get(put(value, replicated(make_mesh(ALL)))), value)
