"""Serve a page on which images are predicted: overlay, legend, timings, and the mask to download."""

import argparse

from .options import (
    add_cfg_options,
    add_model,
    add_network_options,
    add_server_options,
    with_deployment,
    with_weights,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    parser.add_argument('--images', nargs='+', default=[], metavar='FILE', help='images to choose from on the page')
    add_server_options(parser, port=7860)
    add_network_options(parser)
    add_cfg_options(parser)


def run(args: argparse.Namespace) -> None:
    from ..web.app import serve

    serve(**with_deployment(with_weights(args)))
