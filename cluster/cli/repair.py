"""`expertmesh repair`: makes a damaged state folder usable again."""

from __future__ import annotations

from pathlib import Path

import click

from ..machine.run_files import DEFAULT_NAME, state_path
from ..state.repair import repair as repair_folder


@click.command()
@click.option("--name", show_default=DEFAULT_NAME, help="The cluster whose default state folder to repair.")
@click.option(
    "--state-dir", type=click.Path(path_type=Path, file_okay=False), help="The folder, where `state_dir` names another."
)
def repair(name: str | None, state_dir: Path | None) -> None:
    """Rebuild the registry of a cluster that does not start because its registry is damaged. The cluster must be down.

    The epochs come from the record of what was committed (committed.json), the versions from their manifests; every
    version is checked against its sha256. Nothing is deleted: what is replaced is moved to quarantine/ in the folder. A
    registry that is whole is left as it is, so the command is also a check.

    \b
    Examples:
      expertmesh repair --name news
      expertmesh repair --state-dir /srv/mesh/state
    """
    if name is not None and state_dir is not None:
        raise click.UsageError("give --name or --state-dir, not both")
    folder = state_path(name or DEFAULT_NAME) if state_dir is None else state_dir
    for line in repair_folder(folder):
        click.echo(line)
