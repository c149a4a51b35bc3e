"""Tokens and roles: every method against every kind of token, and no token in any text."""

from __future__ import annotations

import hashlib
import os
import stat
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from expertmesh.cluster.gateway.authorise import TokenTable
from expertmesh.cluster.machine.tokens import create_token_file, new_token, read_token, token_digest
from expertmesh.cluster.rpc.methods import METHODS, Role
from expertmesh.experts.errors import ConfigError, ExpertMeshError, NotFound, PermissionDenied, Unauthenticated

NOW = 1_000_000.0
TOKENS = {role.label: f"{role.label}-token" for role in Role} | {"expired": "expired-token"}
READERS_METHODS = (
    "Call",
    "CallStream",
    "Status",
    "Check",
    "Watch",
    "SwapProgress",
    "History",
    "Pin",
    "Unpin",
    "Pass",
    "PassStream",
)
OPERATORS_METHODS = (*READERS_METHODS, "Drain", "Upload", "Swap", "Leases", "Declared", "Scale", "Train", "TrainStream")
OUTCOMES = {  # the table: who may call what
    "none": {},
    "wrong": {},
    "expired": {},
    "reader": dict.fromkeys(READERS_METHODS, Role.READER),
    "operator": dict.fromkeys(OPERATORS_METHODS, Role.OPERATOR),
    "admin": dict.fromkeys((*OPERATORS_METHODS, "Change"), Role.ADMIN),
}


@pytest.fixture
def table() -> TokenTable:
    made = TokenTable()
    for role in Role:
        made.add(token_digest(TOKENS[role.label]), role)
    made.add(token_digest(TOKENS["expired"]), Role.ADMIN, expires=NOW)
    return made


@pytest.mark.parametrize("who", OUTCOMES)
@pytest.mark.parametrize("method", [*METHODS, "NoSuchMethod", ""])
def test_every_method_against_every_kind_of_token(table: TokenTable, method: str, who: str) -> None:
    token = None if who == "none" else TOKENS.get(who, "some other token")
    if method in OUTCOMES[who]:
        assert table.authorise(method, token, NOW) is OUTCOMES[who][method]
    else:
        refusal = Unauthenticated if who in ("none", "wrong", "expired") else PermissionDenied
        with pytest.raises(refusal):
            table.authorise(method, token, NOW)


def test_the_table_above_knows_every_method() -> None:
    assert set(METHODS) == set(OUTCOMES["admin"])


def test_a_token_expires_at_its_time(table: TokenTable) -> None:
    assert table.authorise("Drain", TOKENS["expired"], NOW - 1e-3) is Role.ADMIN
    with pytest.raises(Unauthenticated, match="expired"):
        table.authorise("Call", TOKENS["expired"], NOW)


def test_a_token_known_twice_has_its_highest_live_role(table: TokenTable) -> None:
    table.add(token_digest(TOKENS["expired"]), Role.READER)
    assert table.authorise("Call", TOKENS["expired"], NOW + 1) is Role.READER
    assert table.authorise("Call", TOKENS["expired"], NOW - 1) is Role.ADMIN


def test_an_empty_table_lets_nobody_in() -> None:
    with pytest.raises(Unauthenticated):
        TokenTable().authorise("Call", "anything", NOW)


@given(st.text(alphabet=st.characters(exclude_categories=())))
def test_text_that_is_no_token_is_refused_and_never_shown(text: str) -> None:
    table = TokenTable()
    table.add(token_digest("the real one"), Role.ADMIN)
    with pytest.raises(Unauthenticated) as caught:
        table.authorise("Call", text, NOW)
    assert len(text) < 8 or text not in str(caught.value)


def test_a_digest_is_as_good_as_its_token() -> None:
    token = new_token()
    table = TokenTable()
    table.add(hashlib.sha256(token.encode()).hexdigest(), Role.OPERATOR)
    assert table.authorise("Drain", token, NOW) is Role.OPERATOR


@pytest.mark.parametrize("wrong", ["", "abc", "g" * 64, "A" * 64, None, 5])
def test_a_digest_that_is_none_is_refused_without_showing_it(wrong: object) -> None:
    with pytest.raises(ConfigError) as caught:
        TokenTable().add(wrong, Role.READER)  # type: ignore[arg-type]
    assert not isinstance(wrong, str) or len(wrong) < 64 or wrong not in str(caught.value)


def test_tokens_have_256_random_bits_and_hide_in_reprs(tmp_path: Path) -> None:
    tokens = create_token_file(tmp_path / "tokens")
    table = TokenTable()
    for role, token in tokens.items():
        assert len(token) >= 43
        table.add(token_digest(token), role)
    assert len(set(tokens.values())) == len(Role)
    shown = f"{tokens!r} {table!r} {vars(table)!r} {read_token(tmp_path / 'tokens')!r}"
    assert not any(token in shown for token in tokens.values())


def test_a_token_file_is_private_and_reads_back(tmp_path: Path) -> None:
    path = tmp_path / "tokens"
    tokens = create_token_file(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [line.split()[0] for line in path.read_text().splitlines()] == ["reader", "operator", "admin"]
    assert read_token(path) == tokens[Role.ADMIN]
    assert {role: read_token(path, role) for role in Role} == tokens
    assert [entry.name for entry in tmp_path.iterdir()] == ["tokens"]


def test_a_new_token_file_takes_the_place_of_a_link_without_following_it(tmp_path: Path) -> None:
    victim, path = tmp_path / "victim", tmp_path / "tokens"
    victim.write_text("mine")
    path.symlink_to(victim)
    create_token_file(path)
    assert victim.read_text() == "mine"
    assert not path.is_symlink()


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o666, 0o620, 0o601])
def test_a_token_file_that_others_can_reach_is_refused(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "tokens"
    create_token_file(path)
    path.chmod(mode)
    with pytest.raises(ConfigError, match="chmod 600"):
        read_token(path)


@pytest.mark.parametrize("content", ["", "reader", "king token", "reader a b", "\u00e9 token", "SECRET-x reader"])
def test_a_file_of_another_form_is_refused_and_not_shown(tmp_path: Path, content: str) -> None:
    path = tmp_path / "tokens"
    path.write_text(content, encoding="utf-8")
    path.chmod(0o600)
    with pytest.raises((ConfigError, NotFound)) as caught:
        read_token(path)
    assert "SECRET" not in str(caught.value)


def test_a_missing_file_and_a_missing_role_are_not_found(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="is the cluster running"):
        read_token(tmp_path / "tokens")
    (tmp_path / "tokens").touch(mode=0o600)
    (tmp_path / "tokens").write_text("reader abc\n")
    with pytest.raises(NotFound, match="operator"):
        read_token(tmp_path / "tokens", Role.OPERATOR)


def test_a_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        create_token_file(tmp_path / "tokens")
    assert list(tmp_path.iterdir()) == []


def test_roles_are_ordered_and_named() -> None:
    assert Role.READER < Role.OPERATOR < Role.ADMIN
    assert [Role.parse(role.label) for role in Role] == list(Role)
    with pytest.raises(ExpertMeshError):
        Role.parse("ADMIN")
    assert token_digest("a") == hashlib.sha256(b"a").hexdigest()
