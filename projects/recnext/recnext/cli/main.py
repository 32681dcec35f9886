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

from .. import __version__
from ..utils.errors import START_AGAIN, StartAgain, UserError, WrongUse, name_missing_extra

COMMANDS = {
    'predict': 'Predict images, folders and videos',
    'train': 'Train a segmentor or a classifier',
    'test': 'Test a segmentor (mIoU) or a classifier (top-1 and top-5), on request with label maps and pictures',
    'convert': 'Convert RecNeXt weights',
    'download': 'Download released checkpoints, checked',
    'push': 'Push a segmentor to the Hugging Face hub',
    'export': 'Export a checkpoint for another runtime, and check the file against PyTorch before it is written',
    'report': 'Show what runs came to',
    'check-dataset': 'Look at every file of a dataset before training',
    'web': 'Serve a page on which images are predicted',
    'serve': 'Serve predictions over HTTP',
    'benchmark': 'Test a model as mmseg or mmpretrain does and as this project does, alternately',
    'benchmark-training': 'Time a training iteration in full and mixed precision, channels last, compiled and '
    'distributed, alternately',
    'benchmark-export': 'Measure what fewer bits cost',
    'benchmark-gpu': 'Measure an accelerator in minutes',
    'make-samples': 'Make a small dataset of procedural scenes or objects, to try everything without a download',
    'configs': 'List the configs that come with this project, to be named without their path',
    'doctor': 'Say what a report of a bug should',
}
"""Each command, and the beginning of its file's docstring, so that a list of all imports none."""


def load_command(name: str) -> ModuleType:
    """Import the file of a command.

    Its docstring is the description; ``add_arguments(parser)`` adds what it takes; ``run(args)`` carries it out. A
    command whose options need it changes its arguments before they are parsed, in ``prepare(arguments)``.
    """
    return import_module(f'.{name.replace("-", "_")}', __package__)


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of ``recnext`` with one for each command in it, for completion and the reference."""
    parser = _main_parser()
    commands = parser.add_subparsers(metavar='COMMAND', dest='command', required=True)
    for name, sentence in COMMANDS.items():
        command = load_command(name)
        own = commands.add_parser(name, description=command.__doc__, help=sentence, allow_abbrev=False)
        command.add_arguments(own)
    return parser


def _main_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog='recnext', description='RecNeXt with Semantic FPN: train, test, predict and ship it.', allow_abbrev=False
    )
    parser.add_argument('--version', action='version', version=f'recnext {__version__}')
    if shtab:
        shtab.add_argument_to(parser, '--print-completion', help='print the completion script of a shell')
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """``recnext COMMAND ...``; exits as :func:`carry_out`."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if arguments and arguments[0] in COMMANDS:
        carry_out(parse_command(arguments[0], arguments[1:], f'recnext {arguments[0]}'))
    elif any(argument.startswith('--print-completion') for argument in arguments):
        build_parser().parse_args(arguments)  # prints and exits
    else:
        parser = _main_parser()
        parser.usage = '%(prog)s [-h] [--version] COMMAND ...'
        listed = parser.add_argument_group('commands')
        for name, sentence in COMMANDS.items():
            listed.add_argument(name, nargs='?', help=sentence)
        parser.parse_args([argument for argument in arguments if argument.startswith('-')])
        parser.error(f'expected a COMMAND, found {" ".join(arguments) or "none"}; recnext --help lists them')


def run_tool(name: str, **preset: object) -> None:
    """Run one command alone, as a file of ``tools/`` has it.

    Args:
        name: Of the command.
        preset: What the file's name says already, for the command's ``add_arguments``.
    """
    carry_out(parse_command(name, sys.argv[1:], **preset))


def parse_command(name: str, arguments: Sequence[str], prog: str | None = None, **preset: object) -> argparse.Namespace:
    """Parse the arguments of a command, options and positionals in any order; no other command is imported.

    Args:
        name: One of :data:`COMMANDS`.
        arguments: What follows it on the command line.
        prog: The program's name, for its help; None means the name of the file that was started.
        preset: See :func:`run_tool`.
    """
    command = load_command(name)
    parser = argparse.ArgumentParser(prog=prog, description=command.__doc__, allow_abbrev=False)
    command.add_arguments(parser, **preset)
    parser.set_defaults(run=command.run, parser=parser)
    return parser.parse_intermixed_args(getattr(command, 'prepare', list)(arguments))


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
    except ModuleNotFoundError as error:
        if (advice := name_missing_extra(error)) is None:
            raise
        sys.exit(f'error: {advice}')
    except KeyboardInterrupt:
        sys.exit(130)
