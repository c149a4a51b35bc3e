"""Uploads on a disk: chunks in order, twice, or not at all; sums, limits, and what nobody goes on with."""

from __future__ import annotations

import hashlib
import os
import stat
import uuid
from pathlib import Path
from typing import Any

import pytest
from helpers.stored import files, full_disk
from hypothesis import given, settings
from hypothesis import strategies as st

from expertmesh.cluster.rpc.swaps import MOST_CHUNK_BYTES, UploadChunk
from expertmesh.cluster.state.uploads import STALE_SECONDS, TIDY_SECONDS, UploadLimits, Uploads
from expertmesh.cluster.state.version_folders import VersionStore
from expertmesh.experts.errors import DataLoss, FailedPrecondition, InvalidRequest, TooLarge

DATA = bytes(range(256)) * 4


class World:
    """The uploads of a folder, and one upload of `DATA`, sent in pieces as a test likes."""

    def __init__(self, folder: Path, data: bytes = DATA, **limits: int) -> None:
        self.now = 0.0
        self.store = VersionStore(folder, clock=lambda: 1e9 + self.now)
        self.limits = UploadLimits(**limits)
        self.uploads = self.fresh()
        self.data = data
        self.id = uuid.uuid4().hex

    def fresh(self) -> Uploads:
        """What a router that has restarted begins with."""
        return Uploads(self.store, self.limits, clock=lambda: self.now)

    @property
    def path(self) -> Path:
        return self.store.upload_path(self.id)

    def send(self, start: int, stop: int, **changes: Any) -> tuple[int, bool]:
        piece = changes.pop("piece", self.data[start:stop])
        sent = {
            "upload_id": self.id, "offset": start, "total": len(self.data), "last": stop == len(self.data),
            "sha256": hashlib.sha256(self.data).hexdigest(),
        }  # fmt: skip
        state = self.uploads.write(UploadChunk(**(sent | changes)), piece)
        return state.next, state.done


def test_pieces_become_the_file_for_its_owner_alone(tmp_path: Path) -> None:
    world = World(tmp_path)
    assert world.send(0, 300) == (300, False)
    assert world.send(300, 1000) == (1000, False)
    assert world.send(1000, 1024) == (1024, True)
    assert world.path.read_bytes() == DATA
    assert stat.S_IMODE(world.path.stat().st_mode) == 0o600


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_pieces_that_come_twice_or_too_early_change_nothing(
    tmp_path_factory: pytest.TempPathFactory, data: Any
) -> None:
    world = World(tmp_path_factory.mktemp("state"))
    following, done = 0, False
    for _ in range(data.draw(st.integers(0, 12))):
        start = data.draw(st.integers(0, len(DATA)))
        stop = data.draw(st.integers(start, len(DATA)))
        if data.draw(st.booleans()):
            world.uploads = world.fresh()
        there = world.path.stat().st_size if world.path.exists() else 0
        following, done = world.send(start, stop)
        assert following == (stop if start == there else there)
    while not done:  # as the client does: it goes on from where it is told
        following, done = world.send(following, min(len(DATA), following + 200))
    assert world.path.read_bytes() == DATA


def test_a_whole_that_is_another_is_dropped(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.send(0, 1000)
    with pytest.raises(DataLoss, match="send it again"):
        world.send(1000, 1024, piece=bytes(24))
    assert not world.path.exists()
    assert world.send(0, 1000) == (1000, False)
    world.uploads = world.fresh()  # which has to read it all again
    with pytest.raises(DataLoss, match="send it again"):
        world.send(1000, 1024, sha256="0" * 64)
    assert files(tmp_path) == set()


def test_an_empty_file_is_one(tmp_path: Path) -> None:
    world = World(tmp_path, b"")
    assert world.send(0, 0) == (0, True)
    assert world.path.read_bytes() == b""


def test_more_than_a_limit_is_refused_by_its_name(tmp_path: Path) -> None:
    world = World(tmp_path, max_upload_bytes=1023)
    with pytest.raises(TooLarge, match="max_upload_bytes is 1023"):
        world.send(0, 10)
    assert files(tmp_path) == set()
    other = World(tmp_path, max_uploads_bytes=1500)
    assert other.send(0, 1000) == (1000, False)
    second = World(tmp_path, max_uploads_bytes=1500)
    with pytest.raises(TooLarge, match="max_uploads_bytes is 1500"):
        second.send(0, 10)
    assert other.send(1000, 1024) == (1024, True)
    other.uploads.discard(other.id)
    other.uploads.discard(other.id)
    assert second.send(0, 1024) == (1024, True)


def test_two_uploads_that_do_not_fit_together_end_within_the_quota(tmp_path: Path) -> None:
    one, two = World(tmp_path, max_uploads_bytes=1500), World(tmp_path, max_uploads_bytes=1500)
    one.send(0, 400)
    two.send(0, 400)
    one.send(400, 1000)
    with pytest.raises(TooLarge, match="max_uploads_bytes"):
        two.send(400, 1000)
    assert one.store.uploads_size() <= 1500


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"upload_id": "../../etc/passwd"}, "32 hex digits"),
        ({"upload_id": "A" * 32}, "32 hex digits"),
        ({"upload_id": ""}, "32 hex digits"),
        ({"sha256": "0" * 63}, "sha256"),
        ({"sha256": "G" * 64}, "sha256"),
        ({"offset": -1}, "are outside the"),
        ({"offset": 1025}, "are outside the"),
        ({"total": 5}, "are outside the"),
        ({"total": -1}, "are outside the"),
        ({"last": True}, "the last chunk ends at 10"),
        ({"piece": bytes(MOST_CHUNK_BYTES + 1), "total": 2**40}, "at most 4194304 bytes"),
    ],
)
def test_a_chunk_that_cannot_be_is_refused(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    world = World(tmp_path)
    with pytest.raises(InvalidRequest, match=said):
        world.send(0, 10, **changes)
    assert files(tmp_path) == set()


def test_a_shorter_whole_under_the_same_id_is_refused(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.send(0, 1000)
    with pytest.raises(DataLoss, match="1000 bytes of this upload have arrived"):
        world.send(0, 10, total=500)


def test_a_full_disk_is_said_and_the_upload_goes_on_once_there_is_room(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.send(0, 500)
    with full_disk(), pytest.raises(FailedPrecondition, match=r"free disk space on .* of state_dir") as caught:
        world.send(500, 1024)
    assert str(tmp_path) not in str(caught.value)
    following, _ = world.send(0, 0)
    assert world.send(following, 1024) == (1024, True)


def test_what_nobody_goes_on_with_is_dropped_after_an_hour(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.send(0, 500)
    os.utime(world.path, (1e9, 1e9))
    assert not world.uploads.is_untidy()
    world.now = TIDY_SECONDS
    assert world.uploads.is_untidy()
    world.uploads.tidy()
    assert world.path.exists()
    assert not world.uploads.is_untidy()
    world.now = STALE_SECONDS + 1
    world.uploads.tidy()
    assert not world.path.exists()
    assert world.send(500, 1024) == (0, False)  # the sender is told to begin again


def test_a_link_in_the_place_of_an_upload_is_not_followed(tmp_path: Path) -> None:
    world, victim = World(tmp_path / "state"), tmp_path / "victim"
    victim.write_bytes(b"")
    world.path.symlink_to(victim)
    with pytest.raises(FailedPrecondition):
        world.send(0, 10)
    assert victim.read_bytes() == b""
