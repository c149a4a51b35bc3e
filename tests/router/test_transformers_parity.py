"""Gates and whole layers against reference models: tiny random models built from transformers configs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from expertmesh.experts.modules import GatedFeedForward, PackedExperts, SigmoidScaled
from expertmesh.router.gates import Gate, Sigmoid, TopK
from expertmesh.router.mixture.local import LocalLayer

pytest.importorskip("transformers", reason="parity is tested against transformers: pip install 'expertmesh[dev]'")

from transformers.models.deepseek_v3.configuration_deepseek_v3 import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE
from transformers.models.gpt_oss.configuration_gpt_oss import GptOssConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssMLP
from transformers.models.mixtral.configuration_mixtral import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
from transformers.models.olmoe.configuration_olmoe import OlmoeConfig
from transformers.models.olmoe.modeling_olmoe import OlmoeSparseMoeBlock
from transformers.models.qwen2_moe.configuration_qwen2_moe import Qwen2MoeConfig
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock
from transformers.models.qwen3_moe.configuration_qwen3_moe import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

WIDTH, HIDDEN, SHARED, EXPERTS, CHOICES = 32, 48, 40, 8, 3
TOLERANCE = 1e-5
Pair = tuple[nn.Module, LocalLayer]


def _random(block: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for tensor in [*block.parameters(), *block.buffers()]:
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.2)
    return block.eval()


def _gate(gate: Gate, router: nn.Module) -> Gate:
    state = {"expert_bias" if key == "e_score_correction_bias" else key: v for key, v in router.state_dict().items()}
    gate.load_state_dict(state)
    return gate.eval()


def _packed(block: Any, **options: Any) -> PackedExperts:
    packed = PackedExperts(EXPERTS, WIDTH, HIDDEN, **options)
    packed.load_state_dict(block.experts.state_dict())
    return packed


def _shared(module: nn.Module) -> GatedFeedForward:
    shared = GatedFeedForward(WIDTH, SHARED)
    shared.load_state_dict(module.state_dict())
    return shared


def mixtral() -> Pair:
    config = MixtralConfig(
        hidden_size=WIDTH, intermediate_size=HIDDEN, num_local_experts=EXPERTS, num_experts_per_tok=CHOICES
    )
    config._experts_implementation = "eager"
    block: Any = _random(MixtralSparseMoeBlock(config))
    return block, LocalLayer(_gate(TopK(WIDTH, EXPERTS, CHOICES, softmax="before"), block.gate), _packed(block))


def qwen2(normalize: bool) -> Pair:
    config = Qwen2MoeConfig(
        hidden_size=WIDTH, moe_intermediate_size=HIDDEN, shared_expert_intermediate_size=SHARED,
        num_experts=EXPERTS, num_experts_per_tok=CHOICES, norm_topk_prob=normalize,
    )  # fmt: skip
    config._experts_implementation = "eager"
    block: Any = _random(Qwen2MoeSparseMoeBlock(config))
    gate = TopK(WIDTH, EXPERTS, CHOICES, softmax="before", renormalize=normalize)
    shared = SigmoidScaled(_shared(block.shared_expert), WIDTH)
    shared.scale.load_state_dict(block.shared_expert_gate.state_dict())
    return block, LocalLayer(_gate(gate, block.gate), _packed(block), shared=shared)


def qwen3(normalize: bool) -> Pair:
    config = Qwen3MoeConfig(
        hidden_size=WIDTH, moe_intermediate_size=HIDDEN, num_experts=EXPERTS, num_experts_per_tok=CHOICES,
        norm_topk_prob=normalize,
    )  # fmt: skip
    config._experts_implementation = "eager"
    block: Any = _random(Qwen3MoeSparseMoeBlock(config))
    gate = TopK(WIDTH, EXPERTS, CHOICES, softmax="before", renormalize=normalize)
    return block, LocalLayer(_gate(gate, block.gate), _packed(block))


def olmoe(normalize: bool) -> Pair:
    config = OlmoeConfig(
        hidden_size=WIDTH, intermediate_size=HIDDEN, num_experts=EXPERTS, num_experts_per_tok=CHOICES,
        norm_topk_prob=normalize,
    )  # fmt: skip
    config._experts_implementation = "eager"
    block: Any = _random(OlmoeSparseMoeBlock(config))
    gate = TopK(WIDTH, EXPERTS, CHOICES, softmax="before", renormalize=normalize)
    return block, LocalLayer(_gate(gate, block.gate), _packed(block))


def deepseek_v3(groups: int, normalize: bool = True) -> Pair:
    config = DeepseekV3Config(
        hidden_size=WIDTH, moe_intermediate_size=HIDDEN, n_routed_experts=EXPERTS, num_experts_per_tok=CHOICES,
        n_group=groups, topk_group=max(1, groups // 2), n_shared_experts=1, norm_topk_prob=normalize,
        routed_scaling_factor=2.5,
    )  # fmt: skip
    config._experts_implementation = "eager"
    block: Any = _random(DeepseekV3MoE(config))
    gate = Sigmoid(
        WIDTH, EXPERTS, CHOICES, groups=groups, top_groups=max(1, groups // 2), renormalize=normalize, scale=2.5
    )
    shared = GatedFeedForward(WIDTH, HIDDEN)
    shared.load_state_dict(block.shared_experts.state_dict())
    return block, LocalLayer(_gate(gate, block.gate), _packed(block), shared=shared)


def gpt_oss() -> Pair:
    config = GptOssConfig(
        hidden_size=WIDTH, intermediate_size=HIDDEN, num_local_experts=EXPERTS, num_experts_per_tok=CHOICES
    )
    config._experts_implementation = "eager"
    block: Any = _random(GptOssMLP(config))
    options = {"bias": True, "transposed": True, "interleaved": True, "limit": config.swiglu_limit}
    gate = _gate(TopK(WIDTH, EXPERTS, CHOICES, softmax="after", bias=True), block.router)
    return block, LocalLayer(gate, _packed(block, alpha=config.swiglu_alpha, **options))


PAIRS: dict[str, Callable[[], Pair]] = {
    "mixtral": mixtral,
    "qwen2_moe": lambda: qwen2(False),
    "qwen2_moe-normalized": lambda: qwen2(True),
    "qwen3_moe": lambda: qwen3(True),
    "qwen3_moe-plain": lambda: qwen3(False),
    "olmoe": lambda: olmoe(False),
    "olmoe-normalized": lambda: olmoe(True),
    "deepseek_v3": lambda: deepseek_v3(4),
    "deepseek_v3-one-group": lambda: deepseek_v3(1),
    "deepseek_v3-plain": lambda: deepseek_v3(2, normalize=False),
    "gpt_oss": gpt_oss,
}


def _rows(count: int = 65) -> Tensor:
    return torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(11))


@pytest.mark.parametrize("name", PAIRS)
@torch.no_grad()
def test_gate_gives_the_indices_and_weights_of_the_models_router(name: str) -> None:
    block, layer = PAIRS[name]()
    x = _rows()
    router: Any = block.router if name == "gpt_oss" else block.gate
    _, weights, indices = router(x)
    indices, order = indices.sort(dim=1)
    weights = weights.gather(1, order)
    routing = layer.gate(x)
    our_indices, our_order = routing.indices_TK.sort(dim=1)
    assert torch.equal(our_indices, indices)
    torch.testing.assert_close(routing.weights_TK.gather(1, our_order), weights, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("name", PAIRS)
@torch.no_grad()
def test_layer_gives_the_output_of_the_models_block(name: str) -> None:
    block, layer = PAIRS[name]()
    x = _rows()
    reference = block(x[None])
    reference = reference[0] if isinstance(reference, tuple) else reference
    answer = layer.answer(x)
    assert (answer.output - reference[0]).abs().max() <= TOLERANCE
    assert not answer.degraded
