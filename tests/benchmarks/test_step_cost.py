import jax
import jax.numpy as jnp
import pytest

from benchmarks import step_cost
from benchmarks.step_cost import (
    TABLES,
    compare,
    describe,
    describe_memory,
    executed_flops,
    memory_cases,
    times,
)
from benchmarks.turns import Turn
from mae_jax.models.flops import train_flops
from mae_jax.models.mae import MAEConfig, init_params, make_bind

MODEL = MAEConfig(image_size=64, patch_size=16, width=32, depth=8, num_heads=2, decoder_width=16, decoder_depth=1,
                  decoder_num_heads=2)  # fmt: skip
BASE = {"data.batch_size": 16}


def rows(*image_seconds: list[float], executed: tuple[int, ...]) -> list[dict]:
    return [
        {"name": str(index), "image_seconds": seconds, "executed_flops": flops, "flops": flops, "memory_bytes": 2**20}
        | {"step_seconds": dict(median=1.0, least=1.0, greatest=1.0), "images_per_second": 8.0}
        | {"devices": 1, "device": "chip", "jax": "0"}
        for index, (seconds, flops) in enumerate(zip(image_seconds, executed, strict=True))
    ]


def test_a_ratio_is_the_median_of_those_of_each_round_and_not_of_rounds_apart():
    # The machine is half as fast in the second round; the ratio of the medians would be 3.
    found = compare(rows([1.0, 2.0, 1.0], [3.0, 4.0, 2.0], executed=(100, 250)))
    assert found[0]["time_ratio"] == {"median": 1.0, "least": 1.0, "greatest": 1.0}
    assert found[1]["time_ratio"] == {"median": 2.0, "least": 2.0, "greatest": 3.0}
    assert found[1]["theory_ratio"] == 2.5


def test_the_rate_and_the_time_of_an_image_are_those_of_the_batch():
    found = times([Turn(seconds, {}) for seconds in (2.0, 1.0, 4.0)], batch=16)
    assert found["images_per_second"] == 8.0 and found["image_seconds"] == [0.125, 0.0625, 0.25]
    assert found["step_seconds"] == {"median": 2.0, "least": 1.0, "greatest": 4.0}


def test_a_row_that_failed_says_why_and_the_others_are_compared_without_it():
    failed = {"name": "4,096 images", "failed": "JaxRuntimeError: RESOURCE_EXHAUSTED"}
    found = compare([failed, *rows([1.0], [1.5], executed=(2, 3))])
    lines = describe("batch", found, rounds=1)
    assert lines[4].startswith("| 4,096 images | failed: JaxRuntimeError: RESOURCE_EXHAUSTED |")
    assert lines[6] == "| 1 | 8.0 | 1,000 (1,000, 1,000) | 3e-09 | 1.50 (1.50, 1.50) | 1.50 | 1 |"
    assert len({line.count("|") for line in lines[2:]}) == 1
    assert describe_memory([failed])[-1] == "| 4,096 images | failed: JaxRuntimeError: RESOURCE_EXHAUSTED |"


def test_each_table_changes_its_one_setting_and_its_first_row_is_what_the_others_are_compared_with():
    cases = {what: make(BASE, MODEL) for what, make in TABLES.items()}
    changed = {
        what: [{key: value for key, value in case.overrides.items() if BASE.get(key) != value} for case in found]
        for what, found in cases.items()
    }
    assert [case.overrides["data.batch_size"] for case in cases["batch"]] == [4, 8, 16, 32]
    assert changed["depth"] == [{"model.depth": depth} for depth in (2, 4, 8, 16)]
    sizes = [{"model.image_size": (side, side)} for side in (32, 64, 96, 128)]
    assert changed["tokens"] == [*sizes, {"model.mask_ratio": 0.5}, {"model.mask_ratio": 0.0}]
    assert changed["accumulate"][0] == {}
    assert changed["accumulate"][-2] == {"data.batch_size": 128, "train.accumulate_steps": 8}
    assert changed["accumulate"][-1] == {"data.batch_size": 4096, "train.accumulate_steps": 256}
    assert changed["remat"] == [{}, {"model.remat": True}]


@pytest.mark.parametrize("batch", [1, 16, 256, 2048, 4096])
def test_a_batch_of_4096_is_cut_down_to_the_micro_batch_that_it_is_compared_with(batch):
    found = [case.overrides for case in memory_cases({"data.batch_size": batch}, MODEL)]
    assert all(case["data.batch_size"] == 4096 for case in found[:-1])
    *_, last, alone = [case["data.batch_size"] // case["train.accumulate_steps"] for case in found]
    assert last == alone == batch and found[-1]["train.accumulate_steps"] == 1


def test_what_remat_repeats_is_what_xla_counts_more():
    # XLA counts a loop's body once, and each loop is two blocks (without loops XLA may merge what is repeated with what
    # it repeats); wide, since norms and activations are repeated too.
    sizes = dict(image_size=64, patch_size=16, width=256, depth=2, num_heads=4, decoder_width=128, decoder_depth=2,
                 decoder_num_heads=4)  # fmt: skip

    def xla_flops(config: MAEConfig) -> float:
        def loss(params, images, noise):
            return make_bind(config)(params)(images, noise=noise).loss

        params = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
        images, noise = jax.ShapeDtypeStruct((4, 64, 64, 3), jnp.float32), jax.ShapeDtypeStruct((4, 16), jnp.float32)
        return jax.jit(jax.grad(loss)).lower(params, images, noise).compile().cost_analysis()["flops"] / 4

    plain, remat = MAEConfig(**sizes), MAEConfig(**sizes, remat=True)
    repeated = executed_flops(remat) - executed_flops(plain)
    assert executed_flops(plain) == train_flops(plain) == train_flops(remat)
    assert repeated == pytest.approx(2 * (xla_flops(remat) - xla_flops(plain)), rel=0.05)


class FakeWorker:
    """A process that takes a second for each block, and cannot be had for 16 blocks."""

    closed = []

    def __init__(self, make, config, overrides, *_, environment):
        self.depth = overrides["model.depth"]
        if self.depth == 16:
            raise RuntimeError("JaxRuntimeError: RESOURCE_EXHAUSTED: 1 TiB\nand more")
        self.facts = {"flops": 1, "memory_bytes": 2**20, "devices": 1, "device": "chip", "jax": "0"}

    def turn(self, count):
        return Turn(float(self.depth), {})

    def close(self):
        self.closed.append(self.depth)


def test_a_case_that_does_not_fit_leaves_the_others_to_be_measured_and_no_process_behind(monkeypatch):
    monkeypatch.setattr(step_cost, "Worker", FakeWorker)
    found = step_cost.measure("image_folder", TABLES["depth"](BASE, MODEL), rounds=2, seconds=1.0)
    assert [row.get("failed") for row in found] == [None, None, None, "JaxRuntimeError: RESOURCE_EXHAUSTED: 1 TiB"]
    assert [row["time_ratio"]["median"] for row in found[:3]] == [1, 2, 4]
    assert FakeWorker.closed == [2, 4, 8]
