"""The house checks itself: who imports whom, sizes, docstrings, forbidden words, and what must stay lazy."""

import ast
import importlib.util
import os
import re
import subprocess
import sys
from fnmatch import fnmatch
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]

# Every Python file of the package and the rooms stands on one step (the first that fits), and may import only the
# parts of fastvid and the third-party packages named there. The standard library is free to all.
LOWER = "errors ops nn sampling checkpoint models metrics weights data"
STAIRCASE = [
    # files                     parts of fastvid                                   third-party packages
    ("fastvid/errors.py",       "",                                                ""),
    ("fastvid/__init__.py",     "",                                                ""),
    ("fastvid/_native.py",      "",                                                ""),
    ("fastvid/testing.py",      "",                                                "torch numpy"),
    ("kernels/*/__init__.py",   "",                                                ""),
    ("kernels/*/reference.py",  "kernels.<own room>",                              "torch"),
    ("kernels/*/cases.py",      "testing kernels.<own room>",                      "torch"),
    ("kernels/*.py",            "kernels.common kernels.<own room>",               "torch triton"),
    ("fastvid/laws.py",         "ops testing",                                     "torch"),
    ("fastvid/ops/*",           "ops kernels _native errors",                      "torch"),
    ("fastvid/nn/*",            "nn ops errors",                                   "torch"),
    ("fastvid/swaps.py",        "nn",                                              "torch"),
    ("fastvid/sampling/*",     "sampling nn ops errors",                          "torch"),
    ("fastvid/checkpoint.py",   "errors",                                          "torch safetensors"),
    ("fastvid/models/*",        "models nn ops sampling checkpoint errors",        "torch"),
    ("fastvid/weights*",        "weights metrics checkpoint errors",               "torch numpy safetensors"),
    ("fastvid/metrics/*",       "metrics errors",                                  "torch"),
    ("fastvid/data/*",          "data errors",                                     "torch numpy av tqdm"),
    ("fastvid/train/*",         f"train {LOWER}",                                  "torch numpy safetensors tqdm"),
    ("fastvid/doctor.py",       "laws ops models _native",                         "torch"),
    ("fastvid/selftest.py",     "laws ops",                                        ""),
    ("fastvid/predict.py",      f"train {LOWER}",                                  "torch numpy tqdm"),
    ("fastvid/sample.py",       f"train {LOWER}",                                  "torch tqdm"),
    ("fastvid/evaluate/*",      f"evaluate train {LOWER}",                         "torch numpy safetensors tqdm"),
    ("fastvid/cli/*",           f"cli predict sample evaluate doctor selftest train {LOWER}", "torch tqdm tyro"),
    ("fastvid/__main__.py",     "cli",                                             ""),
]  # fmt: skip
# Optional packages, by the part that may import them; inside functions only, so that lacking one hurts nobody else.
OPTIONAL = {"fastvid/data/": "pybullet pybullet_data pybullet_utils sklearn h5py", "fastvid/train/": "tensorboard"}

LONG_FILES: dict[str, str] = {}  # path -> why it is longer than 400 lines

# Written in two halves, so that this file does not contain what it forbids.
FORBIDDEN = [
    (r"(?<![\w.~])/" + r"(work|root|home)/", "a path of one machine"),
    (r"/opt/" + r"(pypi|wheels)", "a path of one machine"),
    (r"\bpypi\." + r"org|pythonhosted\." + r"org|registry\." + r"npmjs|deb\." + r"debian", "a package registry's host"),
    (r"\bTO" + r"DO\b|\bFIX" + r"ME\b|\bX" + r"XX\b", "unfinished work"),
]


class Import(NamedTuple):
    module: str
    line: int
    lazy: bool


@cache
def tree() -> list[str]:
    """Paths of the files that git tracks or would track; without git, of all files outside hidden folders."""
    listing = ["git", "-C", str(ROOT), "ls-files", "-co", "--exclude-standard"]
    if (ROOT / ".git").exists():
        paths = subprocess.run(listing, capture_output=True, text=True, check=True).stdout.splitlines()
    else:
        paths = [str(path.relative_to(ROOT)) for path in ROOT.rglob("*") if path.is_file()]
        paths = [path for path in paths if not re.search(r"(^|/)(\.(?!ci|git)|__pycache__|build|[^/]*egg-info)", path)]
    return sorted(path for path in paths if (ROOT / path).is_file())


