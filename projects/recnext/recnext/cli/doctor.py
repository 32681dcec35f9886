"""Say what a report of a bug should: versions, accelerators, and what is missing for which feature."""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """None."""


def run(args: argparse.Namespace) -> None:
    from .environment import describe_environment

    for line in describe_environment():
        print(line, flush=True)
