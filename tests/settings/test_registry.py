"""Registries of what settings name."""

import math

import pytest

from mae_jax.runtime.errors import UserError
from mae_jax.settings.registry import Registry

REMEDY = "; put its file beside main.py or on PYTHONPATH, and name what it defines"


@pytest.fixture
def shapes():
    registry = Registry("model.shape")
    registry.register("round")(len)
    registry.register("square")(max)
    return registry


def test_a_registered_name_gives_its_implementation(shapes):
    assert shapes.find("round") is len
    assert tuple(shapes) == ("round", "square")


def test_module_and_name_are_imported(shapes):
    assert shapes.find("math:sqrt") is math.sqrt


@pytest.mark.parametrize(
    "name, message",
    [
        ("sqare", """model.shape='sqare' is not one of round, square; did you mean "square"?"""),
        (
            "no_such_module:f",
            "model.shape=no_such_module:f cannot be imported: No module named 'no_such_module'" + REMEDY,
        ),
        ("math:squirt", "model.shape=math:squirt cannot be imported: module 'math' has no attribute 'squirt'" + REMEDY),
    ],
)
def test_what_cannot_be_found_is_one_line(shapes, name, message):
    with pytest.raises(UserError) as error:
        shapes.find(name)
    assert str(error.value) == message
