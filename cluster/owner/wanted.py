"""What a configuration asks for, as the document that a running cluster's is compared with."""

from __future__ import annotations

from ..config.cluster_config import ClusterConfig
from ..config.declared_document import declared_document, settings_document
from ..config.preflight import check_layer
from ..control.candidate_records import declared_digest, declared_gate_digest, factory_code
from ..placement.change_plan import Document


def wanted_document(config: ClusterConfig) -> Document:
    """The document that a cluster of this configuration would declare. Raises what is wrong with its layers."""
    elsewhere = config.runtime_env is not None
    layers = [check_layer(layer, code_elsewhere=elsewhere) for layer in config.layers]
    experts = {id: expert for layer in layers for id, expert in layer.everyone_by_id.items()}
    codes = {id: factory_code(expert) for id, expert in experts.items()}
    digests = {layer.gate_id: declared_gate_digest(layer.gate) for layer in layers}
    digests |= {id: declared_digest(expert, code=codes[id]) for id, expert in experts.items()}
    return declared_document(layers, digests, codes, settings_document(config))
