"""bench/static.py as it is called: wrong command lines, sources that cannot be read, compilers that die."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import static

ROOT = Path(__file__).resolve().parents[2]
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")


def run_static(*arguments: str) -> subprocess.CompletedProcess:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(ROOT / "bench" / "static.py"), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def toy_room(folder: Path, text: str) -> list[str]:
    (folder / "toy").mkdir()
    (folder / "toy" / "triton_gpu.py").write_text(text, encoding="utf-8")
    return ["--kernels", str(folder)]


@pytest.mark.parametrize(
    "arguments, told",
    [
        (["--write", "--target", "sm_90"], "leave --target and --changed out"),
        (["--room", "nonsense"], "no triton_gpu.py in nonsense"),
        (["--kernels", str(ROOT / "fastvid")], "no triton_gpu.py in"),
    ],
)  # fmt: skip
def test_a_wrong_command_line_is_one_line(arguments, told, capsys):
    assert static.main(arguments) == 2
    error = capsys.readouterr().err
    assert told in error and error.count("\n") == 1


def test_the_interpreter_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert static.main(toy_room(tmp_path, "")) == 2
    assert "TRITON_INTERPRET is set" in capsys.readouterr().err


@needs_triton
@pytest.mark.parametrize(
    "text, told",
    [
        ("import nonsense", "No module named 'nonsense'"), ("variants = list", "must name each variant once, got []"),
        ("def variants(): return [V] * 2", "got ['a', 'a']"), ("def variants(): return [V._replace(targets=('sm_1',))]",
                                                               "names targets ['sm_1']"),
    ],
)  # fmt: skip
def test_a_source_that_contradicts_itself_is_one_line(text, told, tmp_path):
    head = "from fastvid.kernels.common.variant import Variant\nV = Variant(None, 'a', {}, {}, 4, 1, False, None)\n"
    ran = run_static(*toy_room(tmp_path, head + text))
    assert ran.returncode == 2 and told in ran.stderr and ran.stderr.count("\n") == 1, ran.stderr


CRASH = """
import os

from fastvid.kernels.common.variant import Variant


class Kernel:
    def __init__(self, fatal):
        self.fatal = fatal

    @property
    def arg_names(self):
        return os._exit(9) if self.fatal else ["x_ptr"]


def variants():
    return [Variant(Kernel(fatal), str(fatal), {}, {}, 4, 1, False, None, ("sm_80",)) for fatal in (False, True)]
"""


@needs_triton
def test_a_compiler_that_dies_takes_only_its_own_kernel_along(tmp_path):
    told = run_static(*toy_room(tmp_path, CRASH), "--jobs", "1")
    assert told.returncode == 1, told.stderr
    assert "toy: True sm_80: the compiler crashed" in told.stdout
    assert "toy: False sm_80: ValueError: the signature names []" in told.stdout


def test_a_file_that_is_no_report_is_one_line(tmp_path):
    (tmp_path / "static.json").write_text('{"triton": "3.7.1"}', encoding="utf-8")
    with pytest.raises(static.StaticError, match="is not a report"):
        static.read_report(tmp_path / "static.json")
