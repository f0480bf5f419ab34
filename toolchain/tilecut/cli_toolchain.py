"""`tilecut toolchain`: the private environments that a target's compilers live in.

The module that makes them locks files as POSIX does, so it is imported by the commands alone.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated, Any

import typer
from rich.console import Console

from tilecut import show

app = typer.Typer(no_args_is_help=True, help="Install, list and remove the private environments of a target's compilers.")
out, err = Console(), Console(stderr=True)

Group = Annotated[str, typer.Argument(help='"ascend", or one of "ascend-kernels", "ascend-air"')]
AsJson = Annotated[bool, typer.Option("--json", help="print one JSON object, nothing else")]


@app.command()
def install(group: Group, as_json: AsJson = False) -> None:
    """Build a target's private environments with venv and pip, and check them; those that are there are checked."""
    from tilecut_targets.ascend import environments

    def tell(line: str) -> None:
        err.print(line, markup=False, highlight=False, soft_wrap=True)

    folders = [environments.install(name, tell) for name in environments.names_of(group)]
    _print([one for one in environments.installed() if one.folder in folders], as_json)


@app.command("list")
def list_(as_json: AsJson = False) -> None:
    """List the private environments that are installed."""
    from tilecut_targets.ascend import environments

    _print(environments.installed(), as_json)


@app.command()
def remove(group: Group, as_json: AsJson = False) -> None:
    """Delete a target's private environments, those of older versions too."""
    from tilecut_targets.ascend import environments

    freed = {name: environments.remove(name) for name in environments.names_of(group)}
    if as_json:
        print(json.dumps({"freed_bytes": freed}))
        return
    for name, count in freed.items():
        out.print(f"{name}: {count / 1e6:,.0f} MB freed" if count else f"{name}: not installed", highlight=False)


def _print(found: list[Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps({"toolchains": [{**asdict(one), "folder": str(one.folder)} for one in found]}))
    elif found:
        show.toolchains(out, found)
    else:
        out.print("no private environment is installed; `tilecut toolchain install ascend` builds those of ascend")
