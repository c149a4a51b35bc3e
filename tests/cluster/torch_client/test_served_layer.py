"""A served layer stands in a model of torch where the layer stood that was trained in this process."""

from __future__ import annotations

from pathlib import Path

import torch
from helpers.trained import OUT, WIDTH, layer_of, module, rows, trained_cluster

from expertmesh import gates
from expertmesh.cluster.torch_client.served_layer import ServedLayer
from expertmesh.router.mixture.local import LocalLayer


def test_it_answers_as_the_layer_in_this_process(tmp_path: Path) -> None:
    torch.manual_seed(1)
    gate = gates.TopK(WIDTH, 3, k=2, bias=True)
    torch.nn.init.normal_(gate.weight)
    local = LocalLayer(gate, [module(number) for number in range(3)])
    with trained_cluster(tmp_path, layer_of(tmp_path, gate)) as running:
        served = ServedLayer(running.client, "l", most=5)
        x = rows(1, 12).reshape(3, 4, WIDTH)
        with torch.no_grad():
            y = served(x)
            assert y.shape == (3, 4, OUT)
            assert torch.allclose(y, local(x.reshape(-1, WIDTH)).reshape(y.shape), atol=1e-6)
        assert served.reply is not None
        assert "l/gate" in served.reply.versions
        alone = ServedLayer(running.client, "l", allow=["e1"], top_k=1)(x[0])
        assert torch.allclose(alone, module(1)(x[0]), atol=1e-6)
