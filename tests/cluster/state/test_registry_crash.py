"""Real kill -9 while a process commits swaps: what it acknowledged is there, and every version is whole."""

from __future__ import annotations

import random
import select
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from helpers.stored import E3

from expertmesh.cluster.state.registry import Registry
from expertmesh.cluster.state.version_folders import VersionStore

KILLS = 25
COMMITTER = """
import hashlib, os, sys
from pathlib import Path
from expertmesh.cluster.state.records import VersionRecord
from expertmesh.cluster.state.registry import Registry
from expertmesh.cluster.state.version_folders import VersionStore

registry, store = Registry(sys.argv[1]), VersionStore(sys.argv[1])
for swap in registry.open_swaps():
    registry.end_swap(swap.swap_id, "aborted", "the process before was killed")
store.sweep(registry.known())
while True:
    counter = registry.next_counter("news/e3")
    upload = store.upload_path("next")
    upload.write_bytes(b"%d" % counter * 5000)
    digest = hashlib.sha256(upload.read_bytes()).hexdigest()
    record = VersionRecord(
        id="news/e3", version=f"v{counter}-{digest[:12]}", counter=counter, digest=digest, tensor_digest=digest,
        origin={}, nbytes=upload.stat().st_size, created=registry.now(), parent=None, ephemeral=False, note="swap",
    )
    registry.begin_swap(f"swap-{counter}", {"news/e3": "upload"})
    store.write("news/e3", record.version, upload, {"sha256": digest}, move=True)
    registry.add_version(record)
    epoch = registry.commit(f"swap-{counter}", {"news/e3": record.version}, expect={})
    os.write(1, f"{epoch.number} {record.version}\\n".encode())
    for gone in registry.collect(2, ()):
        store.remove(gone.id, gone.version)
"""


def killed_after(state: Path, seconds: float) -> list[tuple[int, str]]:
    """Let a process commit swaps, kill it so long after its first one; gives what it acknowledged."""
    process = subprocess.Popen([sys.executable, "-c", COMMITTER, str(state)], stdout=subprocess.PIPE)
    assert process.stdout is not None
    try:
        assert select.select([process.stdout], [], [], 60)[0], "nothing was committed"
        threading.Event().wait(seconds)
    finally:
        process.kill()
        said = process.communicate()[0].decode()
    assert process.returncode == -9, "the committer must not end by itself"
    return [(int(number), version) for number, version in (line.split() for line in said.splitlines())]


@pytest.mark.slow
def test_nothing_that_was_acknowledged_is_lost(tmp_path: Path) -> None:
    state, chance = tmp_path / "state", random.Random(4)
    last, acknowledged = (0, ""), 0
    for _ in range(KILLS):
        said = killed_after(state, chance.uniform(0, 0.06))
        assert [number for number, _ in said] == list(range(said[0][0], said[0][0] + len(said)))
        assert said[0][0] in (last[0] + 1, last[0] + 2)  # one commit may be durable that was not acknowledged
        last, acknowledged = said[-1], acknowledged + len(said)
        with Registry(state) as registry:
            current = registry.current()
            assert current is not None
            assert (current.number, current.versions[E3]) == last or current.number == last[0] + 1
            assert registry.epoch(last[0]).versions == {E3: last[1]}
            store = VersionStore(state)
            for epoch in registry.epochs():
                store.verify(E3, epoch.versions[E3])
                swap = registry.swap(epoch.swap_id)
                assert swap is not None
                assert (swap.state, swap.epoch) == ("committed", epoch.number)
            for id, version in registry.known():
                store.verify(id, version)
    assert acknowledged >= KILLS
