"""Predict images, folders and videos: label maps, areas of the classes, and pictures with a legend."""

import argparse
import re
from dataclasses import fields

from ..predict.shares import local_rank, parse_share, share_of_process
from ..utils.errors import WrongUse
from .options import (
    add_cfg_options,
    add_model,
    add_network_options,
    names_weights,
    whole_number,
    with_deployment,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    parser.add_argument(
        'inputs',
        metavar='INPUT',
        nargs='+',
        help='image, folder (all images in it, recursively), pattern such as "photos/**/*.jpg", or video',
    )
    parser.add_argument(
        '--out-dir',
        default='predicted',
        metavar='DIR',
        help='what is finished there is skipped: start again to go on (default: predicted)',
    )
    parser.add_argument(
        '--overlay',
        action=argparse.BooleanOptionalAction,
        default=True,
        help='draw the classes over the image, with a legend (default: on)',
    )
    add_network_options(parser)
    parser.add_argument(
        '--batch-size', type=whole_number(1), default=1, metavar='N', help='images in a batch (default: 1)'
    )
    parser.add_argument(
        '--share',
        type=parse_share,
        metavar='I/N',
        help='predict every N-th input from the I-th on, in an array of jobs; under torchrun and srun by itself',
    )
    add_cfg_options(parser)
    ray = parser.add_argument_group('on a cluster, with Ray')
    ray.add_argument(
        '--ray',
        nargs='?',
        const='local',
        type=ray_address,
        metavar='ADDRESS',
        help='predict on a Ray cluster: host:port, or auto; without ADDRESS, on one of its own on this machine. INPUT '
        'may then be addresses (s3://...), and .tar (WebDataset) or .parquet files with images in them',
    )
    ray.add_argument(
        '--write',
        choices=('files', 'parquet', 'webdataset'),
        help='how outputs are written; as shards, DIR may be an address (default: files)',
    )
    ray.add_argument(
        '--actors',
        type=whole_number(1),
        metavar='N',
        help='predict at most N times at once (default: as the CPUs or GPUs allow now; for a cluster that grows)',
    )
    ray.add_argument(
        '--gpu-share', type=gpu_share, metavar='SHARE', help='of a GPU, for each actor, such as 0.5 (default: 1)'
    )


def ray_address(text: str) -> str:
    """Type of the argument: a folder that stands there was meant for an input."""
    if text in ('auto', 'local') or re.fullmatch(r'[\w.-]+:\d+', text):
        return text
    raise argparse.ArgumentTypeError(f'expected host:port or auto, found {text!r}; inputs come before --ray')


def gpu_share(text: str) -> float:
    """Type of an argument that is a part of one."""
    if not re.fullmatch(r'0?\.\d+|1(\.0*)?', text) or float(text) == 0:
        raise argparse.ArgumentTypeError(f'expected a number above 0, up to 1, found {text!r}')
    return float(text)


def run(args: argparse.Namespace) -> None:
    if args.checkpoint and not names_weights(args.checkpoint):
        args.inputs.insert(0, args.checkpoint)
        args.checkpoint = None
    if not args.checkpoint and len(args.inputs) == 1 and names_weights(args.inputs[0]):
        raise WrongUse(f'no INPUT: {args.inputs[0]} are weights')
    of_ray = {name: args.__dict__.pop(name) for name in ('write', 'actors', 'gpu_share')}
    of_ray = {name: value for name, value in of_ray.items() if value is not None}
    address, share = args.__dict__.pop('ray'), args.__dict__.pop('share')
    if of_ray and not address:
        raise WrongUse(f'--{next(iter(of_ray)).replace("_", "-")} is for --ray')
    if address and share:
        raise WrongUse('--ray shares the inputs out by itself; --share is for arrays of jobs')
    if address:
        from ..predict.ray import RayOptions, predict_on_ray
        from ..runtimes.deployment import Deployment

        rest = vars(args)
        deployment = {field.name: rest.pop(field.name) for field in fields(Deployment)}
        inputs, out_dir = rest.pop('inputs'), rest.pop('out_dir')
        predict_on_ray(inputs, out_dir, RayOptions(**rest, **of_ray, deployment=deployment, address=address))
        return
    options = with_deployment(args)
    from ..predict.files import predict_files
    from ..predict.inputs import find_inputs
    from ..predict.model import load_deployed
    from ..utils.devices import find_device

    mine = share or share_of_process()
    inputs = find_inputs(options['inputs'], options['out_dir'])
    device = find_device(options['device'], local_rank())
    model = load_deployed(
        options['config'], options['checkpoint'], device, options['deployment'], options['cfg_options']
    )
    predict_files(model, inputs, options['out_dir'], options['overlay'], options['batch_size'], mine)
