"""A machine with only the base install calls a running cluster: no ray, no torch, not even installed."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import expertmesh
from expertmesh import Cluster, Expert, Layer, gates

SOURCE = Path(expertmesh.__file__).parents[1]
SCRIPT = """
    import sys
    import numpy as np
    from expertmesh import Client
    with Client(sys.argv[1]) as client:
        x = np.array([1.0, 2.0, 3.0], dtype=np.float32)
        reply = client.call("s1", x)
        np.testing.assert_allclose(reply.output, 0.5 * (np.sin(x) + np.cos(x)), rtol=1e-5)
        print(sorted(reply.versions))
    try:
        from expertmesh import Cluster
    except ImportError as error:
        print(error)
    for name in ("torch", "ray", "yaml", "click", "safetensors"):
        try:
            __import__(name)
        except ImportError:
            continue
        sys.exit(f"{name} is installed, so this proves nothing")
"""


@pytest.fixture(scope="module")
def base_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of a fresh environment that holds what `pip install expertmesh` brings, and this source."""
    folder = tmp_path_factory.mktemp("base")
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    python = folder / "bin" / "python"
    root = SOURCE.parent
    base = ["numpy", "grpcio", "msgpack"]
    command = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*command, "--constraint", str(root / "constraints.txt"), *base], check=True)
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "expertmesh.pth").write_text(str(SOURCE))
    return python


def test_base_install_calls_a_running_cluster(base_python: Path) -> None:
    layer = Layer("s1", gates.Fixed([0.5, 0.5]), {"sin": Expert("numpy:sin"), "cos": Expert("numpy:cos")})
    with Cluster.start([layer], name="base", port=0, transport="local") as cluster:
        done = subprocess.run(
            [str(base_python), "-c", textwrap.dedent(SCRIPT), cluster.endpoint],
            capture_output=True,
            text=True,
            env={key: value for key, value in os.environ.items() if key != "PYTHONPATH"},
        )
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert first == "['s1/cos', 's1/gate', 's1/sin']"
    assert "pip install 'expertmesh[cluster]'" in second
