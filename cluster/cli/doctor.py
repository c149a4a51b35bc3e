"""`expertmesh doctor`: prints the checks of `machine/doctor.py`."""

from __future__ import annotations

from dataclasses import asdict

import click

from ..machine.doctor import PACKAGES, examine
from ..machine.facts import look
from .output import new_console, new_table, output_option, print_json


@click.command()
@click.option("--port", type=int, default=50051, show_default=True, help="Port that the cluster will listen on.")
@output_option
@click.pass_context
def doctor(context: click.Context, port: int, output: str) -> None:
    """Check whether this machine can run a cluster.

    Checks package versions, cores, memory, shared memory, GPUs, the port, your clusters (running or dead) and other Ray
    instances. Starts and changes nothing. Exits with 1 if a check fails.

    \b
    Examples:
      expertmesh doctor
      expertmesh doctor -o json | jq '.[] | select(.state != "ok")'
    """
    checks = examine(look(PACKAGES, port))
    if output == "json":
        print_json([asdict(check) for check in checks])
    else:
        rows = [(check.name, check.state, check.found, check.mend) for check in checks]
        new_console().print(new_table(None, ("check", "state", "found", "how to fix"), rows))
    if any(check.state == "fail" for check in checks):
        context.exit(1)
