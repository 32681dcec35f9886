"""Predict images, folders and videos: label maps, areas of the classes, and pictures with a legend."""

import argparse

from _cli import add_cfg_options, add_launcher_options, add_network_options, run, whole_number, with_deployment


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', metavar='CONFIG', help='config file, or name of a release such as recnext_m3_ade20k')
    parser.add_argument('checkpoint', metavar='CHECKPOINT', help='weights, of this project or as released (0.x)')
    parser.add_argument(
        'inputs',
        metavar='INPUT',
        nargs='+',
        help='image, folder (all images in it, recursively), pattern such as "photos/**/*.jpg", or video',
    )
    parser.add_argument(
        '--out-dir', required=True, metavar='DIR', help='what is finished there is skipped: start again to go on'
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
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    from projects.recnext.recnext.apis.batch_prediction import infer

    infer(**with_deployment(args))


if __name__ == '__main__':
    run(main)
