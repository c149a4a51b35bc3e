"""The controller's hands: what is decided is carried out, whatever it is."""

from __future__ import annotations

import ast
import inspect
import textwrap
from typing import get_args

from expertmesh.cluster.control.events import Action
from expertmesh.cluster.control.executor import Executor


def test_every_action_is_carried_out() -> None:
    tree = ast.parse(textwrap.dedent(inspect.getsource(Executor.perform)))
    assert {kind.__name__ for kind in get_args(Action)} <= {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)}
