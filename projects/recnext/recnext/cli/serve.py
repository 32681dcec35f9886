"""Serve predictions over HTTP: an image in, its label map, areas or overlay out."""

import argparse

from .options import (
    add_cfg_options,
    add_model,
    add_network_options,
    add_server_options,
    whole_number,
    with_deployment,
    with_weights,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    add_server_options(parser, port=8000)
    parser.add_argument(
        '--batch-size',
        type=whole_number(1),
        default=8,
        metavar='N',
        help='predict up to N waiting images together (default: 8)',
    )
    parser.add_argument(
        '--queue',
        type=whole_number(1),
        default=64,
        metavar='N',
        help='requests accepted at once; further ones are told to try again later (default: 64)',
    )
    add_network_options(parser)
    add_cfg_options(parser)


def run(args: argparse.Namespace) -> None:
    from ..serving.service import serve

    serve(**with_deployment(with_weights(args)))
