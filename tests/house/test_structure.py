"""The rules of the house, read off the syntax tree: order of folders, fences, sizes, and what is never called."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable
from fnmatch import fnmatch
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FACADE = ROOT / "src" / "expertmesh"
PACKAGES = ("experts", "router", "cluster")
FILES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
ALL_FILES = [*FILES, *sorted(FACADE.glob("*.py"))]

ORDER = (  # a folder, or a file beside the folders, imports only from its own and from those before it
    "experts/errors", "experts/optional_imports", "experts/package_version", "experts/names", "experts/suggestion",
    "experts/wire", "experts/spec", "experts/protocol", "experts/tensors", "experts/weights", "experts/identity",
    "experts/construct", "experts/sums", "experts/staging", "experts/grouped", "experts/modules",
    "experts/training", "experts/transform", "experts/chaos", "experts/host",
    "router/gates", "router/mixture", "router/epochs", "router/fanout", "router/training", "router/request",
    "cluster/rpc", "cluster/machine", "cluster/client", "cluster/placement", "cluster/config", "cluster/state",
    "cluster/control", "cluster/channel", "cluster/gateway", "cluster/runtime", "cluster/attach",
    "cluster/torch_client", "cluster/training", "cluster/owner", "cluster/bench", "cluster/demo",
    "cluster/applications", "cluster/cli",
)  # fmt: skip
FENCES = {  # who alone may import what
    "ray": tuple(f"cluster/runtime/ray_{name}.py" for name in ("actors", "attach", "backend", "ports")),
    "grpc": ("cluster/gateway/grpc_server.py", "cluster/client/client.py", "cluster/client/routers/channels.py"),
    "msgpack": ("experts/wire.py",),
    "sqlite3": ("cluster/state/registry.py",),
    "safetensors": ("experts/weights/files.py",),
    "transformers": ("cluster/checkpoints/*.py",),
    "yaml": ("cluster/config/yaml_file.py",),
    "pydantic": ("cluster/config/cluster_config.py", "cluster/config/records.py"),
    "matplotlib": ("cluster/bench/plot.py", "cluster/applications/plots.py"),
    "click": ("cluster/cli/*.py",),
    "rich": ("cluster/cli/*.py", "cluster/demo/*.py"),
}
NO_TORCH = (  # what a process with the base install alone imports
    "cluster/rpc/*.py", "cluster/machine/*.py", "cluster/client/*.py", "cluster/bench/*.py",
    "cluster/cli/main.py", "cluster/cli/bench.py", "cluster/cli/bench_view.py",
    "experts/errors.py", "experts/optional_imports.py", "experts/package_version.py", "experts/protocol.py",
    "experts/spec.py", "experts/wire.py",
)  # fmt: skip
DECISIONS = (  # rules that are told everything, the time too, and do nothing themselves
    "cluster/control/*.py", "cluster/placement/*.py", "router/epochs/epochs.py", "router/epochs/leases.py",
    "router/fanout/fair_queue.py", "router/fanout/lateness.py", "router/fanout/replica_view.py",
    "router/request/admission.py",
)  # fmt: skip
SHELLS = tuple(  # and what stands beside them: it waits, reads, writes and tells
    f"cluster/control/{name}.py"
    for name in (
        "candidate_records",
        "candidates",
        "controller",
        "executor",
        "messages",
        "ports",
        "routers/attached",
        "routers/follow",
        "routers/mailbox",
        "swap_transactions",
    )
)
NO_DECISION_KNOWS = ("asyncio", "datetime", "grpc", "ray", "socket", "sqlite3", "threading", "time", "torch")
NEVER_IMPORTED = ("pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve")
NEVER_CALLED = ("eval", "exec", "torch.load", "yaml.unsafe_load", "yaml.full_load", "os.system")
MOST_LINES = 400
MOST_FILES = 15


def name_of(path: Path) -> str:
    return path.relative_to(FACADE if FACADE in path.parents else ROOT).as_posix()


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def modules(tree: ast.Module, own: tuple[str, ...]) -> tuple[tuple[str, ast.Import | ast.ImportFrom], ...]:
    """Every module that a file of the package `own` imports, in full, with `expertmesh` at the head of our own."""
    found: list[tuple[str, ast.Import | ast.ImportFrom]] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, node) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parents = own[: len(own) - node.level + 1] if node.level else ()
            module = ".".join((*parents, *(node.module or "").split("."))).rstrip(".")
            found += [(module, node), *((f"{module}.{alias.name}", node) for alias in node.names)]
    return tuple(found)


@cache
def imports(path: Path) -> tuple[tuple[str, ast.Import | ast.ImportFrom], ...]:
    return modules(tree_of(path), ("expertmesh", *Path(name_of(path)).parent.parts))


def place_of(name: str) -> int | None:
    """Where a file or module stands in ORDER; None for what is in no folder of it (a package itself)."""
    return next((place for place, entry in enumerate(ORDER) if f"{name}/".startswith(f"{entry}/")), None)


def upward(name: str, imported: Iterable[str]) -> list[str]:
    """Which of the modules that a file imports stand after it in ORDER."""
    own = place_of(name.removesuffix(".py"))
    places = {module: place_of(module.removeprefix("expertmesh.").replace(".", "/")) for module in imported}
    return [module for module, place in places.items() if own is not None and place is not None and place > own]


def test_a_folder_never_imports_a_later_one() -> None:
    assert not {name_of(p): up for p in FILES if (up := upward(name_of(p), (module for module, _ in imports(p))))}


def test_every_file_has_its_place_in_the_order() -> None:
    names = [name_of(path) for path in FILES if name_of(path).count("/") > 1 or path.name != "__init__.py"]
    assert not [name for name in names if place_of(name.removesuffix(".py")) is None]
    assert not [entry for entry in ORDER if not (ROOT / entry).is_dir() and not (ROOT / f"{entry}.py").is_file()]


def test_an_upward_import_is_noticed() -> None:
    planted = {
        "from ...router.request.forward import Router": ("experts", "weights"),
        "from ..gateway import server": ("cluster", "control"),
        "from .host import ExpertHost": ("experts",),
    }
    for line, package in planted.items():
        found = [module for module, _ in modules(ast.parse(line), ("expertmesh", *package))]
        assert upward("/".join((*package, "errors.py" if len(package) == 1 else "files.py")), found), line
    assert not upward(
        "cluster/gateway/gateway.py", ["expertmesh.cluster.control.ports", "expertmesh.experts.wire", "grpc"]
    )


def test_a_folder_holds_at_most_fifteen_files_and_says_its_role() -> None:
    sizes = Counter(path.parent for path in FILES)
    assert not {str(folder): count for folder, count in sizes.items() if count > MOST_FILES}
    roles = {folder: folder / "__init__.py" for folder in sizes}
    assert not [name_of(role) for role in roles.values() if not role.is_file() or not ast.get_docstring(tree_of(role))]
    silent = {role for role in roles.values() if name_of(role) != "router/gates/__init__.py"}  # the table of gates
    assert not [name_of(role) for role in silent if len(tree_of(role).body) > 1]


def test_first_party_imports_are_relative_and_stand_at_the_head() -> None:
    for path in ALL_FILES:
        absolute = [m for m, node in imports(path) if m.startswith("expertmesh") and not getattr(node, "level", 0)]
        assert not absolute, name_of(path)
        functions = [n for n in ast.walk(tree_of(path)) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))]
        inside = [node for function in functions for node in ast.walk(function)]
        hidden = [node.lineno for node in inside if isinstance(node, ast.ImportFrom) and node.level]
        assert not hidden, name_of(path)


@pytest.mark.parametrize("library", FENCES)
def test_a_library_is_imported_only_behind_its_fence(library: str) -> None:
    importers = {name_of(p) for p in ALL_FILES for module, _ in imports(p) if module.split(".")[0] == library}
    assert not [name for name in importers if not any(fnmatch(name, allowed) for allowed in FENCES[library])]


@pytest.mark.parametrize("pattern", NO_TORCH)
def test_what_the_base_install_imports_needs_no_torch(pattern: str) -> None:
    paths = [path for path in FILES if fnmatch(name_of(path), pattern)]
    assert paths
    heavy = {name_of(p): m for p in paths for m, _ in imports(p) if m.split(".")[0] in ("torch", "ray")}
    assert not heavy


def decisions() -> list[str]:
    names = [name_of(path) for path in FILES if any(fnmatch(name_of(path), pattern) for pattern in DECISIONS)]
    assert set(SHELLS) < set(names)
    return [name for name in names if name not in SHELLS]


def test_a_decision_knows_no_clock_no_socket_no_torch_and_no_ray() -> None:
    known = {name: [m for m, _ in imports(ROOT / name) if m.split(".")[0] in NO_DECISION_KNOWS] for name in decisions()}
    assert not {name: modules for name, modules in known.items() if modules}
    files = ", ".join(f"expertmesh.{name[:-3].replace('/', '.').removesuffix('.__init__')}" for name in decisions())
    code = f"import sys, {files}; print(*({{'grpc', 'ray', 'torch'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_a_decision_has_a_test_of_its_name() -> None:
    for path in map(Path, decisions()):
        if not any(isinstance(node, ast.FunctionDef) for node in ast.walk(tree_of(ROOT / path))):
            continue  # records alone
        assert list((ROOT / "tests" / path.parts[0]).rglob(f"test_{path.stem}.py")), path


def test_nothing_runs_bytes_that_came_from_outside() -> None:
    for path in ALL_FILES:
        imported = [module for module, _ in imports(path)]
        calls = [ast.unparse(node.func) for node in ast.walk(tree_of(path)) if isinstance(node, ast.Call)]
        found = [module for module in imported if module.split(".")[0] in NEVER_IMPORTED or module in NEVER_CALLED]
        found += [call for call in calls if call in NEVER_CALLED]
        assert not found, name_of(path)


def test_a_file_is_short_and_says_what_it_is_for() -> None:
    lengths = {name_of(path): len(path.read_text(encoding="utf-8").splitlines()) for path in FILES}
    assert not {name: length for name, length in lengths.items() if length > MOST_LINES}
    assert not [name_of(path) for path in FILES if not ast.get_docstring(tree_of(path)) or "util" in path.stem]


def test_input_is_never_checked_with_assert() -> None:
    asserts = {name_of(p): n.lineno for p in ALL_FILES for n in ast.walk(tree_of(p)) if isinstance(n, ast.Assert)}
    assert not asserts


def test_there_is_no_cycle_of_imports() -> None:
    files = {f"expertmesh.{name_of(path)[:-3].replace('/', '.')}".removesuffix(".__init__"): path for path in ALL_FILES}
    graph = {module: {found for found, _ in imports(path) if found in files} for module, path in files.items()}
    graph.pop("expertmesh")  # the facade imports on demand, and its names for type checkers
    while graph:
        leaves = {module for module, needs in graph.items() if not (needs - {module}) & graph.keys()}
        assert leaves, f"a cycle among {sorted(graph)}"
        graph = {module: needs for module, needs in graph.items() if module not in leaves}


def test_every_role_has_its_tests() -> None:
    roles = [path for path in (ROOT / "cluster").iterdir() if (path / "__init__.py").is_file()]
    assert not [role.name for role in roles if not list((ROOT / "tests" / "cluster" / role.name).glob("test_*.py"))]


def test_the_packages_are_links_so_that_one_tree_is_imported() -> None:
    for package in PACKAGES:
        link = FACADE / package
        assert link.is_symlink()
        assert link.resolve() == (ROOT / package).resolve()
