"""The parser of `recnext` as the reference shows it: sphinx-argparse reads help texts as reStructuredText."""

import argparse

from projects.recnext.recnext.cli import main


def build_parser() -> argparse.ArgumentParser:
    """With what reStructuredText would take for markup escaped."""
    parser = main.build_parser()
    commands = next(action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    for command in (parser, *commands.choices.values()):
        for action in command._actions:
            if action.help:
                action.help = action.help.replace('*', r'\*')
    return parser
