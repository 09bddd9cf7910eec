"""The verbs on the command line: parse, one call, print, exit.

Exit codes: 0 done, 1 `verify` found a difference, 2 invalid input (one line on standard error, nothing written), 130
interrupted by Ctrl-C, 143 by SIGTERM.
"""

from __future__ import annotations

import re
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from typing import Annotated, Any

import typer

from sparsight.checks import need_packages
from sparsight.cli.commands import COMMANDS, LazyHelp, make, verb_parameters
from sparsight.cli.flags import with_flags
from sparsight.cli.output import launched_rank, show
from sparsight.cli.progress import progress_display
from sparsight.errors import Interrupted, Notice, SparsightError
from sparsight.options import options
from sparsight.signals import listening, was_terminated
from sparsight.specs import PruneSpec
from sparsight.version import VERSION

PATIENCE = 5.0  # seconds before another process than the main one prints its own error

app = typer.Typer(
    name="sparsight",
    help="Sparse vision-language models that still work: plan, prune, restore, evaluate, verify, compare.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

# typer has carried its own copy of click since 0.27, so click's own class need not be the one that is raised
_USAGE: Any = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        print(VERSION)
        raise typer.Exit


for name, command in COMMANDS.items():
    app.command(name, cls=LazyHelp)(make(name, command))


@app.command(cls=LazyHelp)
def demo(
    out: Annotated[str, typer.Argument(help="Folder for the models and the report.")] = "demo-out",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the folder of an earlier demo.")] = False,
    seed: Annotated[int, typer.Option(help=options(PruneSpec)["seed"][1].help)] = 0,
    quiet: Annotated[bool, typer.Option("--quiet", help="Show no progress.")] = False,
) -> None:
    """Prune the embedded model at 2:4, restore it, verify it and write a report; no network."""
    need_packages("the demo", "demo", sklearn="scikit-learn", matplotlib="matplotlib")
    from sparsight.cli.demo import demo_tables
    from sparsight.demo.tour import tour

    with progress_display("demo", quiet) as progress:
        facts = tour(out, overwrite=overwrite, seed=seed, progress=progress)
    show(facts, False, *demo_tables(facts))


def main() -> None:
    """Run the command line; every foreseen error is one line on standard error.

    Of several processes the main one prints the error. The launcher then ends the others; another process prints its own
    error only if it is still running after `PATIENCE`.
    """
    warnings.showwarning = partial(_show_warning, warnings.showwarning)
    code: Any = 0
    with listening(_stop, ends=True) as stops:
        try:
            try:
                code = app(standalone_mode=False) or 0
                if code == 130 and stops.stop:  # typer turns Ctrl-C into a code of its own, without a line
                    code = _interrupted(stops.stop)
            except SparsightError as error:
                code = _fail(str(error), 2)
            except (Interrupted, KeyboardInterrupt, typer.Abort) as stop:
                code = _interrupted(stop)
            except _USAGE as error:
                code = _fail(_usage_line(error), 2)
            except PermissionError as error:
                code = _fail(f"{error.filename}: {error.strerror}; give a file or folder that this user may use", 2)
            except Exception:
                if launched_rank():
                    time.sleep(PATIENCE)
                raise
        except BaseException as error:
            if stops.stop is None:
                raise
            code = _interrupted(error)  # the signal came while another error, often its own consequence, was handled
    sys.exit(code if isinstance(code, int) else 0)


def _usage_line(error: Any) -> str:
    """The line of wrong usage: of an argument that is missing what it is, and of a command that there is not the others."""
    line = error.format_message()
    context, argument = getattr(error, "ctx", None), getattr(error, "param", None)
    if line.startswith("No such command") and line.endswith("."):  # without a name that is like it
        return f"{line.rstrip('.')}; give one of {', '.join((*COMMANDS, 'demo'))}"
    if context is None or argument is None or not line.startswith("Missing argument"):
        return line
    name = context.info_name
    known = verb_parameters(COMMANDS[name].verb) if name in COMMANDS else []  # some versions of typer lose the help
    texts = [parameter.default.help for parameter in known if parameter.name == argument.name]
    what = re.split(r"[;:.] ", texts[0] if texts else "a value")[0].rstrip(".")
    what = what if what[1:2].isupper() else what[:1].lower() + what[1:]
    return f"{name}: {argument.name} is missing ({what}); see sparsight {name} --help"


def _stop(stop: KeyboardInterrupt) -> None:
    raise stop


def _interrupted(stop: BaseException) -> int:
    """Print the line of interrupted work, in the main process only, since all were stopped; return the exit code."""
    if not launched_rank():
        _fail(str(stop) if isinstance(stop, Interrupted) else "interrupted; no output was written", 130)
    return 143 if was_terminated(stop) else 130


def _show_warning(otherwise: Callable, message: Any, category: Any, *where: Any, **more: Any) -> None:
    """Print a notice, and the warning about a renamed field, as one line; any other warning as usual."""
    if issubclass(category, Notice) or (issubclass(category, FutureWarning) and "is the old name of" in str(message)):
        print(f"sparsight: {with_flags(str(message))}", file=sys.stderr)
    else:
        otherwise(message, category, *where, **more)


def _fail(line: str, code: int) -> int:
    where = launched_rank()
    if where:
        time.sleep(PATIENCE)
    print(f"sparsight: {f'process {where}: ' if where else ''}{with_flags(' '.join(line.split()))}", file=sys.stderr)
    return code
