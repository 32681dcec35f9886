"""Push a segmentor to the Hugging Face hub: weights, description, and a model card with its provenance."""

import argparse

from .options import add_model


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = 'Log in with hf auth login, or set HF_TOKEN. HF_ENDPOINT names another hub.'
    add_model(parser)
    parser.add_argument('repository', metavar='USER/NAME', help='on the hub; created if it is not there')
    parser.add_argument('--metrics', metavar='WORK_DIR', help='of a test of CHECKPOINT, whose figures go on the card')
    parser.add_argument(
        '--license', default='apache-2.0', metavar='ID', help='of the weights (default: apache-2.0, as released)'
    )
    parser.add_argument('--private', action='store_true', help='make a new repository private')


def run(args: argparse.Namespace) -> None:
    from pathlib import Path

    from ..predict.model import load_deployed
    from ..predict.push import push_model, read_figures
    from ..runtimes.deployment import Deployment
    from ..utils.paths import command

    model = load_deployed(args.config, args.checkpoint, 'cpu', Deployment(fuse='none', channels_last=False))
    metrics = read_figures(Path(args.metrics), model.provenance['sha256']) if args.metrics else None
    print(push_model(model, args.repository, args.license, args.private, metrics))
    print(f'Try it: {command("predict", f"hf://{args.repository}", "photo.jpg")}')
