"""Rules about the source: which package may import which, and no collective without a group."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ALLOWED = {
    "comm": {"comm"},
    "parallel": {"comm", "parallel"},
    "trainer": {"comm", "parallel", "trainer"},
}
COLLECTIVES = {
    "all_sum", "all_max", "all_min", "all_gather", "sum_scatter", "send", "recv", "recv_like",
}  # fmt: skip


def sources(package: str) -> list[tuple[Path, ast.Module]]:
    files = sorted((ROOT / package).rglob("*.py"))
    return [(path, ast.parse(path.read_text())) for path in files]


@pytest.mark.parametrize("package", ALLOWED)
def test_imports_go_down_only(package: str) -> None:
    """Catches a lower layer that imports a higher one."""
    for path, tree in sources(package):
        for node in ast.walk(tree):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.module:
                names = [node.module]
            tops = {name.split(".")[0] for name in names} & set(ALLOWED)
            assert tops <= ALLOWED[package], f"{path}:{getattr(node, 'lineno', 0)} imports {tops}"


@pytest.mark.parametrize("package", ALLOWED)
def test_every_collective_names_its_group(package: str) -> None:
    """Catches a collective on MLX's default group, which sub-groups may have replaced."""
    for path, tree in sources(package):
        for node in ast.walk(tree):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            owner = ast.unparse(node.func.value)
            if owner.endswith("distributed") and node.func.attr in COLLECTIVES:
                keywords = {keyword.arg for keyword in node.keywords}
                assert "group" in keywords, f"{path}:{node.lineno} uses the default group"


def test_import_is_light() -> None:
    """Catches `import comm` or its command line loading MLX, which costs time and may be absent."""
    code = "import sys, comm, comm.__main__; print([m for m in sys.modules if m.startswith('mlx')])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_without_mlx_one_sentence_names_the_extra() -> None:
    """Catches a bare loader error where MLX has no backend installed."""
    code = (
        "import sys\nsys.modules['mlx.core'] = None\nimport comm\n"
        "try:\n    comm.init\nexcept ImportError as error:\n    print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert "pip install -e '.[cpu]'" in done.stdout and done.stdout.count("\n") == 1, done.stderr


def test_no_exported_name_is_also_a_submodule() -> None:
    """Catches `comm.leave` turning from a function into a module once that module is loaded."""
    code = (
        "import comm, types\nfor _ in range(2):\n    for name in comm.__all__:\n"
        "        assert not isinstance(getattr(comm, name), types.ModuleType), name"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
