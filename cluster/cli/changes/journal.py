"""The last plan that was begun on each cluster, kept so that it can be continued or undone."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ....experts.errors import DataLoss
from ....experts.names import is_name
from ...machine.durable_files import private_folder, write_private
from ...machine.run_files import home
from ...placement.change_plan import Plan


@dataclass(frozen=True)
class Begun:
    """A plan, and the versions that served before its first step, by id."""

    plan: Plan
    versions: Mapping[str, str]


def journal_path(name: str) -> Path:
    """The file of a cluster's last plan, in this user's home. Raises DataLoss for a name that no cluster has.

    The name is what the cluster says of itself, and may come from another machine.
    """
    if not is_name(name):
        raise DataLoss(f"the cluster calls itself {name[:64]!r}, which is no name of a cluster")
    return home() / "plans" / f"{name}.json"


def last_begun(name: str) -> Begun | None:
    """The last plan that was begun on a cluster and not undone. Raises DataLoss for a damaged file."""
    path = journal_path(name)
    try:
        plain = json.loads(path.read_text(encoding="utf-8"))
        return Begun(Plan.from_json(plain["plan"]), dict(plain["versions"]))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError, DataLoss):
        raise DataLoss(f"{path} is damaged: remove it; what was applied last can then not be undone") from None


def keep(name: str, begun: Begun) -> None:
    """Write down a plan before its first step is made."""
    path = journal_path(name)
    private_folder(path.parent, "EXPERTMESH_HOME")
    write_private(path, json.dumps({"plan": begun.plan.to_json(), "versions": dict(begun.versions)}))


def forget(name: str) -> None:
    """Remove the plan of a cluster that was undone."""
    journal_path(name).unlink(missing_ok=True)
