"""Test a model as mmseg or mmpretrain does and as this project does, alternately: speed by stage, memory, agreement."""

import argparse

from .options import add_benchmark_options, add_config, add_config_options, whole_number


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config(parser)
    parser.add_argument('checkpoint', metavar='CHECKPOINT', nargs='?', help='weights (default: random ones)')
    parser.add_argument('--images', type=whole_number(1), default=20, metavar='N', help='at most (default: 20)')
    parser.add_argument(
        '--copies-at',
        type=whole_number(1),
        nargs=2,
        metavar=('H', 'W'),
        help='test copies of the images in this original size',
    )
    parser.add_argument('--sweep', action='store_true', help='measure the label maps over sizes and classes as well')
    engines = parser.add_mutually_exclusive_group()
    engines.add_argument(
        '--engines',
        nargs='+',
        choices=('compile', 'openvino', 'onnxruntime'),
        default=[],
        help='measure these engines as well; slow to start for the first time',
    )
    engines.add_argument(
        '--compile', dest='engines', action='store_const', const=['compile'], help='the same as --engines compile'
    )
    parser.add_argument(
        '--calibrate', metavar='FOLDER', help='measure OpenVINO in int8 as well, calibrated on these images'
    )
    add_benchmark_options(parser)
    add_config_options(parser)


def run(args: argparse.Namespace) -> None:
    from ..benchmarks.testing import benchmark

    benchmark(**vars(args))
