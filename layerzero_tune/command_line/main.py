"""The application: its commands, and what an error looks like."""

from __future__ import annotations

import sys

import typer

from layerzero_runtime.errors import LayerZeroError
from layerzero_tune.command_line.compile import compile_command
from layerzero_tune.command_line.diff import diff_command
from layerzero_tune.command_line.evaluate import evaluate_command
from layerzero_tune.command_line.explain import explain_command
from layerzero_tune.command_line.inspect import doctor_command, kernels_command
from layerzero_tune.command_line.merge import merge_command
from layerzero_tune.command_line.output import notes
from layerzero_tune.command_line.run import run_command
from layerzero_tune.command_line.wheel import wheel_command
from layerzero_tune.command_line.workload import workload_app

INTERRUPTED = 130  # 128 + SIGINT, as shells report it

app = typer.Typer(
    name="layerzero-tune",
    help="Measure kernels on this device, compile the decisions into a table, and see how good it is.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("doctor")(doctor_command)
app.command("kernels")(kernels_command)
app.command("run")(run_command)
app.command("compile")(compile_command)
app.command("evaluate")(evaluate_command)
app.command("merge")(merge_command)
app.command("wheel")(wheel_command)
app.command("diff")(diff_command)
app.command("explain")(explain_command)
app.add_typer(workload_app, name="workload")


def main() -> None:
    """Run the command line; an error that LayerZero raises is one message and exit status 1, Ctrl-C is 130."""
    try:
        app(standalone_mode=True)
    except LayerZeroError as error:
        notes.print(f"error: {error}", style="red", soft_wrap=True)
        sys.exit(1)
    except SystemExit as end:
        if end.code == INTERRUPTED:  # what typer makes of Ctrl-C
            notes.print("interrupted; finished contests are kept, the same command continues", soft_wrap=True)
        raise
