"""What the README shows is run as it stands there."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from expertmesh import Client, Cluster

ROOT = Path(__file__).parents[2]


@pytest.mark.ray
def test_first_example(tmp_path: Path, nothing_left: None) -> None:
    first = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)[0]
    script = tmp_path / "example.py"
    script.write_text(first)
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    x = np.array([1.0, 2.0, 3.0])
    before, after = done.stdout.strip().split("\n")
    assert str(0.5 * (np.sin(x) + np.cos(x) + np.tan(x))) in before
    assert "'waves/tan': 'v1-" in before
    assert after == str(0.5 * (np.sin(x) + np.cos(x) + np.tanh(x)))


@pytest.mark.parametrize("script", sorted((ROOT / "examples").glob("[!_]*.py")), ids=lambda path: path.name)
def test_what_an_example_imports_is_there(script: Path) -> None:
    nodes = [node for node in ast.walk(ast.parse(script.read_text())) if isinstance(node, ast.ImportFrom)]
    names = [(node.module or "", alias.name) for node in nodes for alias in node.names]
    ours = [(module, name) for module, name in names if module.split(".")[0] == "expertmesh"]
    assert ours
    for module, name in ours:
        assert hasattr(importlib.import_module(module), name) or importlib.import_module(f"{module}.{name}")


def test_example_configuration() -> None:
    overrides = {"port": 0, "name": "example", "transport": "local"}
    with Cluster.from_config(ROOT / "examples" / "mesh.yaml", **overrides) as cluster, Client(name="example") as client:
        x = np.array([1.0, 2.0, 3.0])
        np.testing.assert_allclose(client.forward("waves", x), 0.5 * (np.sin(x) + np.cos(x) + np.tan(x)))
        reply = client.call("classes", np.ones((2, 16), dtype=np.float32))
        assert reply.output.shape == (2, 3)
        assert len(reply.versions) == 3  # two experts and the gate
        assert cluster.endpoint
