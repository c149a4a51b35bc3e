"""The loader of configuration: what a good file gives, and every way a file can be wrong, with its line."""

from __future__ import annotations

import hashlib
import os
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from expertmesh.cluster.config import yaml_file
from expertmesh.cluster.config.cluster_config import allowed_factories
from expertmesh.cluster.config.loader import ClusterConfig, TokenEntry, load_config, parse_override
from expertmesh.cluster.rpc.methods import Role
from expertmesh.experts.errors import ConfigError
from expertmesh.experts.spec import Autoscale, Expert, TensorSpec
from expertmesh.experts.weights.files import save_module
from expertmesh.router import gates
from expertmesh.router.mixture.layer import Layer

DIGEST = hashlib.sha256(b"secret").hexdigest()
WAVES = """\
layers:
  waves:
    gate: {type: fixed, weights: [0.5, 0.5]}
    experts:
      sin: {factory: "torch:sin"}
      cos: {factory: "torch:cos"}
"""


def load(folder: Path, text: str, overrides: dict[str, object] | None = None, **environ: str) -> ClusterConfig:
    path = folder / "mesh.yaml"
    path.write_text(text, encoding="utf-8")
    path.chmod(0o600)
    return load_config(path, overrides, environ)


def mistakes_in(folder: Path, text: str, overrides: dict[str, object] | None = None, **environ: str) -> list[str]:
    """What the loader finds wrong, without the name of the folder."""
    with pytest.raises(ConfigError) as caught:
        load(folder, text, overrides, **environ)
    lines = str(caught.value).replace(f"{folder}{os.sep}", "").splitlines()
    if len(lines) > 1:
        assert lines.pop(0) == f"mesh.yaml has {len(lines)} mistakes:"
    return [line.strip() for line in lines]


def layer(gate: str = "{type: fixed, weights: [1]}", expert: str = '{factory: "torch:sin"}', more: str = "") -> str:
    """A file with one layer: its gate stands in line 3, its expert in line 4, `more` from line 5 on."""
    return f"layers:\n  x:\n    gate: {gate}\n    experts: {{e: {expert}}}\n    {more}\n"


@pytest.mark.parametrize("kind", ["top_k, k: 1", "switch", "noisy_top_k, k: 1"])
def test_a_gate_without_weights_is_the_same_at_each_start(tmp_path: Path, kind: str) -> None:
    def weight(width: int) -> torch.Tensor:
        (made,) = load(tmp_path, layer(gate=f"{{type: {kind}, in_features: {width}, num_experts: 1}}")).layers
        return made.gate.state_dict()["weight"]

    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    first = weight(4)
    assert torch.equal(torch.random.get_rng_state(), before)  # nothing is taken from the caller's own generator
    torch.manual_seed(2)
    assert torch.equal(weight(4), first)
    assert not torch.equal(weight(5)[:, :4], first)


def test_a_small_file_takes_its_defaults(tmp_path: Path) -> None:
    config = load(tmp_path, WAVES)
    assert (config.name, config.host, config.port, config.transport) == ("default", "127.0.0.1", 50051, "channel")
    (waves,) = config.layers
    assert isinstance(waves.gate, gates.Fixed)
    assert waves.experts == {"sin": Expert("torch:sin"), "cos": Expert("torch:cos")}


