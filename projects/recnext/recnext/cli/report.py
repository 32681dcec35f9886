"""Show what runs came to: curves, classes, confusion, images and config on one page, a single HTML file."""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        'work_dirs',
        metavar='WORK_DIR',
        nargs='+',
        help='of a run, or a JSON log of mmseg 0.x; the first is compared with each of the others',
    )
    parser.add_argument('--out', metavar='FILE', help='default: report.html in the first WORK_DIR')


def run(args: argparse.Namespace) -> None:
    from ..reports.html_report import write_report

    path = write_report(**vars(args))
    print(f'{path}: {path.stat().st_size / 1e6:.2f} MB, opens in any browser')
