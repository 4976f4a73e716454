"""Names the test files that hold GPU tests, one a line; others may import what a GPU's machine need not have."""

import ast
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def files(tests: Path = ROOT / "tests") -> list[Path]:
    """Test files with a test or a fixture that takes `device`, or with a mark that says gpu."""
    return [path for path in sorted(tests.rglob("test_*.py")) if _names_a_gpu(ast.parse(path.read_text("utf-8")))]


def _names_a_gpu(tree: ast.Module) -> bool:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and "device" in {argument.arg for argument in node.args.args}:
            told = " ".join(map(ast.unparse, node.decorator_list))
            if ("fixture" in told or node.name.startswith("test_")) and "'device'" not in told:
                return True  # the fixture of that name, unless the test brings devices of its own
        if isinstance(node, ast.Attribute) and ast.unparse(node) == "pytest.mark.gpu":
            return True
    return False


if __name__ == "__main__":
    found = files()
    print("\n".join(str(path.relative_to(ROOT)) for path in found))
    sys.exit(0 if found else 1)