def test_a_full_file_gives_every_value(tmp_path: Path) -> None:
    save_module(tmp_path / "e0.safetensors", nn.Linear(4, 2))
    gate = gates.build("top_k", in_features=4, num_experts=1, k=1)
    save_module(tmp_path / "gate.safetensors", gate)
    (tmp_path / "code").mkdir()
    text = f"""\
name: mine
host: localhost
port: 0
metrics_port: null
transport: ray
address: auto
max_message_bytes: 1000000
max_request_bytes: 2000000
max_stream_bytes: 3000000
max_rows_in_flight: 10
default_timeout: 1e1
start_timeout: 5
hang_seconds: 7.5
log_level: debug
tokens:
  - {{role: operator, sha256: {DIGEST}, expires: 2030-01-01T00:00:00Z}}
  - {{role: reader, sha256: {DIGEST}}}
layers:
  news:
    gate: {{type: top_k, in_features: 4, num_experts: 1, k: 1, weights: gate.safetensors}}
    combine: mean
    on_missing: renormalize
    max_lost_mass: 0.25
    input: {{shape: [4], dtype: float32}}
    experts:
      e0:
        factory: "torch.nn:Linear"
        kwargs: {{in_features: 4, out_features: 2}}
        weights: e0.safetensors
        replicas: 2
        autoscale: {{min: 2, max: 4, target_queue_ms: 25, up_after: 1.5, down_after: 30}}
        num_cpus: 0.1
        resources: {{disk: 1}}
        pack: a
        input: {{shape: [4], dtype: float32}}
        output: {{shape: [2]}}
        runtime_env: {{working_dir: code, env_vars: {{A: b}}}}
"""
    config = load(tmp_path, text)
    assert (config.name, config.port, config.metrics_port, config.default_timeout) == ("mine", 0, None, 10.0)
    assert config.hang_seconds == 7.5
    assert (config.max_message_bytes, config.max_request_bytes, config.max_stream_bytes) == (
        10**6,
        2 * 10**6,
        3 * 10**6,
    )
    expiries = {token.role: token.expires for token in config.tokens}
    assert expiries == {Role.OPERATOR: 1893456000.0, Role.READER: None}
    (news,) = config.layers
    assert torch.equal(news.gate.state_dict()["weight"], gate.state_dict()["weight"])
    assert (news.combine, news.on_missing, news.max_lost_mass) == ("mean", "renormalize", 0.25)
    expert = news.experts["e0"]
    assert expert.weights == tmp_path / "e0.safetensors"
    assert (expert.input, expert.output) == (TensorSpec((4,), "float32"), TensorSpec((2,)))
    assert expert.runtime_env == {"working_dir": str(tmp_path / "code"), "env_vars": {"A": "b"}}
    assert (expert.replicas, expert.num_cpus, expert.resources, expert.pack) == (2, 0.1, {"disk": 1}, "a")
    assert expert.autoscale == Autoscale(min=2, max=4, target_queue_ms=25, up_after=1.5, down_after=30)


def test_the_command_line_wins_over_the_environment_over_the_file(tmp_path: Path) -> None:
    text = "port: 1\nname: file\nlog_level: error\n" + WAVES
    environ = {"EXPERTMESH_PORT": "2", "EXPERTMESH_NAME": "7", "EXPERTMESH_HOME": "/x", "EXPERTMESH_LOG_LEVEL": ""}
    config = load(tmp_path, text, {"port": 3}, **environ)
    assert (config.port, config.name, config.log_level, config.host) == (3, "7", "error", "127.0.0.1")


def test_an_override_reaches_any_depth(tmp_path: Path) -> None:
    config = load(tmp_path, WAVES, {"layers.waves.experts.sin.replicas": 3, "layers.waves.combine": "mean"})
    assert config.layers[0].experts["sin"].replicas == 3
    assert config.layers[0].combine == "mean"


@pytest.mark.parametrize(
    ("text", "found"),
    [("port=5", ("port", 5)), ("a.b=x=y", ("a.b", "x=y")), ("m=null", ("m", None)), ("t=1e-3", ("t", 0.001))],
)
def test_an_override_is_key_and_yaml(text: str, found: tuple[str, object]) -> None:
    assert parse_override(text) == found


@pytest.mark.parametrize("text", ["port", "=5", "port=[", "port=!!python/name:os.system"])
def test_an_override_of_another_form_is_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        parse_override(text)


def test_a_map_can_be_taken_over(tmp_path: Path) -> None:
    text = """\
layers:
  x:
    gate: {type: fixed, weights: [1, 1]}
    experts:
      a: &base {factory: "torch:sin", replicas: 2, num_cpus: 0.5}
      b: {<<: *base, factory: "torch:cos"}
"""
    (made,) = load(tmp_path, text).layers
    assert made.experts["b"] == Expert("torch:cos", replicas=2, num_cpus=0.5)


