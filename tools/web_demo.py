"""Serve a page on which images are predicted: overlay, legend, timings, and the mask to download."""

import argparse

from _cli import add_cfg_options, add_network_options, run, whole_number, with_deployment


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', metavar='CONFIG', help='config file, or name of a release such as recnext_m3_ade20k')
    parser.add_argument('checkpoint', metavar='CHECKPOINT', help='weights, of this project or as released (0.x)')
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
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    from projects.recnext.recnext.web.app import serve

    serve(**with_deployment(args))


if __name__ == '__main__':
    run(main)
