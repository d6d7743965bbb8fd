"""Many runs of tasks here have the same programs."""

import pytest

from tests.runs import compiling_once


@pytest.fixture(scope="package", autouse=True)
def compile_once():
    with compiling_once():
        yield
