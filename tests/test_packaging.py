"""What is installed, what it needs, and that our `kernels` and Hugging Face's are never mixed up."""

import ast
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from runtime.serve.__main__ import PACKAGES as SERVES

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("runtime", "kernels", "export", "training")
BESIDE = ("benchmarks", "docs", "examples", "tests")  # of the sdist, not of the wheel
# Imports point one way: each top-level package to those that it may import.
MAY_IMPORT = {
    "kernels": set(),
    "runtime": {"kernels"},
    "export": {"kernels", "runtime"},
    "training": {"kernels", "runtime"},
    "benchmarks": {"kernels", "runtime", "export", "training"},
}
# Distributions whose import name is another.
DISTRIBUTIONS = {"PIL": "pillow", "cv2": "opencv-python-headless", "skimage": "scikit-image"}


def sources(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """(files of the sdist, files of the wheel, metadata), from a copy: setuptools writes beside sources."""
    work = tmp_path_factory.mktemp("build")
    tree = work / "tree"
    ignore = shutil.ignore_patterns("__pycache__", "node_modules", "package-lock.json")
    for folder in (*PACKAGES, *BESIDE):
        shutil.copytree(ROOT / folder, tree / folder, ignore=ignore)
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copy(path, tree)
    build = (
        f"from setuptools import build_meta as b; b.build_sdist({str(work)!r}); b.build_wheel({str(work)!r})"
    )
    done = subprocess.run([sys.executable, "-c", build], cwd=tree, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

    with tarfile.open(next(work.glob("*.tar.gz"))) as sdist:
        sdist_files = {member.name.partition("/")[2] for member in sdist.getmembers() if member.isfile()}
    with zipfile.ZipFile(next(work.glob("*.whl"))) as wheel:
        wheel_files = set(wheel.namelist())
        metadata = next(name for name in wheel_files if name.endswith(".dist-info/METADATA"))
        return sdist_files, wheel_files, message_from_bytes(wheel.read(metadata))


def expected_files() -> set[str]:
    code = {path for package in PACKAGES for path in sources(package)}
    data = {
        path
        for folder in ("embedded", "configs", "serve/page")
        for path in (ROOT / "runtime" / folder).rglob("*")
    }
    return {str(path.relative_to(ROOT)) for path in code | data if path.is_file() and path.suffix != ".pyc"}


def test_wheel_has_the_four_packages_and_their_data_and_nothing_else(built):
    _, wheel, _ = built
    assert {name for name in wheel if ".dist-info/" not in name} == expected_files()
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in wheel)


def test_sdist_can_build_and_test_itself(built):
    """The tests read the documentation too, the figures that it shows, and the cluster's example files."""
    sdist, _, _ = built
    files = {
        "setup.py",
        "pyproject.toml",
        "constraints.txt",
        "Makefile",
        "LICENSE",
        "README.md",
        "CONTRIBUTING.md",
    }
    for folder in (*PACKAGES, *BESIDE):
        files |= {str(path.relative_to(ROOT)) for path in (ROOT / folder).rglob("*") if path.is_file()}
    made = re.compile(r"\.pyc$|/node_modules/|package-lock\.json$")
    assert {name for name in files if not made.search(name)} - sdist == set()


def test_name_and_version(built):
    metadata = built[2]
    assert metadata["Name"] == "localcontrol"
    assert Version(metadata["Version"]) < Version(
        "0.9"
    )  # from there on, transformers would take it for the other
    assert f'__version__ = "{metadata["Version"]}"' in (ROOT / "kernels/__init__.py").read_text()


def test_every_package_that_the_tests_install_is_pinned(built):
    requirements = [Requirement(line) for line in built[2].get_all("Requires-Dist")]
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    assert all(re.fullmatch(r"==[^*]+", str(pin.specifier)) for pin in pins)
    for python in ("3.10", "3.11", "3.12", "3.13"):
        machine = {"python_version": python, "sys_platform": "linux", "platform_machine": "x86_64"}
        pinned: dict[str, str] = {}
        for pin in pins:
            if pin.marker is None or pin.marker.evaluate(machine):
                assert canonicalize_name(pin.name) not in pinned, (
                    f"{pin.name} is pinned twice on Python {python}"
                )
                pinned[canonicalize_name(pin.name)] = str(pin.specifier).removeprefix("==")
        for requirement in requirements:
            extras = ("", "dev")
            if requirement.marker is None or any(
                requirement.marker.evaluate({**machine, "extra": e}) for e in extras
            ):
                version = pinned.get(canonicalize_name(requirement.name))
                assert version, f"{requirement.name} has no pin on Python {python}"
                assert version in requirement.specifier, f"{requirement} does not allow the pin {version}"
    assert "torch==2.13.0" in lines


def imported(path: Path) -> set[str]:
    """Top-level names of what a file imports anywhere, functions included."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module.partition(".")[0])
    return names


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_imports_point_one_way(package):
    forbidden = {*MAY_IMPORT, "tests"} - MAY_IMPORT[package] - {package}
    wrong = {
        str(path.relative_to(ROOT)): bad for path in sources(package) if (bad := imported(path) & forbidden)
    }
    assert not wrong


def test_every_package_that_is_imported_is_declared(built):
    """Not all are imported at once: some are an extra's, but none is only there because the tests need it."""
    requirements = [Requirement(line) for line in built[2].get_all("Requires-Dist")]
    declared = {canonicalize_name(r.name) for r in requirements if 'extra == "dev"' not in str(r.marker)}
    names = set().union(*(imported(path) for package in PACKAGES for path in sources(package)))
    others = names - set(MAY_IMPORT) - sys.stdlib_module_names
    assert {canonicalize_name(DISTRIBUTIONS.get(name, name)) for name in others} <= declared


def test_every_package_of_an_extra_is_used(built):
    """At least by name: tensorboard is PyTorch's to import."""
    modules = {distribution: module for module, distribution in DISTRIBUTIONS.items()}
    requirements = [Requirement(line) for line in built[2].get_all("Requires-Dist")]
    text = "".join(path.read_text("utf-8") for package in MAY_IMPORT for path in sources(package))
    for requirement in requirements:
        if "extra ==" in str(requirement.marker) and 'extra == "dev"' not in str(requirement.marker):
            name = modules.get(requirement.name, requirement.name.replace("-", "_"))
            assert re.search(rf"\b{name}\b", text), requirement


def test_the_server_asks_for_what_its_extra_installs(built):
    requirements = [Requirement(line) for line in built[2].get_all("Requires-Dist")]
    installed = {canonicalize_name(r.name) for r in requirements if str(r.marker) == 'extra == "serve"'}
    assert {canonicalize_name(name) for name in SERVES} == installed


def test_kernels_is_a_regular_package_that_imports_nothing():
    assert imported(ROOT / "kernels/__init__.py") == set()


def python(code: str, *path: Path, cwd: Path) -> subprocess.CompletedProcess:
    """Runs code in a fresh interpreter that looks for packages in `path` first, in that order."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path))}
    return subprocess.run([sys.executable, "-c", code], cwd=cwd, env=env, capture_output=True, text=True)


def add_package(folder: Path, version: str = "0.18.2") -> None:
    (folder / "kernels").mkdir()
    (folder / "kernels/__init__.py").write_text(f'__version__ = "{version}"\n')


def add_metadata(folder: Path, name: str = "kernels", version: str = "0.18.2") -> None:
    info = folder / f"{name}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (info / "top_level.txt").write_text("kernels\n")


def test_importing_runtime_imports_nothing_heavy(tmp_path):
    code = (
        "import sys, kernels, runtime; assert 'Region' in dir(runtime)\n"
        "print(sorted({'torch', 'numpy', 'PIL', 'diffusers', 'transformers', 'triton'} & set(sys.modules)))"
    )
    done = python(code, ROOT, cwd=tmp_path)
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr


def test_runtime_hands_out_its_public_names():
    import runtime
    import runtime.control.region

    assert runtime.Region is runtime.control.region.Region
    assert set(runtime.__all__) <= set(dir(runtime))
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = runtime.no_such_name


@pytest.mark.parametrize("order", ["theirs first", "ours first"])
def test_runtime_refuses_beside_the_other_distribution(tmp_path, order):
    add_package(tmp_path)
    add_metadata(tmp_path)
    path = (tmp_path, ROOT) if order == "theirs first" else (ROOT, tmp_path)
    done = python("import runtime", *path, cwd=tmp_path)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: Hugging Face's `kernels` 0.18.2 is installed")
    assert "pip uninstall kernels" in last


def test_runtime_refuses_where_its_metadata_is_all_there_is(tmp_path):
    """Installed into one site-packages, the later of the two overwrites the files of the earlier."""
    add_metadata(tmp_path)
    done = python("import runtime", ROOT, tmp_path, cwd=tmp_path)
    assert "ImportError: Hugging Face's `kernels` 0.18.2 is installed" in done.stderr


@pytest.mark.parametrize("regular", [True, False])
def test_runtime_refuses_another_package_that_comes_first(tmp_path, regular):
    """Also where `pip uninstall kernels` took our `__init__.py` with it."""
    shadow = tmp_path / "shadow"
    shadow.mkdir()
    add_package(shadow)
    if not regular:
        (shadow / "kernels/__init__.py").unlink()
        shutil.copytree(
            ROOT / "runtime", shadow / "runtime", ignore=shutil.ignore_patterns("embedded", "__pycache__")
        )
    done = python("import runtime", *((shadow, ROOT) if regular else (shadow,)), cwd=tmp_path)
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1
    assert last.startswith("ImportError: `import kernels` finds ")
    assert "not localcontrol's own" in last
    if regular:
        assert str(shadow / "kernels/__init__.py") in last


AVAILABLE = (
    "from diffusers.utils.import_utils import is_kernels_available as diffusers\n"
    "from transformers.utils.import_utils import is_kernels_available as transformers\n"
    "print(diffusers(), transformers())"
)


@pytest.mark.parametrize("installed", [False, True], ids=["checkout", "installed"])
def test_transformers_and_diffusers_leave_ours_alone(tmp_path, installed):
    if installed:
        add_metadata(tmp_path, "localcontrol", "0.1.0")
    done = python(AVAILABLE, ROOT, tmp_path, cwd=tmp_path)
    assert done.stdout.split() == ["False", "False"], done.stderr


def test_the_other_distribution_would_be_believed(tmp_path):
    """The premise of the refusal: metadata alone, over our files, is enough for diffusers."""
    add_metadata(tmp_path)
    done = python(AVAILABLE, ROOT, tmp_path, cwd=tmp_path)
    assert done.stdout.split()[:1] == ["True"], done.stderr
