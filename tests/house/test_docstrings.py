"""What the facade shows explains itself: every public class has an example, and one that needs no cluster is run."""

from __future__ import annotations

import ast
import doctest
import inspect
import textwrap
from typing import Any

import numpy as np
import pytest
import torch

import expertmesh
from expertmesh import Client, gates

FACADE: dict[str, Any] = {name: getattr(expertmesh, name) for name in expertmesh.__all__}
CLASSES: dict[str, type] = {name: shown for name, shown in FACADE.items() if inspect.isclass(shown)}
CLASSES |= {f"gates.{name}": getattr(gates, name) for name in gates.__all__ if inspect.isclass(getattr(gates, name))}
NAMES = {**FACADE, "Routing": gates.Routing, "np": np, "torch": torch}


@pytest.mark.parametrize("name", CLASSES)
def test_a_public_class_shows_an_example_that_does_what_it_says(name: str) -> None:
    """Lines after >>> are run; what stands below "Example:" needs a cluster, and is only compiled."""
    text = inspect.cleandoc(vars(CLASSES[name])["__doc__"])
    session = doctest.DocTestParser().get_doctest(text, dict(NAMES), name, None, 0)
    snippet = text.partition("\nExample:\n")[2]
    assert session.examples or snippet
    said: list[str] = []
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    runner.run(session, out=said.append)
    assert not runner.failures, "".join(said)
    compile(textwrap.dedent(snippet), name, "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)


@pytest.mark.parametrize("kind", [Client, expertmesh.AsyncClient])
def test_a_method_of_a_client_says_what_it_returns_and_not_how(kind: type) -> None:
    methods = inspect.getmembers(kind, inspect.isfunction)
    returned = {name: inspect.signature(method).return_annotation for name, method in methods}
    assert not {name: what for name, what in returned.items() if "Flow" in str(what)}
    assert (returned["call"], returned["swap"], returned["forward"]) == ("Reply", "SwapOutcome", "Array")
    assert inspect.get_annotations(kind.call)["return"] == "Reply"
