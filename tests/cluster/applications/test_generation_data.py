"""The text of the example generation, and its model: what is held out, what is refused, and what a place may see."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from expertmesh.cluster.applications.cost import parameters
from expertmesh.examples.data.prose import documentation, read_text
from expertmesh.examples.generation import (
    BITS,
    PARTS,
    SMALL,
    Size,
    Transformer,
    cost_of,
    cut,
    model_of,
    put,
    quality,
    rotated,
    sample,
    windows,
)
from expertmesh.experts.errors import ConfigError

LINES = b"".join(b"line %d\n" % number for number in range(2000))


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", ": it has 0 bytes: at least 100 are needed"),
        (b"short", ": it has 5 bytes: at least 100 are needed"),
        (b"one\ntwo\nthr\xe9e\n" + LINES, ":3: the text is not UTF-8"),
        ("übel".encode("utf-16"), ":1: the text is not UTF-8"),
        (b"one\nt\0wo\n" + LINES, ":2: it has a NUL character"),
        (b"a" * 5000, ":1: it is one character over and over"),
    ],
)
def test_s10_a_text_that_cannot_be_used_is_told_in_one_line(tmp_path: Path, content: bytes, told: str) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        read_text(path, 100)
    assert str(path) + told in str(caught.value)
    assert "\n" not in str(caught.value)


def test_s10_a_folder_is_no_text(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        read_text(tmp_path, 100)


def test_s10_a_text_is_read_without_its_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(b"\xef\xbb\xbf" + LINES)
    assert read_text(path, 100) == LINES


def test_s10_the_documentation_of_python_says_nothing_twice() -> None:
    text = documentation()
    assert len(text) > 500_000
    assert b"\n\n\n\n\n" not in text


def test_s10_each_part_of_a_text_is_trained_on_then_new_then_held_out() -> None:
    size = Size(context=9, held=10_000)
    text = torch.arange(PARTS * 1000) // 1000  # each byte is the number of its part
    found = cut(bytes(text.tolist()), size)
    assert (len(found.train), len(found.new), found.held_NS.numel()) == (800 * PARTS, 100 * PARTS, 100 * PARTS)
    assert found.held_NS.flatten().tolist() == [part for part in range(PARTS) for _ in range(100)]
    ramp = cut(bytes(number % 251 for number in range(PARTS * 1000)), size)
    places = torch.arange(PARTS * 1000).view(PARTS, 1000) % 251
    assert ramp.train.tolist() == places[:, :800].flatten().tolist()
    assert ramp.new.tolist() == places[:, 800:900].flatten().tolist()
    assert ramp.held_NS.flatten().tolist() == places[:, 900:].flatten().tolist()


def test_s10_held_out_windows_are_spread_over_the_text() -> None:
    text = bytes(number * 256 // 200_000 for number in range(200_000))
    held_NS = cut(text, Size(context=9, held=16)).held_NS
    assert held_NS.shape == (16, 10)
    assert held_NS[0, 0] < 16
    assert held_NS[-1, -1] > 240


def test_s10_windows_follow_from_their_seed() -> None:
    text = torch.arange(200, dtype=torch.uint8)
    first, again, other = (windows(text, SMALL, seed) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(first.diff(dim=1), torch.ones_like(first[:, 1:]))


def test_s10_dense_models_have_as_many_parameters_as_the_sparse_one() -> None:
    size = Size()
    text = cut(LINES * 20, size)
    sparse, active, total = (model_of(size, kind, 0) for kind in ("sparse", "active", "total"))
    cost = cost_of(sparse, size, text)
    assert abs(cost["active"] / parameters(active) - 1) < 0.005
    assert abs(cost["parameters"] / parameters(total) - 1) < 0.005
    assert cost["active"] < 0.6 * cost["parameters"]
    assert cost["flops"] < 0.6 * cost_of(total, size, text)["flops"]


def test_s10_a_place_sees_no_later_byte() -> None:
    model = model_of(SMALL, "sparse", 0)
    bytes_BS = torch.randint(256, (1, SMALL.context))
    changed = bytes_BS.clone()
    changed[0, 20:] = 255 - changed[0, 20:]
    with torch.no_grad():
        before, after = model(bytes_BS), model(changed)
    torch.testing.assert_close(before[:, :20], after[:, :20])
    assert not torch.allclose(before[:, 20], after[:, 20])


def test_s10_rotated_places_know_only_their_distance() -> None:
    query, key = torch.randn(8), torch.randn(8)
    products = rotated(query.expand(16, 8)) @ rotated(key.expand(16, 8)).T
    torch.testing.assert_close(products[3, 1], products[13, 11])
    assert not torch.isclose(products[3, 1], products[3, 2])


def test_s10_a_model_that_knows_nothing_needs_eight_bits_for_a_byte() -> None:
    text = cut(LINES, SMALL)
    model = model_of(SMALL, "active", 0)
    model.norm.weight.data.zero_()
    assert quality(model, text)[BITS] == pytest.approx(8.0, abs=1e-4)


def test_s10_a_sparse_layer_tells_its_balance_and_learns_by_it() -> None:
    model: Transformer = model_of(SMALL, "sparse", 0)
    layer = model.blocks[0].feed_forward
    model(torch.randint(256, (2, SMALL.context)))
    torch.autograd.backward(layer.balance_loss)
    assert float(layer.balance_loss.detach()) >= 0.9
    assert bool(layer.gate.weight.grad.any())
    put(model, [torch.nn.Identity()] * SMALL.blocks)
    assert F.cross_entropy(model(torch.zeros(1, 4, dtype=torch.long)).flatten(0, 1), torch.zeros(4).long()) > 0


def test_s10_a_sample_begins_with_its_prompt_and_can_be_printed() -> None:
    text = sample(model_of(SMALL, "active", 0), torch.tensor(list(b"begin")), SMALL, 0)
    assert text.startswith("begin")
    assert all(character.isprintable() or character == "\n" for character in text)
