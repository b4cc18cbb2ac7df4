"""Rules about the source: which package may import which, and no collective without a group."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("comm", "parallel", "trainer")
# Folder -> what else its files may import from the three packages; the lower floors come first.
FLOORS: dict[str, tuple[str, ...]] = {
    "comm": (),
    "comm/launcher": ("comm",),
    "comm/tools": ("comm", "comm/launcher"),
    "comm/__main__": ("comm", "comm/launcher", "comm/tools"),
    "parallel/architectures": (),
    "parallel": ("comm", "parallel/architectures"),
    "parallel/tensor": ("comm", "parallel", "parallel/architectures"),
    "parallel/pipeline": ("comm", "parallel", "parallel/architectures"),
    "parallel/fsdp": ("comm", "parallel"),
    "parallel/__init__": ("parallel", "parallel/tensor", "parallel/pipeline", "parallel/fsdp"),
}
# The trainer's floors, the lowest first: a folder imports from its own line and from those above it here.
TRAINER = (
    ("nearest",),
    ("recipe", "files"),
    ("data",),
    ("agreement",),
    ("layers", "metrics", "machine"),
    ("model",),
    ("objectives", "generation"),
    ("training",),
    ("opening",),
    ("build", "memory"),
    ("checkpoint", "bench", "reports"),
    ("results",),
    ("running", "selftest"),
    ("verbs",),
    ("__main__",),
)
# Import nothing of the trainer but themselves, the lowest floor and what is named here.
ALONE: dict[str, tuple[str, ...]] = {"recipe": (), "files": (), "data": ("trainer/recipe",)}
BELOW_TRAINER = ("comm", "trainer/__init__", "parallel/__init__", "parallel/tensor", "parallel/pipeline")
COLLECTIVES = {
    "all_sum", "all_max", "all_min", "all_gather", "sum_scatter", "send", "recv", "recv_like",
}  # fmt: skip


def sources(package: str) -> list[tuple[Path, ast.Module]]:
    files = sorted((ROOT / package).rglob("*.py"))
    return [(path, ast.parse(path.read_text())) for path in files]


def folder_of(module: str) -> str:
    """The folder of a module, or the module itself where that stands beside the folders."""
    top, *rest = module.split(".")
    if top == "trainer":
        return f"trainer/{rest[0] if rest else '__init__'}"
    if rest and f"{top}/{rest[0]}" in FLOORS:
        return f"{top}/{rest[0]}"
    return "parallel/__init__" if module == "parallel" else top


def walk_what_runs(tree: ast.AST) -> Iterator[ast.AST]:
    """All nodes but those that only type checkers see."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        yield node
        yield from walk_what_runs(node)


def imports() -> set[tuple[str, str, str]]:
    """Every import between folders: the file, its folder, and the other's."""
    found = set()
    for package in PACKAGES:
        for path, tree in sources(package):
            module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
            for node in walk_what_runs(tree):
                names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
                if isinstance(node, ast.ImportFrom) and node.module and not node.level:
                    names = [node.module]
                for name in names:
                    if name.split(".")[0] in PACKAGES and folder_of(name) != folder_of(module):
                        found.add((str(path.relative_to(ROOT)), folder_of(module), folder_of(name)))
    return found


def allowed_from(folder: str) -> set[str]:
    if folder in FLOORS:
        return set(FLOORS[folder])
    name = folder.removeprefix("trainer/")
    if name in ("__init__", "nearest"):
        return set()
    if name in ALONE:
        return {"trainer/nearest", "comm", *ALONE[name]}
    floor = next((number for number, names in enumerate(TRAINER) if name in names), None)
    assert floor is not None, f"{folder} has no floor: add it to TRAINER"
    return {f"trainer/{other}" for names in TRAINER[: floor + 1] for other in names} | set(BELOW_TRAINER)


def test_imports_go_down_only() -> None:
    """Catches a lower floor that imports a higher one, and a trainer that reaches behind the packages' fronts."""
    wrong = [f"{path} imports from {there}" for path, here, there in imports() if there not in allowed_from(here)]
    assert not wrong, "\n".join(sorted(wrong))


def test_folders_of_one_floor_make_no_circle() -> None:
    """Catches two folders of a floor that import each other, by way of others too."""
    edges: dict[str, set[str]] = {}
    for _, here, there in imports():
        edges.setdefault(here, set()).add(there)
    for start in edges:
        seen, waiting = set(), set(edges[start])
        while waiting:
            seen.add(one := waiting.pop())
            waiting |= edges.get(one, set()) - seen
        assert start not in seen, f"{start} imports itself by way of others"


@pytest.mark.parametrize("package", PACKAGES)
def test_no_tool_of_tests_in_the_packages(package: str) -> None:
    """Catches library code that works by way of mocks."""
    for path, tree in sources(package):
        for node in ast.walk(tree):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {name.split(".")[0] for name in names} & {"pytest", "unittest"}, path


@pytest.mark.parametrize("package", PACKAGES)
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
