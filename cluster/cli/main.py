"""The `expertmesh` command line: imports a command, runs it, and prints any error in one line."""

from __future__ import annotations

import errno
from collections.abc import Mapping
from typing import Any

import click

from ...experts.errors import ExpertMeshError
from ...experts.optional_imports import load
from ...experts.package_version import version

_COMMANDS: Mapping[str, tuple[str, str]] = {
    "demo": ("Train, serve and swap experts on real text.", "cluster,demo"),
    "examples": ("List the applications that can be run.", "cluster,examples"),
    "example": ("Run an application: compared with dense models, served, updated live.", "cluster,examples"),
    "serve": ("Start the cluster described by a YAML file; Ctrl-C stops it.", "cluster"),
    "status": ("Show layers, experts, versions and replicas of a running cluster.", "cluster"),
    "swap": ("Replace the weights of experts and gates under traffic.", "cluster"),
    "apply": ("Change a running cluster to what a YAML file declares; --dry-run prints the plan.", "cluster"),
    "add": ("Add an expert or layer of a YAML file to a running cluster, under traffic.", "cluster"),
    "remove": ("Remove an expert or layer of a running cluster, under traffic.", "cluster"),
    "scale": ("Give experts other numbers of replicas under traffic.", "cluster"),
    "train": ("Train the experts and the gate of a layer, here or in a running cluster.", "cluster"),
    "sessions": ("Show who trains which experts of a running cluster.", "cluster"),
    "rollback": ("Restore earlier versions of experts and gates.", "cluster"),
    "history": ("List the stored versions of an expert or gate.", "cluster"),
    "bench": ("Send load to a running cluster; report latency and throughput.", "cluster"),
    "down": ("Stop a cluster on this machine.", "cluster"),
    "repair": ("Rebuild the damaged registry of a stopped cluster.", "cluster"),
    "doctor": ("Check whether this machine can run a cluster.", "cluster"),
}
_MODULES = {
    "add": "changes.layers",
    "remove": "changes.layers",
    "apply": "changes.apply",
    "scale": "changes.scale",
    "train": "training.train",
    "sessions": "training.sessions",
    "demo": "applications.demo",
    "example": "applications.examples",
    "examples": "applications.examples",
    "history": "versions",
    "rollback": "versions",
}
"""The module of a command, where it has another name."""


class Commands(click.Group):
    """A group that imports a command when it is called, so that `status` does not import torch and ray."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The names of all commands."""
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import a command. Raises MissingExtra if one of its dependencies is not installed."""
        if cmd_name not in _COMMANDS:
            return None
        module = load(
            f"{__package__}.{_MODULES.get(cmd_name, cmd_name)}", f"`expertmesh {cmd_name}`", _COMMANDS[cmd_name][1]
        )
        command: click.Command = getattr(module, cmd_name)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, about) for name, (about, _) in _COMMANDS.items()])

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command. Prints an error in one line and exits with 1; with --debug the error propagates."""
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except Exception as error:  # the outermost frame: no caller is left to handle it
            if ctx.params["debug"] or (isinstance(error, OSError) and error.errno == errno.EPIPE):
                raise
            click.echo(f"error: {_message(error)}", err=True)
            ctx.exit(1)


def _message(error: Exception) -> str:
    if isinstance(error, ExpertMeshError):
        return str(error)
    return f"{type(error).__name__}: {error} (`expertmesh --debug ...` shows the traceback)"


@click.command(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(version(), prog_name="expertmesh")
@click.option("--debug", is_flag=True, help="Show the full traceback of an error.")
def cli(debug: bool) -> None:
    """Serve any set of experts as one live sparse layer, y = sum of w_i * f_i(x).

    \b
    See it work:            expertmesh demo
    Applications:           expertmesh examples
    Serve your own:         expertmesh serve mesh.yaml
    Look at it:             expertmesh status
    Measure it under load:  expertmesh bench mesh.yaml
    Replace an expert:      expertmesh swap news/e3=e3_v2.safetensors
    Train a layer:          expertmesh train train.yaml
    Call it from Python:    Client().forward("news", rows)

    `expertmesh COMMAND --help` shows the options and examples of a command.
    """
