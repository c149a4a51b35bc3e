"""Weights files: what is written comes back, and what does not fit is refused with its first three problems."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from expertmesh.experts.errors import DataLoss, NotFound, SpecMismatch
from expertmesh.experts.weights.files import (
    check_fit,
    describe_tensors,
    load_into,
    load_tensors,
    save_module,
    save_tensors,
    tensor_digest,
    tensor_digests,
    tensors_of,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.bool]


@given(
    shapes=st.dictionaries(st.text("ab.", min_size=1, max_size=4), st.lists(st.integers(0, 3), max_size=3), max_size=4),
    dtype=st.sampled_from(DTYPES),
)
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_what_is_written_comes_back(shapes: dict[str, list[int]], dtype: torch.dtype, tmp_path: Path) -> None:
    tensors = {name: torch.randint(0, 2, shape).to(dtype) for name, shape in shapes.items()}
    save_tensors(tmp_path / "t.safetensors", tensors, {"kind": "test"})
    back, metadata = load_tensors(tmp_path / "t.safetensors")
    assert tensor_digest(back) == tensor_digest(tensors)
    assert metadata == {"kind": "test"}
    described = describe_tensors(tmp_path / "t.safetensors")
    assert {name: shape for name, (shape, _) in described.items()} == {n: tuple(s) for n, s in shapes.items()}
    assert [path.name for path in tmp_path.iterdir()] == ["t.safetensors"]


def test_tied_and_strided_tensors_are_written_whole(tmp_path: Path) -> None:
    shared = torch.arange(6.0).reshape(2, 3)
    save_tensors(tmp_path / "t.safetensors", {"a": shared, "b": shared, "c": shared.t()})
    back, _ = load_tensors(tmp_path / "t.safetensors")
    assert torch.equal(back["a"], back["b"])
    assert torch.equal(back["c"], shared.t())


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "t.safetensors"
    save_tensors(path, {"a": torch.ones(1)})

    def full(descriptor: int) -> None:
        raise OSError(28, "no space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="no space"):
        save_tensors(path, {"a": torch.zeros(1)})
    assert load_tensors(path)[0]["a"].item() == 1.0
    assert [found.name for found in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("damage", ["truncated", "empty", "text", "a folder", "a header of 2**60 bytes"])
def test_what_is_no_weights_file(damage: str, tmp_path: Path) -> None:
    path = tmp_path / "secret-folder" / "t.safetensors"
    path.parent.mkdir()
    save_tensors(path, {"a": torch.ones(100)})
    whole = path.read_bytes()
    path.unlink()
    if damage == "a folder":
        path.mkdir()
    else:
        bomb = (2**60).to_bytes(8, "little") + whole[8:]
        path.write_bytes({"truncated": whole[:-7], "empty": b"", "text": b"hello world, hello"}.get(damage, bomb))
    for read in (load_tensors, describe_tensors):
        with pytest.raises(NotFound if damage == "a folder" else DataLoss) as caught:
            read(path)
        assert "'t.safetensors'" in caught.value.message
        assert "secret-folder" not in caught.value.message


def test_a_missing_file_is_named_without_its_folder(tmp_path: Path) -> None:
    with pytest.raises(NotFound) as caught:
        load_tensors(tmp_path / "no.safetensors")
    assert caught.value.message == "there is no weights file 'no.safetensors'"
    with pytest.raises(NotFound, match=r"^weights '.*' is a folder: name the safetensors file in it"):
        load_tensors(tmp_path)


def test_a_module_takes_exactly_its_tensors(tmp_path: Path) -> None:
    one, other = nn.Linear(3, 2), nn.Linear(3, 2)
    save_module(tmp_path / "w.safetensors", one)
    load_into(other, load_tensors(tmp_path / "w.safetensors")[0], "weights")
    assert tensor_digest(other.state_dict()) == tensor_digest(one.state_dict())


def test_the_first_three_problems_are_named_and_nothing_is_changed() -> None:
    module = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2), nn.Linear(2, 1))
    before = tensor_digest(module.state_dict())
    tensors = {name: value.clone() for name, value in module.state_dict().items()}
    del tensors["2.bias"]
    tensors["1.weight"] = torch.zeros(3, 3)
    tensors["0.bias"] = tensors["0.bias"].double()
    tensors["3.bias"] = torch.zeros(1)
    with pytest.raises(SpecMismatch) as caught:
        load_into(module, tensors, "weights 'w'")
    assert caught.value.message == (
        "weights 'w' does not fit the expert: '0.bias' is [2] torch.float64, but the expert has [2] torch.float32; "
        "'1.weight' is [3, 3] torch.float32, but the expert has [2, 2] torch.float32; missing '2.bias' (and 1 more)"
    )
    assert tensor_digest(module.state_dict()) == before


descriptions = st.dictionaries(
    st.sampled_from("abcde"), st.tuples(st.sampled_from([(2,), (3,)]), st.sampled_from(DTYPES[:2])), max_size=5
)


@given(descriptions, descriptions)
def test_only_equal_descriptions_fit_and_at_most_three_problems_are_said(
    given: dict[str, tuple[tuple[int, ...], torch.dtype]], wanted: dict[str, tuple[tuple[int, ...], torch.dtype]]
) -> None:
    wrong = {name for name in given.keys() | wanted.keys() if given.get(name) != wanted.get(name)}
    try:
        check_fit(given, wanted, "weights")
    except SpecMismatch as error:
        problems, _, more = error.message.partition(" (and ")
        assert len(problems.split("; ")) == min(3, len(wrong))
        assert more == ("" if len(wrong) <= 3 else f"{len(wrong) - 3} more)")
        assert wrong
    else:
        assert not wrong


def test_the_digest_sees_names_shapes_dtypes_and_bits() -> None:
    base = torch.tensor([1.0, 2.0])
    variants = [{"a": base}, {"b": base}, {"a": base[None]}, {"a": base.half()}, {"a": -base}, {"a": base, "b": base}]
    (inner,) = tensor_digests({"a": base}).values()
    variants.append({f"a float32 (2,) {inner}\nb": base, "c": base})  # a name that looks like what is hashed
    variants.append({f'a" float32 (2,) {inner}\n"b': base})
    assert len({tensor_digest(variant) for variant in variants}) == len(variants)
    assert tensor_digest({"a": base, "b": -base}) == tensor_digest({"b": -base, "a": base})


def test_what_is_no_tensor_in_a_state_is_left_out() -> None:
    class Stateful(nn.Linear):
        def get_extra_state(self) -> dict[str, int]:
            return {"step": 1}

        def set_extra_state(self, state: object) -> None: ...

    assert set(tensors_of(Stateful(1, 1))) == {"weight", "bias"}
