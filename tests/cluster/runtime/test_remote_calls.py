"""Whatever is called through Ray is there: a name after a handle is no attribute that a type checker could look up."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

RUNTIME = Path(__file__).parents[3] / "cluster" / "runtime"


def tree_of(file: str) -> ast.Module:
    return ast.parse((RUNTIME / file).read_text())


def remote_names(tree: ast.Module) -> set[str]:
    """The methods of actors that a file calls: `name` of every `handle.name.remote(...)`."""
    calls = [node.func for node in ast.walk(tree) if isinstance(node, ast.Call)]
    remote = [call.value for call in calls if isinstance(call, ast.Attribute) and call.attr == "remote"]
    return {method.attr for method in remote if isinstance(method, ast.Attribute)}


@pytest.mark.parametrize("file", ["ray_backend.py", "ray_ports.py", "ray_transport.py"])
def test_an_actor_has_every_method_that_is_called_through_ray(file: str) -> None:
    actors = [node for node in tree_of("ray_actors.py").body if isinstance(node, ast.ClassDef)]
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    methods = {node.name for actor in actors for node in actor.body if isinstance(node, kinds)}
    called = remote_names(tree_of(file))
    assert called
    assert called <= methods
