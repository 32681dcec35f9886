"""Train a segmentor or a classifier."""

import argparse
from collections.abc import Sequence
from itertools import pairwise

from .options import add_config, add_config_options, add_launcher_options, whole_number


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config(parser)
    parser.add_argument(
        '--resume',
        nargs='?',
        const='auto',
        metavar='CHECKPOINT',
        help='go on from this checkpoint, or from the newest of the work dir',
    )
    parser.add_argument('--amp', action='store_true', help='mixed precision in bfloat16')
    parser.add_argument(
        '--auto-scale-lr', action='store_true', help='scale the learning rate with the number of images per iteration'
    )
    parser.add_argument(
        '--channels-last', action='store_true', help='keep weights and activations in channels-last order'
    )
    parser.add_argument('--compile', action='store_true', help='torch.compile the network; slow to start')
    parser.add_argument('--tensorboard', action='store_true', help='write TensorBoard files as well')
    parser.add_argument(
        '--wandb', nargs='?', const='', metavar='PROJECT', help='log to Weights & Biases (default: one named as CONFIG)'
    )
    parser.add_argument('--mlflow', metavar='URI', help='log to this MLflow server')
    parser.add_argument(
        '--total-batch-size',
        type=whole_number(1),
        metavar='N',
        help='images per iteration over all processes, however many there are',
    )
    parser.add_argument(
        '--store', metavar='URL', help='keep checkpoints in s3://..., gs://... and the like, where --resume finds them'
    )
    add_config_options(parser)
    add_launcher_options(parser)


def prepare(arguments: Sequence[str]) -> list[str]:
    """Take a config behind ``--resume`` for what it is: mmseg's option of that name takes no checkpoint."""
    bare = [
        number
        for number, (option, value) in enumerate(pairwise(arguments))
        if option == '--resume' and value.endswith('.py')
    ]
    return ['--resume=auto' if number in bare else argument for number, argument in enumerate(arguments)]


def run(args: argparse.Namespace) -> None:
    from ..openmmlab.train import TrainOptions, train

    config = vars(args).pop('config')
    train(config, TrainOptions(**vars(args)))
