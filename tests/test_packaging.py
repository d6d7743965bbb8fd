"""What `pip install .` makes of the project."""

import re
import tomllib
from pathlib import Path

import mae_jax

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
DYNAMIC = PROJECT["tool"]["setuptools"]["dynamic"]


def test_the_dependencies_are_those_of_requirements_txt_and_stand_nowhere_else():
    assert "dependencies" in PROJECT["project"]["dynamic"] and DYNAMIC["dependencies"] == {"file": ["requirements.txt"]}
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    assert all(re.match(r"[\w-]+[<>=]=", line) for line in lines if not line.startswith("#")), "no options of pip"


def test_the_version_stands_in_the_package_alone():
    assert DYNAMIC["version"] == {"attr": "mae_jax.__version__"} and "version" not in PROJECT["project"]
    assert re.fullmatch(r"\d+\.\d+\.\d+", mae_jax.__version__)


def test_the_package_is_typed_and_brings_no_configs_or_tests():
    setuptools = PROJECT["tool"]["setuptools"]
    assert setuptools["package-data"] == {"mae_jax": ["py.typed", "tasks/demo/page.html"]}
    assert all((ROOT / "mae_jax" / name).exists() for name in setuptools["package-data"]["mae_jax"])
    assert setuptools["packages"]["find"]["include"] == ["mae_jax*"]
    folders = {path.parent for path in (ROOT / "mae_jax").rglob("*.py")}
    assert all((folder / "__init__.py").exists() for folder in folders), "setuptools finds regular packages"
