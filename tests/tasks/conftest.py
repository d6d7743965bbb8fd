"""Many runs of tasks here have the same programs."""

import pytest

from tests import runs


@pytest.fixture(scope="package", autouse=True)
def compile_once():
    with runs.compiling_once():
        yield


@pytest.fixture(scope="module")
def one_device():
    with runs.one_device():
        yield