def python_files(*folders: str) -> list[str]:
    return [path for path in tree() if path.endswith(".py") and (not folders or path.split("/")[0] in folders)]


@cache
def parsed(path: str) -> ast.Module:
    return ast.parse((ROOT / path).read_text(encoding="utf-8"), filename=path)


def imports(path: str) -> list[Import]:
    """Every import of a file by full module name; `from fastvid import data` counts as `fastvid.data`."""
    found = []

    def visit(node: ast.AST, lazy: bool):
        if isinstance(node, ast.Import):
            found.extend(Import(alias.name, node.lineno, lazy) for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            parents = path.removesuffix(".py").split("/")[: -node.level] if node.level else []
            base = ".".join([*parents, *filter(None, [node.module])])
            names = [alias.name for alias in node.names if alias.name != "__version__"]
            found.extend(Import(f"{base}.{name}" if base == "fastvid" else base, node.lineno, lazy) for name in names)
        for child in ast.iter_child_nodes(node):
            visit(child, lazy or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)))

    visit(parsed(path), False)
    return found


def climbs(path: str, entry: Import) -> str | None:
    """What is wrong with one import of `path`, given its step of the staircase; None where nothing is."""
    step = next((step for step in STAIRCASE if fnmatch(path, step[0])), None)
    if step is None:
        return "this file stands on no step of the staircase; add it to STAIRCASE"
    parts, packages = (words.replace("<own room>", path.split("/")[1]).split() for words in step[1:])
    top, _, rest = entry.module.partition(".")
    if top == "fastvid":
        allowed = any(rest == part or rest.startswith(part + ".") for part in parts)
        return None if allowed else f"may import of fastvid only {parts}"
    if top in sys.stdlib_module_names or top in packages:
        return None
    if top in next((names.split() for place, names in OPTIONAL.items() if path.startswith(place)), []):
        return None if entry.lazy else "an optional package must be imported inside a function"
    return f"may import of third parties only {packages}"


def test_imports_go_down_the_staircase():
    wrong = []
    for path in python_files("fastvid", "kernels"):
        problems = [(entry, climbs(path, entry)) for entry in imports(path)]
        wrong += [f"{path}:{entry.line}: imports {entry.module}: {problem}" for entry, problem in problems if problem]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    "path, module",
    [
        ("fastvid/errors.py", "torch"), ("fastvid/nn/a.py", "fastvid.models"), ("fastvid/nn/a.py", "fastvid.kernels.a"),
        ("fastvid/data/a.py", "fastvid.ops"), ("fastvid/data/a.py", "pybullet"), ("fastvid/models/a.py", "fastvid.cli"),
        ("kernels/a/reference.py", "triton"), ("kernels/a/triton_gpu.py", "fastvid.kernels.b"), ("fastvid/x.py", "os"),
        ("fastvid/evaluate.py", "tests.conftest"), ("fastvid/ops/a.py", "triton"), ("fastvid/nn/a.py", "fastvid"),
    ],
)  # fmt: skip
def test_the_staircase_refuses(path, module):
    assert climbs(path, Import(module, 1, lazy=False))


