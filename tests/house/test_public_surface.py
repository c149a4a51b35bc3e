"""The public surface is a list; and calling a cluster needs neither ray nor torch."""

from __future__ import annotations

import subprocess
import sys

import pytest

import expertmesh
from expertmesh.experts import errors
from expertmesh.experts.optional_imports import load

ERRORS = [
    "Aborted", "ConfigError", "DataLoss", "DeadlineExceeded", "ExpertFailed", "ExpertMeshError", "FailedPrecondition",
    "Fenced", "InvalidRequest", "MissingExtra", "NotFound", "Overloaded", "PermissionDenied", "SpecMismatch",
    "RouterUnavailable", "TooLarge",
    "Unauthenticated", "Unavailable", "VersionGone",
]  # fmt: skip
CLIENT = ["AsyncClient", "Client", "Lease", "Reply", "SwapOutcome"]
ATTACH = ["AttachedRouter", "RemoteMoE", "attach"]
CLUSTER = ["Autoscale", "Cluster", "ClusterConfig", "Expert", "Layer", "TensorSpec", "gates"]
SURFACE = sorted([*ERRORS, *CLIENT, *ATTACH, *CLUSTER, "__version__", "errors"])


def imported(code: str, *libraries: str) -> list[str]:
    """Which of the libraries a fresh process has loaded after running some code."""
    check = f"import sys; print(*({set(libraries)!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", f"{code}\n{check}"], capture_output=True, text=True, check=True)
    return sorted(done.stdout.split())


def without(*libraries: str) -> str:
    """Code that makes libraries seem not to be installed."""
    return f"import sys; sys.modules.update(dict.fromkeys({list(libraries)!r}))"


def test_the_surface_is_this_list() -> None:
    assert sorted(expertmesh.__all__) == SURFACE
    assert dir(expertmesh) == SURFACE


@pytest.mark.parametrize("name", SURFACE)
def test_every_name_is_there(name: str) -> None:
    assert getattr(expertmesh, name) is not None


def test_every_error_is_public() -> None:
    assert set(errors.BY_NAME) == set(ERRORS)
    assert all(getattr(expertmesh, name) is errors.BY_NAME[name] for name in ERRORS)


def test_a_name_that_is_not_there_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="nosuch"):
        _ = expertmesh.nosuch  # type: ignore[attr-defined]


def test_a_client_needs_neither_ray_nor_torch() -> None:
    heavy = (
        "ray",
        "torch",
        "click",
        "rich",
        "yaml",
        "pydantic",
        "safetensors",
        "sklearn",
        "prometheus_client",
        "transformers",
    )
    code = "import expertmesh; from expertmesh import AsyncClient, Client, Lease, Reply, SwapOutcome, errors"
    assert imported(code, *heavy) == []
    assert imported("import expertmesh", "grpc", "numpy", "msgpack") == []


def test_a_load_is_aimed_by_a_configuration_without_ray_torch_or_pydantic() -> None:
    assert imported("import expertmesh.cluster.bench.target", "ray", "torch", "pydantic") == []


def test_declaring_an_expert_needs_neither_ray_nor_torch() -> None:
    assert imported('from expertmesh import Expert, TensorSpec; Expert("torch:sin")', "ray", "torch") == []


@pytest.mark.parametrize("name", ["Layer", "gates", "Cluster", "ClusterConfig", "attach"])
def test_a_name_whose_extra_is_missing_says_which_install_mends_it(name: str) -> None:
    code = f"{without('torch', 'ray')}; import expertmesh; expertmesh.{name}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert f"MissingExtra: expertmesh.{name} needs " in done.stderr
    assert "pip install 'expertmesh[cluster]'" in done.stderr


def test_the_command_without_its_extra_is_one_line() -> None:
    code = f"{without('click')}; from expertmesh.entry import main; main()"
    done = subprocess.run([sys.executable, "-c", code, "status"], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("error: the expertmesh command needs click, ")
    assert "pip install 'expertmesh[cluster]'" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_module_of_ours_that_is_missing_is_no_missing_extra() -> None:
    with pytest.raises(ModuleNotFoundError) as caught:
        load("expertmesh.nosuch", "it")
    assert not isinstance(caught.value, errors.MissingExtra)
