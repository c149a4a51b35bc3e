"""The targets of a load: mesh.yaml read as data, and rows that fit each layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from expertmesh.cluster.bench.target import MeshFile, Target, read_mesh, targets
from expertmesh.cluster.client.arrays import to_wire
from expertmesh.experts.errors import ConfigError, InvalidRequest, NotFound
from expertmesh.experts.spec import TensorSpec
from expertmesh.experts.wire import ITEM_SIZES


def file(folder: Path, text: str) -> Path:
    path = folder / "mesh.yaml"
    path.write_text(text)
    path.chmod(0o600)
    return path


def status(**inputs: Any) -> dict[str, Any]:
    return {"name": "c", "layers": {name: {"input": spec, "experts": {}} for name, spec in inputs.items()}}


@pytest.fixture(autouse=True)
def _no_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("EXPERTMESH_NAME", raising=False)


def test_a_file_is_read_without_importing_its_code(tmp_path: Path) -> None:
    mesh = read_mesh(
        file(
            tmp_path,
            "name: c\nlayers:\n"
            '  a: {gate: {}, input: {shape: [16], dtype: bfloat16}, experts: {e: {factory: "nosuch.code:Here"}}}\n'
            "  b: {experts: {e: {}, f: {input: {shape: [3, 4]}}, g: {input: {dtype: int64}}}}\n"
            "  c: {experts: {e: {input: {shape: wrong}}}}\n"
            "  d: 5\n",
        )
    )
    assert mesh.name == "c"
    assert mesh.layers == {
        "a": TensorSpec((16,), "bfloat16"),
        "b": TensorSpec((3, 4), "int64"),
        "c": TensorSpec(),
        "d": TensorSpec(),
    }


def test_the_name_of_a_file_without_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = file(tmp_path, "layers: {a: {}}")
    assert read_mesh(path).name == "default"
    monkeypatch.setenv("EXPERTMESH_NAME", "other")
    assert read_mesh(path).name == "other"


@pytest.mark.parametrize("text", ["port: 5", "layers: {}", "layers: [a]", "layers: {a: 1, a: 2}", "layers: {", "[]"])
def test_an_invalid_file_is_an_error(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError, match=r"mesh\.yaml:1"):
        read_mesh(file(tmp_path, text))


def test_the_default_layers_and_their_order() -> None:
    width = {"shape": [4], "dtype": None}
    serving = status(a=width, b=width, c=width)
    file = MeshFile(layers={"c": TensorSpec(), "a": TensorSpec()})
    assert [aim.layer for aim in targets((), serving, None)] == ["a", "b", "c"]
    assert [aim.layer for aim in targets((), serving, file)] == ["c", "a"]
    assert [aim.layer for aim in targets(("b", "a", "b"), serving, file)] == ["b", "a"]


def test_an_unknown_layer_and_the_closest_name() -> None:
    serving = status(news={"shape": [4]}, waves={"shape": [4]})
    with pytest.raises(NotFound, match=r"serves no layer 'new' \(did you mean 'news'\?\)"):
        targets(("new",), serving, None)
    with pytest.raises(NotFound, match="serves no layer 'quite'; it serves news, waves"):
        targets(("quite",), serving, None)
    with pytest.raises(NotFound, match="serves no layer now"):
        targets((), {"name": "c", "layers": {}}, None)


def test_where_shape_and_dtype_come_from() -> None:
    serving = status(a={"shape": [4], "dtype": "float64"}, b={"shape": None, "dtype": None}, c=None)
    file = MeshFile(layers={"a": TensorSpec((9,), "int8"), "b": TensorSpec((2, 3)), "c": TensorSpec(None, "float16")})
    aims = targets((), serving, file, width=7)
    assert [(aim.shape, aim.dtype) for aim in aims] == [((4,), "float64"), ((2, 3), "float32"), ((7,), "float16")]
    assert {aim.dtype for aim in targets((), serving, file, width=7, dtype="bfloat16")} == {"bfloat16"}
    with pytest.raises(InvalidRequest, match="layer c have no declared shape: give --width"):
        targets((), serving, file)


@pytest.mark.parametrize("dtype", ITEM_SIZES)
def test_rows_are_of_their_dtype_and_follow_from_the_seed(dtype: str) -> None:
    target = Target(layer="a", shape=(5, 2), dtype=dtype)
    batches = target.batches(3, seed=1)
    for x in batches:
        sent, _ = to_wire(x, name="x", raw=dtype == "bfloat16")
        assert (sent.dtype, sent.shape) == (dtype, (3, 5, 2))
    assert all(map(np.array_equal, batches, target.batches(3, seed=1)))
    assert not all(map(np.array_equal, batches, target.batches(3, seed=2)))
    assert not np.array_equal(batches[0], batches[1])


def test_bfloat16_rows_are_finite() -> None:
    bits = Target(layer="a", shape=(64,), dtype="bfloat16").batches(8, seed=0)[0]
    values = (bits.astype(np.uint32) << 16).view(np.float32)
    assert np.isfinite(values).all()
    assert values.std() == pytest.approx(1.0, abs=0.2)
