"""The load that each gate gives to its experts on the same skewed input: prints a table and draws docs/gates_load.png.

    pip install 'expertmesh[cluster]' matplotlib
    python examples/gate_load.py [file.png]

The rows come in clusters of very unequal size, and rows of one cluster look alike, so gates that only look for the
best match overload a few experts. No gate is trained; all linear ones share one random weight.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from torch import Tensor

from expertmesh.router import gates
from expertmesh.router.gates import Routing
from expertmesh.router.mixture import balance
from expertmesh.router.mixture.capacity import Capacity

ROWS, WIDTH, EXPERTS, CLUSTERS, K = 4096, 64, 16, 12, 2
SHAPE = {"in_features": WIDTH, "num_experts": EXPERTS}


def skewed_rows() -> Tensor:
    """Rows around cluster centres; cluster number c has a share in proportion to 1 / (c + 1)."""
    shares = 1.0 / torch.arange(1, CLUSTERS + 1)
    clusters = torch.multinomial(shares, ROWS, replacement=True)
    return torch.randn(CLUSTERS, WIDTH)[clusters] + 0.6 * torch.randn(ROWS, WIDTH)


def balanced(gate: gates.Gate, x: Tensor) -> gates.Gate:
    """The gate after 300 steps of balance by bias on the same rows (DeepSeek-V3)."""
    scores_TE = gate.scores(x)
    for _ in range(300):
        load_E = balance.load(gate.select(scores_TE), EXPERTS)
        bias = gate.get_buffer("expert_bias")
        bias.copy_(balance.balanced_bias(bias, load_E, rate=0.01))
    return gate


def routings(x: Tensor) -> dict[str, Routing]:
    """{title: routing} of every gate on the rows `x`."""
    weight = torch.randn(EXPERTS, WIDTH) / WIDTH**0.5

    def with_weight(name: str, **arguments: object) -> gates.Gate:
        gate = gates.build(name, **SHAPE, **arguments).eval()
        gate.get_parameter("weight").copy_(weight)
        return gate

    sigmoid: Callable[..., gates.Gate] = lambda: with_weight("sigmoid", k=K)  # noqa: E731
    top_2 = with_weight("top_k", k=K)(x)
    return {
        "top_k, k=2": top_2,
        "top_k, k=2, capacity 1.25": Capacity(factor=1.25).apply(top_2, EXPERTS),
        "switch (k=1)": with_weight("switch")(x),
        "noisy_top_k, k=2, training": with_weight("noisy_top_k", k=K).train()(x),
        "sigmoid, k=2": sigmoid()(x),
        "sigmoid, k=2, balanced bias": balanced(sigmoid(), x)(x),
        "sigmoid, k=2, 2 of 4 groups": with_weight("sigmoid", k=K, groups=4, top_groups=2)(x),
        "threshold 0.7": with_weight("threshold", threshold=0.7)(x),
        "top_p 0.4": with_weight("top_p", p=0.4)(x),
        "cosine, k=2": gates.build("cosine", **SHAPE, k=K)(x),
        "expert_choice, factor 2": with_weight("expert_choice", capacity_factor=2.0)(x),
        "hash, k=2": gates.Hash(EXPERTS, k=K)(x),
    }


def main(file: str) -> None:
    torch.manual_seed(3)
    with torch.no_grad():
        found = routings(skewed_rows())
    figure, axes = plt.subplots(3, 4, figsize=(13, 7.5), sharex=True)
    print(f"{'gate':30s} {'pairs':>7s} {'largest / mean load':>20s} {'rows without expert':>20s}")
    for axis, (title, routing) in zip(axes.flat, found.items(), strict=True):
        load_E = balance.load(routing, EXPERTS)
        share_E = load_E / load_E.sum()
        peak = float(share_E.max() * EXPERTS)
        alone = int(routing.unrouted_T.sum())
        print(f"{title:30s} {int(load_E.sum()):7d} {peak:20.2f} {alone:20d}")
        axis.bar(range(EXPERTS), share_E * EXPERTS, color="#3b6ea5")
        axis.axhline(1.0, color="#c44e52", linewidth=1)
        axis.set_title(f"{title}\nlargest {peak:.1f}x the mean", fontsize=9)
        axis.set_ylim(0, 4.5)
    figure.supxlabel("expert")
    figure.supylabel("load, in multiples of the mean")
    figure.tight_layout()
    figure.savefig(file, dpi=110)
    print(f"wrote {file}")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "docs/gates_load.png")
