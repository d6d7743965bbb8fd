"""Which step has images of which size, and which settings are refused."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs import digits
from mae_jax.data.resolutions import Stage, make_stages, size_at, sizes_from
from mae_jax.runtime.errors import UserError
from mae_jax.tasks import check_task

FULL = (8, 12)
shares = st.lists(st.floats(0.001, 0.999), max_size=4, unique=True).map(sorted)
sides = st.integers(1, 6)
sizes = st.one_of(sides, st.tuples(sides, sides))


@st.composite
def runs(draw):
    """(train.resolutions, steps of the run)."""
    resolutions = tuple((share, draw(sizes)) for share in draw(shares))
    return resolutions, draw(st.integers(1, 400))


def expected_size(resolutions, total, step):
    for share, size in resolutions:
        if step < round(share * total) and step < total - 1:
            return (size, size) if isinstance(size, int) else size
    return FULL


@given(runs())
def test_every_step_has_the_size_of_the_first_stage_that_has_not_ended_and_the_last_step_the_full_size(run):
    resolutions, total = run
    stages = make_stages(resolutions, FULL, total)
    found = [size_at(stages, step) for step in range(total)]
    assert found == [expected_size(resolutions, total, step) for step in range(total)]
    assert found[-1] == FULL and size_at(stages, total + 1000) == FULL


@given(runs(), st.data())
def test_the_sizes_from_a_step_on_are_those_that_its_run_still_has_in_their_order(run, data):
    resolutions, total = run
    stages, step = make_stages(resolutions, FULL, total), data.draw(st.integers(0, total - 1))
    assert list(sizes_from(stages, step)) == list(
        dict.fromkeys(expected_size(resolutions, total, later) for later in range(step, total))
    )


@given(runs())
def test_every_stage_has_a_step(run):
    resolutions, total = run
    firsts = [stage.first_step for stage in make_stages(resolutions, FULL, total)]
    assert firsts[0] == 0 and firsts == sorted(set(firsts)) and firsts[-1] < total


def test_without_resolutions_there_is_one_stage():
    assert make_stages((), FULL, 100) == (Stage(0, FULL),)


def test_the_stages_of_the_example_end_at_a_half_and_at_three_quarters():
    stages = make_stages(((0.5, 128), (0.75, (160, 96))), (224, 224), 1000)
    assert stages == (Stage(0, (128, 128)), Stage(500, (160, 96)), Stage(750, (224, 224)))


@pytest.mark.parametrize("value", [(), ((0.5, 4),), ((0.25, 4), (0.5, (6, 8)), (0.9, 8))], ids=str)
def test_resolutions_that_the_model_takes_pass(value):
    config = digits.get_config()
    config.train.resolutions = value
    check_task(config)


@pytest.mark.parametrize(
    "value, message",
    [
        (
            (0.5, 4),
            "must be pairs of a share of the run, rising between 0 and 1, and pixels, for example --config",
        ),
        (((0.5, 4.5),), "must be pairs"),
        (((0.5, "a"),), "must be pairs"),
        (((0.5, 0),), "must be pairs"),
        (((0.5, (4, 4, 4)),), "must be pairs"),
        (((0.5, 4), (0.5, 6)), "a share of the run, rising between 0 and 1"),
        (((0.5, 4), (0.4, 6)), "rising between 0 and 1"),
        (((0.0, 4),), "rising between 0 and 1"),
        (((1.0, 4),), "rising between 0 and 1"),
        (((float("nan"), 4),), "rising between 0 and 1"),
        (((0.5, 3),), "not 3 x 3 pixels: patch size 2 does not divide"),
        (((0.5, (4, 16)),), "4 x 16 pixels are more than model.image_size=8 x 8"),
        (((0.5, 2),), "not 2 x 2 pixels: model.mask_ratio=0.75 leaves none of 1 patches visible; lower it"),
    ],
    ids=str,
)
def test_resolutions_that_cannot_be_are_one_line_that_names_them(value, message):
    config = digits.get_config()
    config.train.resolutions = value
    with pytest.raises(UserError) as error:
        check_task(config)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert str(error.value).startswith(f"train.resolutions={value}")
