"""The numbers of replicas that were asked for are as durable as the epochs: noticed when lost, and rebuilt."""

from __future__ import annotations

import json
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from expertmesh.cluster.state.committed import COMMITTED_FILE, Committed, read_committed, write_committed
from expertmesh.cluster.state.registry import FILE, Registry, kept_replicas
from expertmesh.cluster.state.repair import repair
from expertmesh.experts.errors import DataLoss


def test_a_registry_that_has_lost_a_change_is_refused_and_repair_brings_it_back(tmp_path: Path) -> None:
    with Registry(tmp_path) as registry:
        registry.set_replicas({"l/a": 2})
        shutil.copy(tmp_path / FILE, tmp_path / "before")
        registry.set_replicas({"l/a": 4})
    (tmp_path / "before").rename(tmp_path / FILE)
    with pytest.raises(DataLoss, match="change 1 of the numbers of replicas, but change 2 was made"):
        Registry(tmp_path)
    repair(tmp_path)
    assert kept_replicas(tmp_path) == {"l/a": 4}
    with Registry(tmp_path) as registry:
        registry.set_replicas({"l/a": 3})
    with Registry(tmp_path) as registry:
        assert registry.replicas() == {"l/a": 3}


def test_a_damaged_registry_is_rebuilt_with_its_numbers(tmp_path: Path) -> None:
    with Registry(tmp_path) as registry:
        registry.set_replicas({"l/a": 4, "l/p": 2})
    (tmp_path / FILE).write_bytes(b"\0" * 100)
    with pytest.raises(DataLoss):
        Registry(tmp_path)
    repair(tmp_path)
    assert kept_replicas(tmp_path) == {"l/a": 4, "l/p": 2}


def test_the_state_of_an_earlier_build_has_no_numbers_and_is_completed(tmp_path: Path) -> None:
    with Registry(tmp_path) as registry:
        cluster_id = registry.cluster_id
    with closing(sqlite3.connect(tmp_path / FILE)) as db:
        db.execute("DROP TABLE replicas")
        db.execute("DELETE FROM meta WHERE key = 'replicas'")
        db.commit()
    assert kept_replicas(tmp_path) == {}
    write_committed(tmp_path, Committed(cluster_id=cluster_id, epochs=(), declared={}))
    with Registry(tmp_path) as registry:
        registry.set_replicas({"l/a": 2})
    recorded = read_committed(tmp_path)
    assert recorded is not None
    assert (recorded.replicas, recorded.replicas_change) == ({"l/a": 2}, 1)
    assert "replicas" in json.loads((tmp_path / COMMITTED_FILE).read_text())["committed"]
