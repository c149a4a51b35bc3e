"""The interactions of the example recommendation: what is read, what is refused, what is held out, what is measured."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from expertmesh.cluster.applications.cost import parameters
from expertmesh.examples.data.interactions import Interactions, interactions, read_csv
from expertmesh.examples.recommendation import (
    DRAWS,
    SMALL,
    Recommender,
    TwoGates,
    auc,
    cost_of,
    for_gates,
    model_of,
    split,
)
from expertmesh.experts.errors import ConfigError

ROWS = [f"u{n % 20},i{n // 20 % 20},{n % 5 + 1}" for n in range(400)]


def written(tmp_path: Path, *lines: str, encoding: str = "utf-8") -> Path:
    path = tmp_path / "ratings.csv"
    path.write_bytes("\n".join(lines).encode(encoding))
    return path


def some() -> Interactions:
    return interactions({(f"u{n % 40}", f"i{n // 40}"): float(n % 3) for n in range(800) if n % 7}, "some")


@pytest.mark.parametrize(
    ("lines", "told"),
    [
        ([""], ": it has 0 bytes"),
        (["user,item", "u,i"], ":1: there must be one column 'rating'; the columns are user, item"),
        (["user,item,rating", *ROWS[:2], "u,i,nan"], ":4: rating is 'nan', not a finite number"),
        (["user,item,rating", "u,i,good"], ":2: rating is 'good', not a finite number"),
        (["user,item,rating", "u,i"], ":2: 2 fields, but the header has 3"),
        (["user,item,rating", ",i,1"], ":2: user or item is missing"),
        (["user,item,rating", "u," + "i" * 100_000 + ",1"], ":2: it cannot be read as CSV"),
        (["user,item,rating", "u,i,1"], ": 0 interactions are left"),
        (["user,item,rating", *(row[:-1] + "3" for row in ROWS)], ": every rating is 3"),
    ],
)
def test_s11_interactions_that_cannot_be_used_are_told_in_one_line(tmp_path: Path, lines: list[str], told: str) -> None:
    path = written(tmp_path, *lines)
    with pytest.raises(ConfigError) as caught:
        read_csv(path)
    assert f"{path}{told}" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_s11_another_encoding_is_told_with_its_row(tmp_path: Path) -> None:
    path = written(tmp_path, "user,item,rating", "u,i,1", "ü,i,1", encoding="latin-1")
    with pytest.raises(ConfigError, match=r":3: the text is not UTF-8"):
        read_csv(path)


def test_s11_a_csv_is_read_in_any_order_of_columns_and_the_last_rating_counts(tmp_path: Path) -> None:
    shuffled = [",".join(["x", *reversed(row.split(","))]) for row in ROWS]
    found = read_csv(written(tmp_path, "more,rating,item,user", *shuffled, "x,5,i0,u0"))
    assert (len(found.users), len(found.items), len(found.users_N)) == (20, 20, 400)
    pair = (found.users_N == found.users.index("u0")) & (found.items_N == found.items.index("i0"))
    assert found.high_N[pair].tolist() == [1.0]


def test_s11_users_and_items_with_few_interactions_are_left_out() -> None:
    ratings = {(f"u{n % 20}", f"i{n // 20}"): float(n % 5) for n in range(400)} | {("rare", "i0"): 1.0}
    assert "rare" not in interactions(ratings, "some").users


def test_s11_held_out_pairs_are_not_trained_on_and_drawn_ones_did_not_happen() -> None:
    data = some()
    parts = split(data, 0)
    happened = set(zip(data.users_N.tolist(), data.items_N.tolist(), strict=True))
    taken = [{(user, item) for user, item in part.taken_N2.tolist()} for part in parts]
    assert set.union(*taken) == happened
    assert sum(len(own) for own in taken) == len(happened)
    for number, part in enumerate(parts):
        users, count = part.taken_N2[:, :1].expand_as(part.others_NM), part.others_NM.shape[1]
        drawn = set(zip(users.flatten().tolist(), part.others_NM.flatten().tolist(), strict=True))
        assert not drawn & set.union(*taken[: number + 1])
        assert count == (1 if number == 2 else DRAWS)
        assert drawn & happened if number == 0 else True  # what is held out may be drawn: it tells nothing


def test_s11_auc_counts_pairs_in_order() -> None:
    assert auc(torch.tensor([3.0, 1.0]), torch.tensor([2.0, 0.0])) == pytest.approx(0.75)
    assert auc(torch.tensor([1.0]), torch.tensor([1.0])) == pytest.approx(0.5)
    assert auc(torch.tensor([]), torch.tensor([1.0])) == 0.5


def test_s11_each_task_has_a_gate_of_its_own() -> None:
    data, x = some(), torch.randn(6, 48)
    model = model_of(data, SMALL, "sparse", 0)
    assert isinstance(model, Recommender)
    layer = model.network
    assert isinstance(layer, TwoGates)
    before = layer.gate.scores(for_gates(x)).detach()
    with torch.no_grad():
        layer.gate.weight[:, :48] += 1.0
    after = layer.gate.scores(for_gates(x)).detach()
    assert not torch.allclose(before[:6], after[:6])
    torch.testing.assert_close(before[6:], after[6:])


def test_s11_models_have_as_many_parameters_as_the_sparse_one() -> None:
    data = some()
    sparse, active, total, factors = (
        model_of(data, SMALL, kind, 0) for kind in ("sparse", "active", "total", "factors")
    )
    cost = cost_of(sparse, SMALL, split(data, 0)[2])
    assert abs(cost["active"] / parameters(active) - 1) < 0.02
    assert abs(cost["parameters"] / parameters(total) - 1) < 0.02
    assert abs(cost["parameters"] / parameters(factors) - 1) < 0.02
