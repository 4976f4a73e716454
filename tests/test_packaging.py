"""What is written in more than one place agrees, and the wheel holds what an install needs."""

import ast
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from fastvid import __version__, _native

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10; pytest brings its forerunner along
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
DISTRIBUTIONS = {  # of the modules that are not called as their distribution is
    "sklearn": "scikit-learn",
    "skimage": "scikit-image",
    "faiss": "faiss-cpu",
    "PIL": "pillow",
    "pybullet_data": "pybullet",
    "pybullet_utils": "pybullet",
}


def name_of(requirement: str) -> str:
    return re.match(r"[\w.-]+", requirement).group().lower().replace("_", "-")


def pinned() -> set[str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return {name_of(line) for line in lines if "==" in line and not line.startswith("#")}


def test_the_version_is_one():
    assert PROJECT["version"] == __version__


@pytest.mark.parametrize("extra", ["", "test", "data", "bench", "train"])
def test_every_direct_dependency_is_pinned(extra):
    direct = PROJECT["optional-dependencies"][extra] if extra else PROJECT["dependencies"]
    assert {name_of(requirement) for requirement in direct} <= pinned()


def test_every_third_party_import_is_declared():
    groups = [PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()]
    declared = {name_of(requirement) for group in groups for requirement in group} | {"tomli"}  # comes with pytest
    files = [path for folder in ("fastvid", "kernels", "bench", "tests") for path in (ROOT / folder).rglob("*.py")]
    ours = {"fastvid", *(path.stem for path in files if path.parent.name == "bench")}
    undeclared = set()
    for path in files:
        tops = imported(ast.parse(path.read_text(encoding="utf-8")).body) - ours - helpers_of(path)
        wanted = {DISTRIBUTIONS.get(top, name_of(top)) for top in tops - sys.stdlib_module_names}
        undeclared |= {f"{path.relative_to(ROOT)}: {name}" for name in wanted - declared}
    assert not undeclared


def imported(body: list) -> set[str]:
    """The packages that these statements import, those inside of them too; expressions import nothing."""
    tops = set()
    for node in body:
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
        tops |= {name.split(".")[0] for name in names}
        for inside in ("body", "orelse", "finalbody", "handlers", "cases"):
            tops |= imported(getattr(node, inside, []))
    return tops


def test_every_import_is_seen():
    nested = """
import a.b, c as d
def f():
    class C:
        from e.f import g
    try:
        import h
    except ImportError:
        import i
    else:
        import j
    finally:
        import k
    match 1:
        case 1:
            import l
    while 1:
        with x: import m
    else:
        from . import n
"""
    assert imported(ast.parse(nested).body) == set("acehijklm")


def helpers_of(path: Path) -> set[str]:
    """Modules that a test finds beside it or, by conftest.py, in the folder of all tests."""
    if ROOT / "tests" not in path.parents:
        return set()
    return {file.stem for folder in (path.parent, ROOT / "tests") for file in folder.glob("*.py")}


def test_the_abi_version_is_one():
    source = (ROOT / "kernels" / "common" / "abi.cpp").read_text(encoding="utf-8")
    assert re.findall(r"fastvid_abi_version\(void\) \{ return (\d+); \}", source) == [str(_native.ABI_VERSION)]


def test_the_readme_opens_with_its_two_commands():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"<!-- (\w+)-command -->\n```\n(.+?)\n```", readme, re.DOTALL)
    assert [name for name, _ in blocks] == ["predict", "test"]
    for _, command in blocks:
        assert "-c constraints.txt torch &&" in command, "torch comes by its pin, before anything else asks for it"
        assert "sudo" not in command


@pytest.mark.slow
def test_the_wheel_holds_the_package(tmp_path):
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path), str(ROOT)]
    subprocess.run(build, check=True)
    (wheel,) = tmp_path.glob("fastvid_torch-*-py3-none-*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    sources = {path.relative_to(ROOT) for folder in ("fastvid", "kernels") for path in (ROOT / folder).rglob("*")}
    wanted = {path.as_posix() for path in sources if path.suffix in (".py", ".json", ".safetensors")}
    inside = {path if path.startswith("fastvid/") else f"fastvid/{path}" for path in wanted}
    assert inside - names == set()
    assert not [name for name in names if name.endswith((".cpp", ".cu", ".h", ".pyc"))]
