"""The verbs on the command line: parse, one call, print, exit.

Exit codes: 0 done, 1 `verify` found a difference, 2 something given was wrong (one line on standard error, nothing
written), 130 interrupted.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Annotated, Any

import typer

import sparsight
from sparsight.commands import many, one
from sparsight.commands.output import place
from sparsight.errors import Interrupted, SparsightError

PATIENCE = 5.0  # seconds that the other processes give the main one to speak, and the launcher to end them

app = typer.Typer(
    name="sparsight",
    help="Sparse vision-language models that still work: plan, prune, restore, evaluate, verify, compare.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

# typer has carried its own copy of click since 0.27, so click's own class need not be the one that is raised
_USAGE: Any = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        print(sparsight.__version__)
        raise typer.Exit


COMMANDS: dict[str, Callable[..., None]] = {
    "inspect": one.inspect, "plan": one.plan, "prune": one.prune, "restore": one.restore, "eval": one.evaluate,
    "verify": one.verify, "run": many.run, "sweep": many.sweep, "search": many.search, "report": many.report,
    "demo": many.demo,
}  # fmt: skip
for name, command in COMMANDS.items():
    app.command(name)(command)


def main() -> None:
    """Run the command line; every foreseen error is one line on standard error.

    The launcher of several processes ends them all when one fails. What goes wrong in all is said by the main one, and
    what follows from another's end by nobody: the others wait for theirs, and speak up only if it does not come.
    """
    code = 0
    try:
        code = app(standalone_mode=False) or 0
    except SparsightError as error:
        code = _fail(str(error), 2)
    except Interrupted as stop:
        code = _fail(str(stop), 130)
    except (KeyboardInterrupt, typer.Abort):
        code = _fail("interrupted; nothing was written", 130)
    except _USAGE as error:
        code = _fail(error.format_message(), 2)
    except Exception:
        if place():
            time.sleep(PATIENCE)
        raise
    sys.exit(code if isinstance(code, int) else 0)


def _fail(line: str, code: int) -> int:
    where = place()
    if where and code == 130:  # all were interrupted
        return code
    if where:
        time.sleep(PATIENCE)
    print(f"sparsight: {f'process {where}: ' if where else ''}{' '.join(line.split())}", file=sys.stderr)
    return code
