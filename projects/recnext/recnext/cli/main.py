"""Which commands there are, and how one is run: parsed, carried out, and a user's mistake said in a few lines."""

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from types import ModuleType

try:
    import shtab
except ModuleNotFoundError:  # nothing is completed then
    shtab = None

from ..utils.errors import START_AGAIN, StartAgain, UserError
from .options import WrongUse

COMMANDS = (
    'predict',
    'train',
    'test',
    'convert',
    'download',
    'push',
    'export',
    'report',
    'check-dataset',
    'web',
    'serve',
    'benchmark',
    'benchmark-training',
    'benchmark-export',
    'benchmark-gpu',
    'make-samples',
    'configs',
    'doctor',
)


def load_command(name: str) -> ModuleType:
    """The file of a command.

    Its docstring is the description; ``add_arguments(parser)`` adds what it takes; ``run(args)`` carries it out.
    """
    return import_module(f'.{name.replace("-", "_")}', __package__)


def build_parser() -> argparse.ArgumentParser:
    """The parser of ``recnext``, with one for each command in it."""
    parser = argparse.ArgumentParser(
        prog='recnext', description='RecNeXt with Semantic FPN: train, test, predict and ship it.'
    )
    if shtab:
        shtab.add_argument_to(parser, '--print-completion', help='print the completion script of a shell')
    commands = parser.add_subparsers(metavar='COMMAND', dest='command', required=True)
    for name in COMMANDS:
        command = load_command(name)
        own = commands.add_parser(name, description=command.__doc__, help=command.__doc__.split(':')[0].rstrip('.'))
        command.add_arguments(own)
        own.set_defaults(run=command.run, parser=own)
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """``recnext COMMAND ...``; exits as :func:`carry_out`."""
    args = build_parser().parse_args(arguments)
    del args.command
    vars(args).pop('print_completion', None)
    carry_out(args)


def run_tool(name: str, **preset: object) -> None:
    """One command alone, as a file of ``tools/`` has it.

    Args:
        name: Of the command.
        preset: What the file's name says already, for the command's ``add_arguments``.
    """
    command = load_command(name)
    parser = argparse.ArgumentParser(description=command.__doc__)
    command.add_arguments(parser, **preset)
    parser.set_defaults(run=command.run, parser=parser)
    carry_out(parser.parse_args())


def carry_out(args: argparse.Namespace) -> None:
    """Run a command.

    Exits with 0; with 1 and the message of a user's mistake; with 2 where arguments do not go together; with 75 where
    work was interrupted that goes on when it is started again; with 130 after Ctrl-C; with 141, as a shell has it, when
    what reads its output has ended. Other errors keep their traceback.
    """
    settings = vars(args)
    run, parser = settings.pop('run'), settings.pop('parser')
    try:
        run(args)
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more when it ends
        sys.exit(141)
    except WrongUse as error:
        parser.error(str(error))
    except StartAgain:
        sys.exit(START_AGAIN)  # the log of the work has said why
    except UserError as error:
        sys.exit(f'error: {error}')
    except KeyboardInterrupt:
        sys.exit(130)
