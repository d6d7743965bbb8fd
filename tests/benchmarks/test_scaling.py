import itertools

import pytest

from benchmarks.collectives import Collective
from benchmarks.scaling import CHIP_COUNTS, CHIPS, Chip, Model, collective_seconds, describe_model, estimate

CHIP = Chip("test", 1e12, 0.5, 1e6, 1e9, 8, 100.0, 10.0, 2)
MODEL = Model(flops=10**9, parameters=1000, kernels=800, largest_block=100, moved=10**6, kept=3000, working=1000)


def test_a_sum_beyond_the_near_network_goes_round_both_rings():
    near = Collective("all-reduce", "f32", ("data",), 8, 1, 800)
    assert collective_seconds(near, CHIP) == pytest.approx(2 * 7 / 8 * 800 / 100)
    far = Collective("all-reduce", "f32", ("data",), 16, 1, 800)
    assert collective_seconds(far, CHIP) == pytest.approx(2 * 7 / 8 * 800 / 100 + 2 * 1 / 2 * (800 / 8) / 10)


def test_whole_copies_cost_what_a_hand_computes():
    found = estimate(MODEL, CHIP, chips=4, batch=64, layout="data")
    assert found.compute == pytest.approx(16 * 1e9 / 5e11)
    assert found.memory_traffic == pytest.approx((28 * 1000 + 16 * 1e6) / 1e9)
    assert found.network == pytest.approx(2 * 3 / 4 * 4000 / 100)
    assert found.decoding == pytest.approx(16 / (2 * 400))
    assert found.memory == 16 * 1000 + 16 * 4000
    assert (found.limit, found.seconds, found.parts) == ("network", found.network, 1)


def test_split_copies_cost_what_a_hand_computes():
    found = estimate(MODEL, CHIP, chips=4, batch=64, layout="fsdp")
    gathered, scattered, summed = 2 * 3 / 4 * 1600, 3 / 4 * 3200, 2 * 3 / 4 * 800
    assert found.network == pytest.approx((gathered + scattered + summed) / 100)
    assert found.memory == 16 * (200 + 800 / 4) + 2 * 4 * 100 + 16 * 4000


def test_a_batch_that_does_not_fit_is_cut_into_parts():
    assert estimate(MODEL, CHIP._replace(memory=60e3), 4, 64, "data").parts == 2
    assert estimate(MODEL, CHIP._replace(memory=18e3), 4, 64, "data").parts == 0


def test_the_named_sizes_have_the_papers_parameters():
    # With the decoder of 8 x 512; the position tables, which do not learn, are not among them.
    millions = [describe_model(size).parameters / 1e6 for size in ("base", "large", "huge")]
    assert millions == pytest.approx([111.7, 329.2, 657.1], abs=0.5)


@pytest.mark.parametrize("chip", CHIPS, ids=lambda chip: chip.name)
def test_more_chips_never_take_longer_to_compute_or_more_memory_but_send_more(chip):
    model = describe_model("base")
    for layout in ("data", "fsdp"):
        rows = [estimate(model, chip, chips, 4096, layout) for chips in CHIP_COUNTS]
        for fewer, more in itertools.pairwise(rows):
            assert more.compute < fewer.compute and more.decoding < fewer.decoding
            assert more.memory < fewer.memory and more.network >= fewer.network
