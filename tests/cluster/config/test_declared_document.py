"""What a cluster declares as a document: plain JSON, the same for the same declaration, and without secrets."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import torch

from expertmesh import Autoscale, ClusterConfig, Expert, Layer, gates
from expertmesh.cluster.config.cluster_config import TokenEntry
from expertmesh.cluster.config.declared_document import declared_document, settings_document
from expertmesh.cluster.placement.change_plan import SECTIONS
from expertmesh.cluster.rpc.methods import Role
from expertmesh.experts.spec import TensorSpec
from expertmesh.router.mixture.capacity import Capacity

LAYER = Layer(
    "a",
    gates.Fixed([0.5, 0.5]),
    {
        "e0": Expert("torch.nn:Linear", args=(np.int64(4), 2), pack="p", replicas=2, autoscale=Autoscale(max=4)),
        "e1": Expert("m:f", kwargs={"x": np.ones(2), "y": {1: float("nan")}}, pack="p", replicas=2,
                     autoscale=Autoscale(max=4), weights=Path("e1.safetensors")),
    },
    shared={"s": Expert.from_function(torch.sin, num_cpus=0.5, runtime_env={"env_vars": {"KEY": "secret"}})},
    input=TensorSpec((4,)),
    capacity=Capacity(factor=2.0),
)  # fmt: skip
DIGESTS = {"a/e0": "0", "a/e1": "1", "a/s": "s", "a/gate": "g"}
CODES = {"a/e0": "c", "a/e1": "c", "a/s": ""}


def test_a_document_is_plain_json_with_all_sections() -> None:
    document = declared_document([LAYER], DIGESTS, CODES, {"port": 1, "tls_cert": None})
    assert tuple(document) == SECTIONS
    assert json.loads(json.dumps(document, allow_nan=False)) == document
    assert document == declared_document([LAYER], DIGESTS, CODES, {"port": 1})
    assert document["layers"]["a"] == {
        "experts": ["e0", "e1"], "shared": ["s"], "input": {"shape": [4], "dtype": None}
    }  # fmt: skip
    assert document["gates"]["a/gate"]["arguments"] == {"weights": [0.5, 0.5], "k": None}
    assert document["replicas"] == {"a/p": 2, "a/s": 1}
    assert document["autoscale"]["a/p"]["max"] == 4
    assert {id: place["group"] for id, place in document["places"].items()} == {
        "a/e0": "a/p", "a/e1": "a/p", "a/s": "a/s"
    }  # fmt: skip
    assert document["experts"]["a/s"]["live"]
    assert document["places"]["a/s"]["runtime_env"]
    assert "secret" not in json.dumps(document)
    assert document["experts"]["a/e1"]["weights"] == str(Path("e1.safetensors").absolute())


def test_a_gate_of_a_live_object_has_no_arguments() -> None:
    gate = gates.Custom(lambda rows: rows[:, :2], num_experts=2, k=1)
    layer = Layer("a", gate, {"x": Expert("numpy:sin"), "y": Expert("numpy:cos")})
    none = dict.fromkeys(("a/x", "a/y", "a/gate"), "0")
    document = declared_document([layer], none, none, {})
    assert document["gates"]["a/gate"] == {"type": "custom", "arguments": None, "digest": "0"}


def test_settings_are_plain_and_show_no_token() -> None:
    digest = hashlib.sha256(b"secret").hexdigest()
    tokens = (TokenEntry(role=Role.READER, sha256=digest),)
    with_token = ClusterConfig(layers=[LAYER], port=0, tokens=tokens, runtime_env={"env_vars": {"KEY": "secret"}})
    settings = settings_document(with_token)
    assert json.loads(json.dumps(settings)) == settings
    assert digest not in json.dumps(settings)
    assert "secret" not in json.dumps(settings)
    assert settings["port"] == 0
    without = settings_document(ClusterConfig(layers=[LAYER], port=0))
    assert {name for name in settings if settings[name] != without[name]} == {"tokens", "runtime_env"}
