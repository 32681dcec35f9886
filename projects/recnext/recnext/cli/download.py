"""Download released checkpoints, checked: segmentors in mmseg 1.x form, ImageNet weights as released."""

import argparse

from ..utils.errors import WrongUse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = 'checkpoints/README.md lists the names. A transfer that was cut begins again.'
    parser.add_argument('names', nargs='*', metavar='NAME', help='such as recnext_m3_ade20k')
    parser.add_argument('--all', action='store_true', dest='every', help='all of them')
    parser.add_argument(
        '--dir', dest='folder', metavar='DIR', help="where to put them (default: the project's checkpoints)"
    )
    parser.add_argument(
        '--base-url', metavar='URL', help='mirror of the release page, or a folder that holds the released files'
    )


def run(args: argparse.Namespace) -> None:
    if args.every == bool(args.names):
        raise WrongUse('expected either NAME or --all')
    from ..checkpoints.download import download_checkpoints

    for line in download_checkpoints(**vars(args)):
        print(line, flush=True)
