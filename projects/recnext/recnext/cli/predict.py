"""Predict images, folders and videos: label maps, areas of the classes, and pictures with a legend."""

import argparse

from .options import (
    add_cfg_options,
    add_launcher_options,
    add_model,
    add_network_options,
    names_weights,
    whole_number,
    with_deployment,
    with_weights,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    parser.add_argument(
        'inputs',
        metavar='INPUT',
        nargs='+',
        help='image, folder (all images in it, recursively), pattern such as "photos/**/*.jpg", or video',
    )
    parser.add_argument(
        '--out-dir',
        default='predicted',
        metavar='DIR',
        help='what is finished there is skipped: start again to go on (default: predicted)',
    )
    parser.add_argument(
        '--overlay',
        action=argparse.BooleanOptionalAction,
        default=True,
        help='draw the classes over the image, with a legend (default: on)',
    )
    add_network_options(parser)
    parser.add_argument('--batch-size', type=whole_number(1), metavar='N', help='images in a batch (default: 1)')
    add_cfg_options(parser)
    add_launcher_options(parser)


def run(args: argparse.Namespace) -> None:
    from ..apis.batch_prediction import infer

    if args.checkpoint and not names_weights(args.checkpoint):
        args.inputs.insert(0, args.checkpoint)
        args.checkpoint = None
    infer(**with_deployment(with_weights(args)))
