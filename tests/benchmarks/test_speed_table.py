import pytest

from benchmarks.speed_table import LARGE, table, variants


def program(images_per_second: float) -> dict:
    return {
        "devices": 1, "device": "chip", "matmul_tflops": 600.0, "compile_seconds": 12.4, "peak_memory_bytes": 2**30,
        "step_seconds": {"median": 0.1, "least": 0.09, "greatest": 0.2}, "images_per_second": images_per_second,
    }  # fmt: skip


class FakeMeasure:
    """`train_step.measure` of a chip on which unrolled blocks are the fastest, and large batches do not fit."""

    def __init__(self):
        self.asked = []

    def __call__(self, asked):
        self.asked.append(asked)
        if asked.batch > 256:
            raise RuntimeError("JaxRuntimeError: RESOURCE_EXHAUSTED: a | b\nmore")
        rate = 2000.0 if any("scan_unroll" in text for text in asked.set) else 1000.0
        found = {"programs": {"mae_jax": program(rate)}, "images_per_second": rate, "failed": {}}
        found |= {"tflops_per_second": 123.4, "matmul_share": 0.25}
        return found | ({"torch_images_per_second": 800.0, "ratio": rate / 800} if asked.against else {})


def test_every_variant_has_a_row_and_the_fastest_of_each_model_is_measured_beside_pytorch():
    measure = FakeMeasure()
    first, *rows, last = table(("vit_base", "vit_large"), True, "torch", 5, 3.0, measure)
    per_model = len(variants("vit_base", True)) + 1
    assert len(rows) == len(measure.asked) == 2 * per_model
    usual = "| vit_base | 256 | usual | 1,000 | 100.0 (90.0, 200.0) | 123 | 25% | 1,024 | 12 |  |  |"
    assert rows[0] == usual
    assert rows[per_model - 2] == (
        "| vit_base | 512 | twice the batch | failed: JaxRuntimeError: RESOURCE_EXHAUSTED: a / b | | | | | | | |"
    )
    beside = rows[per_model - 1]
    assert "| in loops, beside PyTorch | 2,000 |" in beside and beside.endswith("| 800 | 2.50 |")
    assert "model.scan_unroll=1" in measure.asked[per_model - 1].set
    # It is a table: each line has the header's number of cells.
    assert {row.count("|") for row in rows} == {first.splitlines()[-1].count("|")}
    assert "jax 0." in first and "chip, 600 TFLOP/s" in last


def test_without_pytorch_nothing_is_measured_beside_it_and_a_model_that_never_fits_ends_no_table():
    def fail(asked):
        assert asked.against is None
        raise RuntimeError("no device")

    *rows, last = table(("vit_huge", "tiny"), False, None, 5, 1.0, fail)
    assert all("failed: no device" in row for row in rows[1:]) and "no variant ran" in last


@pytest.mark.parametrize("model", LARGE)
def test_on_an_accelerator_a_variant_differs_in_attention_loop_remat_or_batch_and_no_two_are_the_same(model):
    found = variants(model, accelerated=True)
    settings = [(batch, tuple(changed.items())) for _, batch, changed in found]
    assert len(set(settings)) == len(found)
    ones = {"model.attention": "cudnn"}, {"model.attention": "xla"}, {"model.scan_unroll": 1}, {"model.remat": True}
    assert all(one in [changed for _, _, changed in found] for one in ones)
    # cuDNN's attention is of accelerators alone.
    assert not any("model.attention" in changed for _, _, changed in variants(model, accelerated=False))
