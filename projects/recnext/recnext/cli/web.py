"""Serve a page on which images are predicted: overlay, legend, timings, and the mask to download."""

import argparse

from .options import add_cfg_options, add_model, add_network_options, whole_number, with_deployment, with_weights


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    parser.add_argument('--images', nargs='+', default=[], metavar='FILE', help='images to choose from on the page')
    parser.add_argument('--host', default='127.0.0.1', help='address to listen on (default: this machine only)')
    parser.add_argument(
        '--port', type=whole_number(0), default=7860, metavar='N', help='default: 7860; 0 takes any that is free'
    )
    parser.add_argument(
        '--max-upload', type=whole_number(1), default=32, metavar='MB', help='largest file that is taken (default: 32)'
    )
    parser.add_argument(
        '--max-pixels',
        type=whole_number(1),
        default=64,
        metavar='N',
        help='largest image that is taken, in millions of pixels (default: 64)',
    )
    add_network_options(parser)
    add_cfg_options(parser)


def run(args: argparse.Namespace) -> None:
    from ..web.app import serve

    serve(**with_deployment(with_weights(args)))
