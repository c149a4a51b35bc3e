"""The rules of the house, read off the syntax tree: order of packages, fences, sizes, and what is never called."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FACADE = ROOT / "src" / "expertmesh"
LEVELS = {"experts": 0, "router": 1, "cluster": 2}
FILES = sorted(path for package in LEVELS for path in (ROOT / package).rglob("*.py"))
ALL_FILES = [*FILES, *sorted(FACADE.glob("*.py"))]

FENCES = {  # who alone may import what
    "ray": ("cluster/actors.py", "cluster/ray_backend.py", "cluster/ray_ports.py"),
    "grpc": ("cluster/gateway.py", "cluster/client.py"),
    "msgpack": ("experts/wire.py",),
    "sqlite3": ("cluster/registry.py",),
    "safetensors": ("experts/weights.py",),
    "transformers": ("cluster/hf.py",),
    "yaml": ("cluster/yaml_file.py",),
    "matplotlib": ("cluster/bench_plot.py",),
    "click": ("cluster/cli*.py",),
    "rich": ("cluster/cli*.py", "cluster/demo*.py"),
}
NO_TORCH = (  # what a process with the base install alone imports
    "cluster/client.py", "cluster/auth.py", "cluster/runfile.py", "cluster/process.py", "cluster/claim.py",
    "cluster/machine.py", "cluster/doctor.py", "cluster/cli.py", "cluster/swap_call.py",
    "cluster/narrow.py", "cluster/stream_protocol.py", "cluster/stream_exchange.py",
    "cluster/swap_protocol.py", "experts/errors.py", "experts/extras.py",
    "experts/protocol.py", "experts/spec.py", "experts/version.py", "experts/wire.py",
    "cluster/bench_load.py", "cluster/bench_plot.py", "cluster/bench_report.py", "cluster/bench_samples.py",
    "cluster/bench_schedule.py", "cluster/bench_search.py", "cluster/bench_session.py", "cluster/bench_target.py",
    "cluster/cli_bench.py", "cluster/cli_bench_view.py",
)  # fmt: skip
NEVER_IMPORTED = ("pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve")
NEVER_CALLED = ("eval", "exec", "torch.load", "yaml.unsafe_load", "yaml.full_load", "os.system")
MOST_LINES = 300


def name_of(path: Path) -> str:
    return path.relative_to(FACADE if FACADE in path.parents else ROOT).as_posix()


def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def imports(path: Path) -> Iterator[tuple[str, ast.Import | ast.ImportFrom]]:
    """Every module that a file imports, in full, with `expertmesh` at the head of our own."""
    own = ("expertmesh", *Path(name_of(path)).parent.parts)
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = own[: len(own) - node.level + 1] if node.level else ()
            module = ".".join((*parents, *(node.module or "").split("."))).rstrip(".")
            yield module, node
            yield from ((f"{module}.{alias.name}", node) for alias in node.names)


@pytest.mark.parametrize("path", ALL_FILES, ids=name_of)
def test_a_package_never_imports_a_higher_one(path: Path) -> None:
    level = LEVELS.get(Path(name_of(path)).parts[0], len(LEVELS))
    ours = [module.split(".") for module, _ in imports(path) if module.startswith("expertmesh.")]
    assert not [module for module in ours if LEVELS.get(module[1], 0) > level]


@pytest.mark.parametrize("path", ALL_FILES, ids=name_of)
def test_first_party_imports_are_relative_and_stand_at_the_head(path: Path) -> None:
    tree = tree_of(path)
    assert not [m for m, node in imports(path) if m.startswith("expertmesh") and not getattr(node, "level", 0)]
    functions = [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
    inside = [node for function in functions for node in ast.walk(function)]
    assert not [node.lineno for node in inside if isinstance(node, ast.ImportFrom) and node.level]


@pytest.mark.parametrize("library", FENCES)
def test_a_library_is_imported_only_behind_its_fence(library: str) -> None:
    importers = {name_of(p) for p in ALL_FILES for module, _ in imports(p) if module.split(".")[0] == library}
    assert not [name for name in importers if not any(fnmatch(name, allowed) for allowed in FENCES[library])]


@pytest.mark.parametrize("name", NO_TORCH)
def test_what_the_base_install_imports_needs_no_torch(name: str) -> None:
    assert not [module for module, _ in imports(ROOT / name) if module.split(".")[0] in ("torch", "ray")]


@pytest.mark.parametrize("path", ALL_FILES, ids=name_of)
def test_nothing_runs_bytes_that_came_from_outside(path: Path) -> None:
    assert not [module for module, _ in imports(path) if module.split(".")[0] in NEVER_IMPORTED]
    calls = [ast.unparse(node.func) for node in ast.walk(tree_of(path)) if isinstance(node, ast.Call)]
    assert not [call for call in calls if call in NEVER_CALLED]
    assert not [module for module, _ in imports(path) if module in NEVER_CALLED]


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_a_file_is_short_and_says_what_it_is_for(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MOST_LINES
    assert ast.get_docstring(tree_of(path))
    assert "util" not in path.stem


@pytest.mark.parametrize("path", ALL_FILES, ids=name_of)
def test_input_is_never_checked_with_assert(path: Path) -> None:
    assert not [node.lineno for node in ast.walk(tree_of(path)) if isinstance(node, ast.Assert)]


def test_there_is_no_cycle_of_imports() -> None:
    files = {f"expertmesh.{name_of(path)[:-3].replace('/', '.')}".removesuffix(".__init__"): path for path in ALL_FILES}
    graph = {module: {found for found, _ in imports(path) if found in files} for module, path in files.items()}
    graph.pop("expertmesh")  # the facade imports on demand, and its names for type checkers
    while graph:
        leaves = {module for module, needs in graph.items() if not (needs - {module}) & graph.keys()}
        assert leaves, f"a cycle among {sorted(graph)}"
        graph = {module: needs for module, needs in graph.items() if module not in leaves}


def test_the_packages_are_links_so_that_one_tree_is_imported() -> None:
    for package in LEVELS:
        link = FACADE / package
        assert link.is_symlink()
        assert link.resolve() == (ROOT / package).resolve()