def test_every_mistake_is_told_at_once_in_the_order_of_the_lines(tmp_path: Path) -> None:
    text = """\
prot: 1
port: 70000
layers:
  news:
    gate: {type: top_k, in_features: 4, num_experts: 2, k: 1, kk: 1}
    combine: sum
    experts:
      e0: {factory: "torch.nn:Linear", kwargs: {in_features: 4, out_features: 2}, weights: no.safetensors, replicas: 0}
      e1:
        factory: "torch.nn:Linaer"
        num_gpus: -1
"""
    found = mistakes_in(tmp_path, text)
    assert [line.partition(": ")[0] for line in found] == [f"mesh.yaml:{n}" for n in (1, 2, 5, 6, 8, 8, 10, 11)]
    wanted = ["'port'", "70000", "'k'", "weighted_sum", "no.safetensors", "replicas", "Linaer", "num_gpus"]
    assert all(word in " ".join(found) for word in wanted)


WRONG = {
    "a wrong key has a suggestion": ("hots: x\n" + WAVES, r"^mesh.yaml:1: .*'hots' \(did you mean 'host'\?\)"),
    "a key that appears twice": (
        "port: 1\nport: 2\n" + WAVES,
        r"^mesh.yaml:2: key 'port' appears twice, first at .*:1$",
    ),
    "a key that is no text": ("1: 2\n" + WAVES, r"^mesh.yaml:1: key '1' must be text"),
    "no layers": ("port: 1\n", r"^mesh.yaml:1: layers is empty"),
    "layers that are a list": ("layers: [a]\n", r"^mesh.yaml:1: layers must be a map, not a list"),
    "a layer that is text": ("layers: {x: y}\n", r"layer x must be a map, not 'y'"),
    "a layer without experts": ("layers:\n  x: {gate: {type: fixed, weights: [1]}}\n", r"^mesh.yaml:2: .*no experts"),
    "a layer without a gate": ('layers:\n  x: {experts: {e: {factory: "torch:sin"}}}\n', r":2: .*needs a gate"),
    "a gate that is unknown": (layer(gate="{type: topk}"), r"^mesh.yaml:3: .*did you mean 'top_k'"),
    "a gate without type": (layer(gate="{k: 1}"), r"^mesh.yaml:3: a gate needs a type"),
    "a gate without what it needs": (layer(gate="{type: top_k}"), r"^mesh.yaml:3: .*needs in_features"),
    "a gate for other experts": (layer(gate="{type: fixed, weights: [1, 2]}"), r"^mesh.yaml:2: .*picks among 2"),
    "a gate whose weights are text": (layer(gate="{type: fixed, weights: [a]}"), r"^mesh.yaml:3: gate 'fixed': .*'a'"),
    "an expert without factory": (layer(expert="{replicas: 1}"), r"^mesh.yaml:4: .*needs a factory"),
    "an expert that is text": (layer(expert="torch.nn:Linear"), r"^mesh.yaml:4: expert x/e must be a map"),
    "a factory that is no import string": (layer(expert="{factory: torch.nn.Linear}"), r'^mesh.yaml:4: .*"module:attr'),
    "a module that is not there": (layer(expert='{factory: "nosuch:f"}'), r"^mesh.yaml:4: .*'nosuch'.*working_dir"),
    "a module, and no code elsewhere": (
        layer(expert='{factory: "nosuch:f", runtime_env: null}'),
        r"^mesh.yaml:4: .*'nosuch'",
    ),
    "a size that is no number": (
        layer(expert='{factory: "torch:sin", input: {shape: [x]}}'),
        r":4: shape must .*, not 'x'",
    ),
    "weights that are no path": (layer(expert='{factory: "torch:sin", weights: {a: 1}}'), r":4: weights must be text"),
    "shared experts that are none": (layer(more="shared: ''"), r"^mesh.yaml:5: shared must be a map, not ''"),
    "an attribute that is not there": (layer(expert='{factory: "torch:sinn"}'), r"^mesh.yaml:4: .*'sinn'"),
    "arguments that do not fit": (layer(expert='{factory: "torch.nn:Linear", kwargs: {in: 1}}'), r"^mesh.yaml:4: "),
    "a resource that is no number": (layer(expert='{factory: "torch:sin", resources: {a: b}}'), r":4: resource a must"),
    "a spec that is no shape": (layer(expert='{factory: "torch:sin", input: {shape: 4}}'), r":4: shape must be a list"),
    "a dtype that is unknown": (layer(expert='{factory: "torch:sin", input: {dtype: fp32}}'), r":4: dtype 'fp32'"),
    "an autoscale without a most": (
        layer(expert='{factory: "torch:sin", autoscale: {min: 1}}'),
        r"^mesh.yaml:4: an autoscale needs the most replicas",
    ),
    "an autoscale whose most is no number": (
        layer(expert='{factory: "torch:sin", autoscale: {max: x}}'),
        r"^mesh.yaml:4: max must be a whole number, not 'x'",
    ),
    "an autoscale with a wrong key": (
        layer(expert='{factory: "torch:sin", autoscale: {max: 2, up_afer: 1}}'),
        r"^mesh.yaml:4: .*'up_afer' \(did you mean 'up_after'\?\)",
    ),
    "an autoscale upside down": (
        layer(expert='{factory: "torch:sin", autoscale: {min: 3, max: 2}}'),
        r"^mesh.yaml:4: autoscale: min is 3 and max 2",
    ),
    "more replicas than autoscale allows": (
        layer(expert='{factory: "torch:sin", replicas: 3, autoscale: {max: 2}}'),
        r"^mesh.yaml:4: replicas is 3, and autoscale allows 2",
    ),
    "a layer's name": (layer().replace(" x:", " a b:"), r"^mesh.yaml:2: layer name 'a b' must be"),
    "an expert's name": (layer().replace("{e:", "{a b:"), r"^mesh.yaml:4: expert name 'a b' must be"),
    "a fallback that is no expert": (layer(more='on_missing: "fallback:f"'), r"^mesh.yaml:5: .*'f' is not one of"),
    "lost mass above 1": (layer(more="max_lost_mass: 2"), r"^mesh.yaml:5: .*between 0 and 1"),
    "lost mass that is text": (layer(more="max_lost_mass: much"), r"^mesh.yaml:5: max_lost_mass must be a number"),
    "a token's role": (f"tokens: [{{role: king, sha256: {DIGEST}}}]\n" + WAVES, r"^mesh.yaml:1: role must be one of"),
    "a token itself": ("tokens: [{role: reader, sha256: secret}]\n" + WAVES, r"^mesh.yaml:1: sha256 must be the 64"),
    "a token's time": (f"tokens: [{{role: reader, sha256: {DIGEST}, expires: soon}}]\n" + WAVES, r":1: expires must"),
    "a code folder": ("runtime_env: {working_dir: nosuch}\n" + WAVES, r"^mesh.yaml:1: there is no folder"),
    "a tag": ("name: !!python/object/apply:os.system [ls]\n" + WAVES, r"^mesh.yaml:1: the tag"),
    "a scalar's tag": ("name: !!python/name:os.system\n" + WAVES, r"^mesh.yaml:1: "),
    "a time that is none": ("name: 2024-13-45\n" + WAVES, r"^mesh.yaml:1: .*cannot be read as timestamp"),
    "a host beyond loopback": ("host: 0.0.0.0\n" + WAVES, r"^mesh.yaml:1: .*requires TLS"),
    "a key without its certificate": ("tls_key: k\n" + WAVES, r"^mesh.yaml:1: .*without tls_cert"),
    "a certificate that is not there": ("tls_cert: c\ntls_key: k\n" + WAVES, r"^mesh.yaml:1: tls_cert: there is no"),
    "a map that takes over no map": ("<<: [1]\n" + WAVES, r"^mesh.yaml:1: << must merge a map"),
    "a map inside itself": ("runtime_env: &a {b: *a}\n" + WAVES, r"^mesh.yaml:1: an alias"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_mistake_is_told_with_its_line(tmp_path: Path, case: str) -> None:
    text, pattern = WRONG[case]
    assert any(re.search(pattern, line) for line in mistakes_in(tmp_path, text))


@pytest.mark.parametrize(
    "text", ["", "# nothing\n", "[1]", "a: [", "a: b: c", "x: &a 1\ny: *b\n", "--- {}\n--- {}\n", "\t"]
)
def test_text_that_is_no_map_of_yaml_is_one_error_with_a_line(tmp_path: Path, text: str) -> None:
    (found,) = mistakes_in(tmp_path, text)
    assert re.match(r"mesh\.yaml:\d+: ", found)


def test_the_factories_that_may_be_swapped_in_are_those_of_the_start_unless_they_are_listed(tmp_path: Path) -> None:
    assert allowed_factories(load(tmp_path, WAVES)) == ("torch:cos", "torch:sin")
    listed = load(tmp_path, WAVES + 'allowed_factories: ["mine:Expert"]\nmax_upload_bytes: 1000\n')
    assert (allowed_factories(listed), listed.max_upload_bytes) == (("mine:Expert",), 1000)
    assert allowed_factories(load(tmp_path, WAVES + "allowed_factories: []\n")) == ()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("name", "a/b"), ("host", ""), ("host", 5), ("port", -1), ("port", "x"), ("port", None),
        ("metrics_host", "0.0.0.0"), ("metrics_port", True), ("transport", "udp"),
        ("address", 5), ("runtime_env", 5), ("max_message_bytes", 1),
        ("max_message_bytes", 1 << 31), ("max_request_bytes", 100), ("max_request_bytes", 2.0**30),
        ("max_request_bytes", 1 << 20), ("max_stream_bytes", -1), ("max_stream_bytes", 1 << 29),
        ("max_rows_in_flight", 0), ("default_timeout", 0),
        ("default_timeout", float("inf")), ("start_timeout", "1s"), ("hang_seconds", 0),
        ("log_level", "loud"), ("retain_epochs", -1),
        ("max_upload_bytes", 0), ("max_upload_bytes", 1 << 40), ("max_uploads_bytes", "8"), ("upload_rate", 1000),
        ("allowed_factories", "torch:sin"), ("allowed_factories", ["torch"]), ("allowed_factories", [5]),
    ],
)  # fmt: skip
def test_a_value_out_of_range_names_its_setting(tmp_path: Path, name: str, value: object) -> None:
    (found,) = mistakes_in(tmp_path, WAVES, {name: value})
    assert found.startswith(f"override {name}: ")
    assert name in found.partition(": ")[2]


