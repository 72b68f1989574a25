"""What all commands of `rfaas` have in common: options, help, how one ends."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from rfaas_mpi.cli import output
from rfaas_mpi.cli.output import Output

__all__ = ["WIDTH", "Finished", "Ordered", "common", "examples", "flag"]

WIDTH = {"max_content_width": 80, "help_option_names": ["-h", "--help"]}


def flag(name: str) -> Callable[[click.Context, click.Parameter, bool], None]:
    """A click callback that notes an option on the command's Output."""
    def callback(context: click.Context, _parameter: click.Parameter, value: bool) -> None:
        if value:
            setattr(context.ensure_object(Output), name, True)
    return callback


def common(command: Callable[..., Any]) -> Callable[..., Any]:
    """--json and --debug, which every command has."""
    command = click.option("--debug", is_flag=True, expose_value=False, is_eager=True, callback=flag("debug"),
                           help="Show the traceback of an error.")(command)
    return click.option("--json", is_flag=True, expose_value=False, is_eager=True, callback=flag("json"),
                        help="Answer with one JSON object on stdout.")(command)


def examples(*lines: str) -> str:
    """The end of a command's help."""
    return "\b\nExample:\n" + "\n".join(f"  {line}" for line in lines)


class Ordered(click.Group):
    """Lists its commands in the order in which a newcomer needs them; alone it shows its help, on stderr."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options, invoke_without_command=True)

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)

    def invoke(self, ctx: click.Context) -> Any:
        if not ctx.args and not getattr(ctx, "_protected_args", ()):
            click.echo(ctx.get_help(), err=True)
            raise Finished(output.USAGE)
        return super().invoke(ctx)


class Finished(Exception):
    """The command has answered and ends with a status that is not 0."""

    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status
