"""The state of an optimizer comes back exactly, on the device where its parameters are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from expertmesh.experts.training.optimizer_state import restore, state_of

OPTIMIZERS: list[tuple[str, dict[str, Any]]] = [
    ("AdamW", {"amsgrad": True}),
    ("AdamW", {"capturable": True}),
    ("SGD", {"momentum": 0.9}),
    ("NAdam", {}),
    ("ASGD", {}),
    ("Adagrad", {}),
]


@pytest.mark.parametrize(("name", "options"), OPTIMIZERS)
def test_the_state_is_where_torch_would_put_it(name: str, options: dict[str, Any]) -> None:
    parameter = nn.Parameter(torch.ones(3))
    kind: Any = getattr(torch.optim, name)
    optimizer = kind([parameter], lr=0.1, **options | {"capturable": False} if "capturable" in options else options)
    parameter.grad = torch.arange(3.0)
    optimizer.step()
    saved, document = state_of(optimizer)
    document["groups"][0].update(options)
    for device in ("cpu", "meta"):  # a device other than that of the file, as a GPU is
        elsewhere = nn.Parameter(torch.ones(3, device=device))
        ours, torchs = kind([elsewhere], lr=0.1, **options), kind([elsewhere], lr=0.1, **options)
        restore(ours, saved, document)
        torchs.load_state_dict(optimizer.state_dict() | {"param_groups": document["groups"]})
        found, wanted = ours.state[elsewhere], torchs.state[elsewhere]
        assert {key: value.device for key, value in found.items() if isinstance(value, Tensor)} == {
            key: value.device for key, value in wanted.items() if isinstance(value, Tensor)
        }
        if device == "cpu":
            assert all(torch.equal(found[key], value) for key, value in optimizer.state[parameter].items())
