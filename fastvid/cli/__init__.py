"""The command line. It is parsed before torch is imported, so that help and typing errors answer at once."""

import os
import sys
from dataclasses import dataclass
from typing import Annotated

import tyro
from tyro.conf import OmitSubcommandPrefixes, subcommand

from fastvid import __version__
from fastvid.cli.data import Data, Weights
from fastvid.cli.train import Assemble, Train
from fastvid.cli.use import Evaluate, Predict, Sample
from fastvid.errors import FastvidError

USAGE, INTERRUPTED, UNREAD = 2, 130, 141  # exit codes


@dataclass(frozen=True)
class Models:
    """List the models that come with fastvid."""

    def run(self) -> None:
        """Print a name a line. Raises nothing."""
        from fastvid.models import list_models

        print("\n".join(list_models()) or "none")


@dataclass(frozen=True)
class Doctor:
    """Say what was found: versions, libraries, GPUs, and for every op which backend serves and why others do not."""

    def run(self) -> None:
        """Print the findings. Raises nothing."""
        from fastvid.doctor import findings

        print("\n".join(findings()))


@dataclass(frozen=True)
class Selftest:
    """Check on this machine that every backend of every op does its job; takes less than a minute."""

    def run(self) -> int:
        """Print a line per op and backend. Returns 1 if one fails. Raises nothing."""
        from fastvid.selftest import selftest

        return selftest()


Command = (
    Annotated[Predict, subcommand("predict")]
    | Annotated[Sample, subcommand("sample")]
    | Annotated[Train, subcommand("train")]
    | Annotated[Assemble, subcommand("assemble")]
    | Annotated[Evaluate, subcommand("evaluate")]
    | Annotated[Data, subcommand("data")]
    | Annotated[Weights, subcommand("weights")]
    | Annotated[Models, subcommand("models")]
    | Annotated[Doctor, subcommand("doctor")]
    | Annotated[Selftest, subcommand("selftest")]
)


def main(arguments: list[str] | None = None) -> int:
    """Run one command.

    arguments: what follows `fastvid`; None takes the process's own.
    Returns:   0, 1 if a self-test fails, 2 for an error that the user can mend (one line on stderr), 130 after
               Ctrl-C, 141 where nobody reads the output any more, as behind `head`.
    Raises:    SystemExit for help and for arguments that do not parse (code 2); with FASTVID_TRACEBACK=1 the error
               itself.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments == ["--version"]:
        print(f"fastvid {__version__}")
        return 0
    try:
        command = tyro.cli(
            Command, prog="fastvid", args=arguments, description="Fast latent video models.",
            config=(OmitSubcommandPrefixes, tyro.conf.FlagCreatePairsOff),
        )
        return command.run() or 0
    except FastvidError as error:
        if os.environ.get("FASTVID_TRACEBACK") == "1":
            raise
        print(f"fastvid: {' '.join(str(error).splitlines())}", file=sys.stderr)
        return USAGE
    except KeyboardInterrupt:
        if os.environ.get("FASTVID_TRACEBACK") == "1":
            raise
        print("fastvid: interrupted.", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # who read our output has gone, as `head` does; the interpreter's own flush at exit must not complain either
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return UNREAD
