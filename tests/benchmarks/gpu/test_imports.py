"""benchmarks.gpu: every module imports where there is no GPU, so that none is found broken on one."""

import importlib
import pkgutil

import pytest

import benchmarks

MODULES = sorted(found.name for found in pkgutil.walk_packages(benchmarks.__path__, "benchmarks."))


@pytest.mark.parametrize("name", [name for name in MODULES if not name.endswith("__main__")])
def test_it_imports(name):
    importlib.import_module(name)
