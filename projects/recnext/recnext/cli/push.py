"""Push a segmentor to the Hugging Face hub: weights, config, classes, and a model card with its provenance."""

import argparse

from .options import FILE, add_config


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = 'Log in with hf auth login, or set HF_TOKEN. HF_ENDPOINT names another hub.'
    add_config(parser)
    checkpoint = parser.add_argument(
        'checkpoint', metavar='CHECKPOINT', help='weights, of this project or as released (0.x)'
    )
    checkpoint.complete = FILE
    parser.add_argument('repository', metavar='USER/NAME', help='on the hub; created if it is not there')
    parser.add_argument('--metrics', metavar='WORK_DIR', help='of a test of CHECKPOINT, whose figures go on the card')
    parser.add_argument(
        '--license', default='apache-2.0', metavar='ID', help='of the weights (default: apache-2.0, as released)'
    )
    parser.add_argument('--private', action='store_true', help='make a new repository private')


def run(args: argparse.Namespace) -> None:
    from ..predict.push import push

    print(push(**vars(args)))