def test_files_and_functions_are_short():
    wrong = []
    for path in tree():
        limit = {".py": 600, ".cpp": 500, ".cu": 500, ".h": 500}.get(Path(path).suffix)
        if limit is None:
            continue
        lines = (ROOT / path).read_text(encoding="utf-8").count("\n")
        if lines > limit or (path.endswith(".py") and lines > 400 and path not in LONG_FILES):
            wrong.append(f"{path}: {lines} lines; split it, or up to {limit} give the reason in LONG_FILES")
    for path in python_files():
        for node in ast.walk(parsed(path)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                kernel = any("triton.jit" in ast.unparse(decorator) for decorator in node.decorator_list)
                length = node.end_lineno - node.lineno + 1
                if length > (120 if kernel else 60):
                    wrong.append(f"{path}:{node.lineno}: {node.name} has {length} lines")
    assert not wrong, "\n".join(wrong)


def test_public_names_have_docstrings():
    wrong = []
    for path in python_files("fastvid"):
        for node in parsed(path).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
                if not ast.get_docstring(node):
                    wrong.append(f"{path}:{node.lineno}: {node.name} has no docstring")
    assert not wrong, "\n".join(wrong)


def dangerous(node: ast.AST) -> str | None:
    """What one piece of syntax could do that no file of ours may do; None where it is harmless."""
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
        risky = {"pickle", "cPickle", "dill", "shelve", "marshal"} & {module.split(".")[0] for module in modules}
        return f"imports {risky.pop()}, which runs code on loading" if risky else None
    if not isinstance(node, ast.Call):
        return None
    called = ast.unparse(node.func)
    given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
    if called == "torch.load" and given.get("weights_only") != "True":
        return "calls torch.load without weights_only=True"
    if called in ("eval", "exec", "os.system", "os.popen"):
        return f"calls {called}"
    if given.get("shell") == "True" or given.get("allow_pickle") == "True":
        return f"calls {called} with a shell or with pickle"
    return None


@pytest.mark.parametrize(
    "line",
    ["import pickle", "from pickle import loads", "torch.load(p)", "torch.load(p, weights_only=False)", "eval(x)",
     "exec(x)", "run(x, shell=True)", "np.load(p, allow_pickle=True)", "os.system(x)"],
)  # fmt: skip
def test_dangerous_lines_are_seen(line):
    assert any(dangerous(node) for node in ast.walk(ast.parse(line)))


def test_nothing_can_run_a_strangers_code():
    wrong = []
    for path in python_files():
        for node in ast.walk(parsed(path)):
            if problem := dangerous(node):
                wrong.append(f"{path}:{node.lineno}: {problem}")
    assert not wrong, "\n".join(wrong)


def test_no_forbidden_words():
    wrong = []
    for path in tree():
        content = (ROOT / path).read_bytes()
        if b"\0" in content[:8192]:
            continue
        for number, line in enumerate(content.decode("utf-8").splitlines(), 1):
            wrong += [f"{path}:{number}: {reason}" for pattern, reason in FORBIDDEN if re.search(pattern, line)]
    assert not wrong, "\n".join(wrong)


def test_rooms_are_complete():
    rooms = {path.split("/")[1] for path in tree() if fnmatch(path, "kernels/*/*")} - {"common"}
    wanted = [f"kernels/{room}/{name}" for room in sorted(rooms)
              for name in ("__init__.py", "README.md", "reference.py", "cases.py")]  # fmt: skip
    assert [path for path in wanted if path not in tree()] == []
    index = (ROOT / "kernels" / "README.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| `(\w+)` \|", index, re.MULTILINE)) == rooms
    # as a package of its own, `kernels` would hide another project's package of that name
    assert "kernels/__init__.py" not in tree()


@pytest.mark.skipif(importlib.util.find_spec("ruff") is None, reason="needs ruff: pip install -e '.[test]'")
def test_ruff_is_content():
    check = [sys.executable, "-m", "ruff", "check", "--output-format=concise", "."]
    told = subprocess.run(check, cwd=ROOT, capture_output=True, text=True)
    assert told.returncode == 0, told.stdout + told.stderr


STARTS = ["import fastvid", "import fastvid.cli", "from fastvid.cli import main; main(['--help'])"]


@pytest.mark.parametrize("asked", STARTS)
def test_torch_is_not_imported_before_it_is_needed(asked):
    probe = f"""
import sys
try:
    {asked}
except SystemExit as exit:
    assert not exit.code, exit.code
heavy = {{"torch", "triton", "av"}} & set(sys.modules)
sys.exit(f"imported {{heavy}}" if heavy else 0)
"""
    told = subprocess.run([sys.executable, "-c", probe], env={**os.environ, "PYTHONPATH": import_path()},
                          capture_output=True, text=True)  # fmt: skip
    assert told.returncode == 0, told.stderr


def import_path() -> str:
    """The folder that this process imports fastvid from, so that a child tests the same one."""
    return str(Path(importlib.util.find_spec("fastvid").origin).parents[1])


def test_doors_of_the_package():
    import fastvid

    assert fastvid.ops.nearest_codebook.__module__ == "fastvid.ops.vq"
    assert set(fastvid.__all__) <= set(dir(fastvid))
    assert callable(fastvid.load) and callable(fastvid.list_models)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = fastvid.nonsense


def test_fresh_memory_is_poisoned():
    assert torch.empty(3).isnan().all() and torch.ones(2).new_empty(4).isnan().all()
    assert torch.empty_like(torch.ones(2, dtype=torch.bfloat16)).isnan().all()
    assert (torch.empty(3, dtype=torch.int64) == torch.iinfo(torch.int64).max).all()
    kept = torch.ones(3)
    assert torch.empty(3, out=kept) is kept and (kept == 1).all()
