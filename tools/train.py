"""Train a segmentor or a classifier."""

import argparse

from _cli import add_config_options, add_launcher_options, run


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', metavar='CONFIG', help='config file')
    parser.add_argument(
        '--resume',
        nargs='?',
        const='auto',
        metavar='CHECKPOINT',
        help='go on from this checkpoint, or from the newest of the work dir',
    )
    parser.add_argument('--amp', action='store_true', help='mixed precision in bfloat16')
    parser.add_argument(
        '--auto-scale-lr', action='store_true', help='scale the learning rate with the images an iteration'
    )
    parser.add_argument(
        '--channels-last', action='store_true', help='keep weights and activations in channels-last order'
    )
    parser.add_argument('--compile', action='store_true', help='torch.compile the network; slow to start')
    parser.add_argument('--tensorboard', action='store_true', help='write TensorBoard files as well')
    add_config_options(parser)
    add_launcher_options(parser)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    from projects.recnext.recnext.apis.train import train

    train(**vars(args))


if __name__ == '__main__':
    run(main)