def test_a_mistake_of_the_environment_names_its_variable(tmp_path: Path) -> None:
    (found,) = mistakes_in(tmp_path, WAVES, EXPERTMESH_PORT="tcp://10.0.0.1:50051")
    assert found.startswith("environment EXPERTMESH_PORT: port must be a whole number")


def test_weights_that_do_not_fit_are_told_at_their_line(tmp_path: Path) -> None:
    save_module(tmp_path / "e.safetensors", nn.Linear(4, 3))
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "e.safetensors").read_bytes()[:-1])
    text = """\
layers:
  x:
    gate:
      type: top_k
      in_features: 4
      num_experts: 2
      weights: e.safetensors
    experts:
      a:
        factory: "torch.nn:Linear"
        kwargs: {in_features: 4, out_features: 2}
        weights: e.safetensors
      b:
        factory: "torch.nn:Linear"
        kwargs: {in_features: 4, out_features: 2}
        weights: cut.safetensors
"""
    found = mistakes_in(tmp_path, text)
    assert [line.partition(": ")[0] for line in found] == ["mesh.yaml:7", "mesh.yaml:12", "mesh.yaml:16"]


def test_what_is_to_blame_follows_from_the_step_that_failed_and_not_from_words_in_its_message(tmp_path: Path) -> None:
    save_module(tmp_path / "e.safetensors", nn.Linear(4, 2))
    text = """\
layers:
  x:
    gate: {type: fixed, weights: [1, 1]}
    experts:
      a:
        factory: "torch.nn:Linear"
        kwargs: {weights: 4}
        weights: e.safetensors
      b:
        factory: "torch:sin"
        weights: e.safetensors
"""
    found = mistakes_in(tmp_path, text)
    assert [line.partition(": ")[0] for line in found] == ["mesh.yaml:5", "mesh.yaml:11"]
    assert "unexpected keyword argument 'weights'" in found[0]
    assert "plain function" in found[1]


