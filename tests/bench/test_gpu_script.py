"""bench/gpu.sh where there is no GPU: its steps under a Python that claims one, and what it may import."""

import os
import subprocess
import sys
from pathlib import Path

import gpu_tests
import pytest

ROOT = Path(__file__).resolve().parents[2]
# what a machine lent for its GPU need not have
ABSENT = ("av", "tyro", "hypothesis", "matplotlib", "faiss", "vector_quantize_pytorch", "einops", "skimage", "sklearn")
SITE = f"""
import importlib.util, sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {ABSENT}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

def find_spec(name, package=None, found=importlib.util.find_spec):
    return None if name.partition(".")[0] in {ABSENT} else found(name, package)

sys.meta_path.insert(0, Absent())
importlib.util.find_spec = find_spec
"""


@pytest.fixture
def bare(tmp_path) -> dict[str, str]:
    """The environment of a Python without the packages that gpu.sh must not need."""
    (tmp_path / "sitecustomize.py").write_text(SITE)
    return {**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}", "PYTEST_ADDOPTS": "-p no:hypothesispytest"}


def told(*command: str, env: dict[str, str]) -> subprocess.CompletedProcess:
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)


def test_gpu_tests_are_collected_without_the_packages_that_may_be_missing(bare):
    files = [str(path) for path in gpu_tests.files()]
    assert len(files) > 3
    found = told(sys.executable, "-m", "pytest", "-q", "-m", "gpu", "--collect-only", "-p", "no:cacheprovider", *files,
                 env=bare)  # fmt: skip
    assert found.returncode == 0, found.stdout[-2000:] + found.stderr[-2000:]
    assert "test_laws.py" in found.stdout


def test_files_with_gpu_tests_are_found(tmp_path):
    for name, text, holds in (
        ("fixture", "@pytest.fixture\ndef model(device): ...", True), ("takes", "def test_a(device): ...", True),
        ("mark", "@pytest.mark.gpu\ndef test_a(): ...", True), ("none", "def helper(device): ...", False),
        ("word", "def test_a():\n    'pytest.mark.gpu'", False),
        ("own", "@pytest.mark.parametrize('device', ['x'])\ndef test_a(device): ...", False),
    ):  # fmt: skip
        (tmp_path / f"test_{name}.py").write_text(text)
        assert gpu_tests._names_a_gpu(gpu_tests.ast.parse(text)) is holds, name
    assert len(gpu_tests.files(tmp_path)) == 3


PERSISTENT = "tests/ops/test_pixelcnn_sampler_cuda.py"
PYTEST = "-m pytest -q -m gpu and not slow and not long -p no:cacheprovider -rs"


def checkout(folder: Path, code: int = 0) -> Path:
    """A folder with gpu.sh and, for every step, a program that notes its call and exits with `code`."""
    (folder / "bench").mkdir()
    for name in ("fastvid", "kernels", "tests"):
        (folder / name).mkdir()
    for name in ("CMakeLists.txt", "pyproject.toml"):
        (folder / name).write_text("")
    (folder / "bench" / "gpu.sh").write_text((ROOT / "bench" / "gpu.sh").read_text())
    (folder / "python").write_text(f"""#!/usr/bin/env bash
case "$*" in
    -c*get_device_name*) printf '2.11\\nSome GPU\\n'; exit ;;
    -c*xdist*) exit 1 ;;
    *gpu_tests.py) printf 'tests/test_a.py\\n{PERSISTENT}\\n'; exit ;;
    *--list) printf 'a_cpu x\\nsample_gpu_b y\\nvq_gpu z\\n'; exit ;;
esac
echo "$*" >> calls
[ ! -e fastvid/libfastvid_cuda.so ] || echo with CUDA kernels >> calls
exit {code}
""")
    (folder / "python").chmod(0o755)
    (folder / "cmake").write_text("#!/usr/bin/env bash\necho cmake $1 >> calls\n")
    (folder / "cmake").chmod(0o755)
    return folder


def run(folder: Path) -> subprocess.CompletedProcess:
    env = {**os.environ, "PYTHON": str(folder / "python"), "PATH": f"{folder}:{os.environ['PATH']}"}
    return subprocess.run(["bash", "bench/gpu.sh"], cwd=folder, env=env, capture_output=True, text=True)


def test_every_step_runs_once(tmp_path):
    folder = checkout(tmp_path)
    first = run(folder)
    assert first.returncode == 0, first.stdout + first.stderr
    calls = (folder / "calls").read_text().splitlines()
    assert calls == [
        "cmake -S", "cmake --build", "cmake --install",
        f"{PYTEST} tests/test_a.py", "bench/status.py --verify --json bench/results/",
        "bench/run.py --case sample_gpu_b --json bench/results/", "bench/run.py --tune",
        "bench/run.py --case vq_gpu --json bench/results/",
    ]  # fmt: skip
    again = run(folder)
    assert again.returncode == 0 and again.stdout.count("done before") == 6
    assert (folder / "calls").read_text().splitlines() == calls
    (folder / "kernels" / "new.cpp").write_text("")  # other sources: nothing counts as done
    run(folder)
    assert len((folder / "calls").read_text().splitlines()) == 2 * len(calls)


def test_failures_are_told_and_tried_again(tmp_path):
    folder = checkout(tmp_path, code=7)
    found = run(folder)
    assert found.returncode == 1 and "failed: tests (exit code 7)" in found.stdout and "vq_gpu" in found.stdout
    assert "build: done before" in run(folder).stdout


def test_out_of_time(tmp_path):
    folder = checkout(tmp_path)
    script = folder / "bench" / "gpu.sh"
    script.write_text(script.read_text().replace("SECONDS + 530", "SECONDS + 5"))
    found = run(folder)
    assert found.returncode == 4 and "not done in time: build tests verify sample_gpu_b tune vq_gpu" in found.stdout


@pytest.mark.parametrize("sound", [True, False])
def test_the_persistent_sampler_is_tried_first_and_set_aside_if_it_hangs(tmp_path, sound):
    folder = checkout(tmp_path)
    library, tests = folder / "fastvid" / "libfastvid_cuda.so", folder / PERSISTENT
    tests.parent.mkdir()
    for path in (library, tests):
        path.write_text("")
    python, script = folder / "python", folder / "bench" / "gpu.sh"
    if not sound:
        python.write_text(python.read_text().replace("esac", f"    *{PERSISTENT}) sleep 60 ;;\nesac"))
        script.write_text(script.read_text().replace("step persistent 60", "step persistent 1"))
    found, calls = run(folder), (folder / "calls").read_text().splitlines()
    assert library.exists() and found.returncode == (0 if sound else 1), found.stdout
    if sound:
        assert calls[3:6] == [f"{PYTEST} {PERSISTENT}", "with CUDA kernels", f"{PYTEST} tests/test_a.py"]
    else:
        assert calls[3] == f"{PYTEST} tests/test_a.py" and "with CUDA kernels" not in calls
        assert "set aside" in found.stdout and "failed: persistent (exit code 124, over 1 s)" in found.stdout
