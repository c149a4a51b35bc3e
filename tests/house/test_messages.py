"""Messages speak to who reads them: advice in options and commands is given by the command line alone."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from house.test_structure import FILES, name_of

ON_THE_COMMAND_LINE = ("cluster/cli/", "cluster/bench/", "cluster/demo/", "cluster/machine/doctor.py")
ADVICE = re.compile(r"(^|\W)--[a-z]|\bexpertmesh (serve|status|swap|rollback|history|down|repair|doctor|bench|demo)\b")
ALLOWED = {  # what has no other way
    "cluster/machine/facts.py": "--log_dir=",
    "cluster/placement/capacity.py": "ray start --resources=",
    "cluster/state/records.py": "`expertmesh repair`",
    "cluster/state/repair.py": "expertmesh repair",
}


def texts(path: Path) -> Iterator[str]:
    """The string constants of a file, apart from docstrings."""
    tree = ast.parse(path.read_text())
    alone = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in alone:
            yield node.value


def test_no_message_of_the_library_gives_advice_in_options_or_commands() -> None:
    found = [
        (name_of(path), text)
        for path in FILES
        if not name_of(path).startswith(ON_THE_COMMAND_LINE)
        for text in texts(path)
        if ADVICE.search(text) and ALLOWED.get(name_of(path), text + "?") not in text
    ]
    assert not found