def test_every_router_needs_a_port_of_its_own(tmp_path: Path) -> None:
    assert (load(tmp_path, WAVES).routers, load(tmp_path, "routers: 3\n" + WAVES).routers) == (1, 3)
    assert load(tmp_path, WAVES, EXPERTMESH_ROUTERS="2", EXPERTMESH_PORT="65534").port == 65534
    wrong = mistakes_in(tmp_path, "routers: 3\nport: 65534\nmetrics_port: 65535\n" + WAVES)
    too_many = "leaves no port for the last of 3 routers: use at most 65533, or 0 for any free ones"
    assert wrong == [f"mesh.yaml:2: port 65534 {too_many}", f"mesh.yaml:3: metrics_port 65535 {too_many}"]
    assert mistakes_in(tmp_path, "routers: 0\nport: 65535\n" + WAVES) == [
        "mesh.yaml:1: routers must be a whole number from 1 to 256, not 0"
    ]


def test_of_two_settings_that_exclude_each_other_the_second_is_told(tmp_path: Path) -> None:
    (found,) = mistakes_in(tmp_path, layer(more="combine: vote\n    on_missing: residual"))
    assert re.match(r"mesh\.yaml:6: .*'residual' has no meaning for combine 'vote'", found)


def test_several_values_of_one_expert_are_told_each_at_its_line(tmp_path: Path) -> None:
    text = """\
layers:
  x:
    gate: {type: fixed, weights: [1]}
    experts:
      e:
        factory: "torch:sin"
        num_gpus: 1.5
        num_cpus: a
        replicas: true
        framework: jax
        pack: 5
        resources: {a: b, c: 1}
        args: {a: b}
        kwargs: [a]
        runtime_env: x
        output:
          shape: [-1]
          dtyp: float32
"""
    found = mistakes_in(tmp_path, text)
    assert [line.partition(": ")[0] for line in found] == [f"mesh.yaml:{n}" for n in (*range(7, 16), 17, 18)]
    wanted = ["num_gpus", "num_cpus", "replicas", "framework", "pack", "resource a", "args", "kwargs", "runtime_env"]
    assert all(name in line for name, line in zip([*wanted, "shape", "'dtype'"], found, strict=True))


def test_an_expert_that_refuses_its_declared_rows_is_told(tmp_path: Path) -> None:
    expert = '{factory: "torch.nn:Linear", kwargs: {in_features: 4, out_features: 2}, input: {shape: [5]}}'
    (found,) = mistakes_in(tmp_path, layer(expert=expert))
    assert found.startswith("mesh.yaml:4: x/e ")


@pytest.mark.parametrize("top", [True, False])
def test_code_that_a_runtime_env_brings_is_not_looked_for(tmp_path: Path, top: bool) -> None:
    (tmp_path / "code").mkdir()
    environment = "runtime_env: {working_dir: code}"
    expert = '{factory: "not_here:Model"' + ("" if top else f", {environment}") + "}"
    config = load(tmp_path, (f"{environment}\n" if top else "") + layer(expert=expert))
    assert config.layers[0].experts["e"].factory == "not_here:Model"


@pytest.mark.parametrize("mode", [0o602, 0o666])
def test_a_file_that_others_can_write_is_refused(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "mesh.yaml"
    path.write_text(WAVES)
    path.chmod(mode)
    with pytest.raises(ConfigError, match="chmod go-w"):
        load_config(path, environ={})


def test_a_group_may_write_only_if_it_is_the_users_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "mesh.yaml"
    path.write_text(WAVES)
    path.chmod(0o664)
    monkeypatch.setattr(yaml_file.pwd, "getpwuid", lambda uid: SimpleNamespace(pw_name="me"))
    for group, members, trusted in (("me", [], True), ("me", ["you"], False), ("staff", [], False)):
        entry = SimpleNamespace(gr_name=group, gr_mem=members)
        monkeypatch.setattr(yaml_file.grp, "getgrgid", lambda gid, entry=entry: entry)
        if trusted:
            assert load_config(path, environ={}).layers
        else:
            with pytest.raises(ConfigError, match="others can write"):
                load_config(path, environ={})


def test_a_file_of_another_user_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "mesh.yaml"
    path.write_text(WAVES)
    path.chmod(0o600)
    owner = path.stat().st_uid
    monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
    if owner == 0:
        assert load_config(path, environ={}).layers  # root's files are trusted by all
    else:
        with pytest.raises(ConfigError, match="another user"):
            load_config(path, environ={})


def test_a_file_that_is_not_there_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no file"):
        load_config(tmp_path / "mesh.yaml", environ={})
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(tmp_path, environ={})


def test_a_configuration_made_in_python_obeys_the_same_rules(tmp_path: Path) -> None:
    waves = Layer("waves", gates.Fixed([1.0]), {"sin": Expert("torch:sin")})
    assert ClusterConfig(layers=(waves,)).port == 50051
    with pytest.raises(ConfigError, match=r"port must be .*; log_level must be"):
        ClusterConfig(layers=(waves,), port=-1, log_level="loud")
    with pytest.raises(ConfigError, match="different names"):
        ClusterConfig(layers=(waves, waves))
    with pytest.raises(ConfigError, match="empty"):
        ClusterConfig()


def test_a_host_beyond_loopback_is_allowed_with_tls(tmp_path: Path) -> None:
    for name in ("cert.pem", "key.pem"):
        (tmp_path / name).touch()
    config = load(tmp_path, "host: 0.0.0.0\ntls_cert: cert.pem\ntls_key: key.pem\n" + WAVES)
    assert (config.tls_cert, config.tls_key) == (tmp_path / "cert.pem", tmp_path / "key.pem")


def test_a_digest_does_not_show() -> None:
    assert DIGEST not in repr(TokenEntry(role=Role.READER, sha256=DIGEST))


def test_a_module_beside_the_file_is_found_here_and_by_child_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("PYTHONPATH", "elsewhere")
    (tmp_path / "beside_the_file.py").write_text("def double(rows):\n    return rows * 2\n")
    assert (
        load(tmp_path, layer(expert="{factory: 'beside_the_file:double'}")).layers[0].experts["e"].factory
        == "beside_the_file:double"
    )
    assert os.environ["PYTHONPATH"].split(os.pathsep) == [str(tmp_path), "elsewhere"]


def test_a_module_beside_the_file_where_others_can_place_one_is_not_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("PYTHONPATH", "")
    shared = tmp_path / "shared"
    shared.mkdir()
    (shared / "placed_by_others.py").write_text("def double(rows):\n    return rows * 2\n")
    shared.chmod(0o777)
    with pytest.raises(ConfigError, match="put it beside this file in a folder that only you can write to"):
        load(shared, layer(expert="{factory: 'placed_by_others:double'}"))
    assert not os.environ["PYTHONPATH"]


def test_runtime_environments_need_ray() -> None:
    alone = Layer("l", gates.Fixed([1.0]), {"e": Expert("torch:sin")})
    with_environment = alone.with_experts({"e": Expert("torch:sin", runtime_env={"pip": ["left-pad"]})})
    with pytest.raises(ConfigError, match="the runtime_env of l/e has no effect with transport local"):
        ClusterConfig(layers=(with_environment,), transport="local")
    with pytest.raises(ConfigError, match="runtime_env has no effect with transport local"):
        ClusterConfig(layers=(alone,), transport="local", runtime_env={"pip": []})
