"""What several commands share: how a network is run, changes to a config, several processes."""

import argparse
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

try:
    from shtab import FILE
except ModuleNotFoundError:  # nothing is completed then
    FILE = None

from ..utils.errors import name_missing_extra

WEIGHTS = ('.pth', '.pt', '.ckpt', '.bin', '.safetensors')
"""How files of weights are called, where something else could stand in their place."""


class CfgOptions(argparse.Action):
    """mmengine's ``DictAction``, imported only when it is used: ``--help`` should not wait for it."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Sequence[str],
        option_string: str | None = None,
    ) -> None:
        try:
            from mmengine.config import DictAction
        except ModuleNotFoundError as error:
            parser.exit(1, f'error: {name_missing_extra(error)}\n')
        wrong = [value for value in values if '=' not in value]
        if wrong:
            parser.error(f'{option_string} takes key=value; found {" ".join(wrong)}')
        DictAction(self.option_strings, self.dest, nargs='+')(parser, namespace, values, option_string)


def whole_number(least: int) -> Callable[[str], int]:
    """Type of an argument that is a whole number of at least ``least``."""

    def parse(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f'expected a whole number of at least {least}, found {text!r}')
        return int(text)

    return parse


def add_config(parser: argparse.ArgumentParser, more: str = '') -> None:
    """The config; ``more`` is what else may stand in its place."""
    config = parser.add_argument(
        'config', metavar='CONFIG', help=f'config file, name of a config (recnext configs) or of a release{more}'
    )
    config.complete = FILE


def add_model(parser: argparse.ArgumentParser) -> None:
    """A trained network: a config with weights, or a release or a segmentor of the Hugging Face hub with its own."""
    add_config(parser, ', or hf://user/name[@revision]')
    checkpoint = parser.add_argument(
        'checkpoint',
        metavar='CHECKPOINT',
        nargs='?',
        help='weights, of this project or as released (0.x); default: those that CONFIG brings',
    )
    checkpoint.complete = FILE


def names_weights(argument: str) -> bool:
    """Return whether an argument can only mean a checkpoint: a path, or an address with or without a query."""
    path = urlsplit(argument).path if '://' in argument else argument
    return PurePosixPath(path).suffix in WEIGHTS


def with_weights(args: argparse.Namespace) -> argparse.Namespace:
    """The arguments, with the weights that CONFIG brings where none are named, and what is on the hub downloaded."""
    from ..checkpoints.folder import HUB

    own = args.checkpoint is None
    if own or args.config.startswith(HUB):
        from ..checkpoints.download import find_released_weights
        from ..checkpoints.folder import pull_segmentor, read_folder
        from ..utils.devices import AUTO, find_device

        find_device(getattr(args, 'device', AUTO))  # before anything is fetched
        if args.config.startswith(HUB):
            args.config = str(pull_segmentor(args.config, own))
        if own:
            folder = Path(args.config)
            args.checkpoint = str(read_folder(folder)[1] if folder.is_dir() else find_released_weights(args.config))
    return args


def add_config_options(parser: argparse.ArgumentParser) -> None:
    """The options that every tool with a config and its data has."""
    parser.add_argument('--work-dir', metavar='DIR', help='where logs go (default: work_dirs/<config>)')
    parser.add_argument('--data-root', metavar='DIR', help='folder that holds images/ and annotations/')
    add_cfg_options(parser)


def add_cfg_options(parser: argparse.ArgumentParser) -> None:
    """Changes to a config."""
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=CfgOptions,
        metavar='KEY=VALUE',
        help='change settings of the config, such as train_dataloader.batch_size=8',
    )


def add_launcher_options(parser: argparse.ArgumentParser) -> None:
    """The options that the launch scripts pass on."""
    parser.add_argument('--launcher', choices=('none', 'pytorch', 'slurm'), default='none', help='set by the scripts')


def add_fuse_option(parser: argparse.ArgumentParser) -> None:
    """What of a trained network is multiplied out."""
    parser.add_argument(
        '--fuse',
        choices=('none', 'norms', 'all'),
        default='all',
        help='fold nothing, the norms, or Semantic FPN as well (default: all)',
    )


def add_keep_float(parser: argparse._ActionsContainer) -> None:
    """What of a network is not rounded to 8 bits."""
    parser.add_argument(
        '--keep-float',
        nargs='+',
        metavar='PATTERN',
        help='int8: modules to leave in floating point, such as decode_head.conv_seg or '
        '"backbone.stages.*.token_mixer"',
    )


def add_network_options(parser: argparse.ArgumentParser) -> None:
    """How a trained network is run; the defaults are the fastest that give the same label maps as mmseg."""
    add_fuse_option(parser)
    parser.add_argument(
        '--precision',
        choices=('fp32', 'bf16', 'fp16', 'int8'),
        default='fp32',
        help='int8 is for --engine openvino, with --calibrate (default: fp32)',
    )
    parser.add_argument('--calibrate', metavar='FOLDER', help='int8: some hundred images like those to come')
    add_keep_float(parser)
    parser.add_argument(
        '--channels-last',
        action=argparse.BooleanOptionalAction,
        default=True,
        help='memory order of weights and activations (default: on)',
    )
    engine = parser.add_mutually_exclusive_group()
    engine.add_argument(
        '--engine',
        choices=('torch', 'compile', 'cudagraph', 'openvino', 'onnxruntime'),
        default='torch',
        help='what the network runs in: cudagraph for NVIDIA GPUs, openvino and onnxruntime for CPUs; all but torch '
        'and cudagraph are slow to start for the first time (default: torch)',
    )
    engine.add_argument(
        '--compile', dest='engine', action='store_const', const='compile', help='the same as --engine compile'
    )
    add_device(parser)


def with_deployment(args: argparse.Namespace) -> dict:
    """The arguments as a dict, with those of :func:`add_network_options` as one ``deployment``."""
    from ..runtimes.deployment import Deployment
    from ..utils.devices import keep_freed_memory

    keep_freed_memory()
    rest = vars(args)
    form = {field.name: rest.pop(field.name) for field in dataclasses.fields(Deployment)}
    return dict(rest, deployment=Deployment(**form))


def add_device(parser: argparse.ArgumentParser) -> None:
    """Where a network is run."""
    parser.add_argument(
        '--device',
        default='auto',
        metavar='DEVICE',
        help='cpu, cuda, cuda:1, mps, xpu, ... (default: the accelerator that is here, else the CPU)',
    )


def add_server_options(parser: argparse.ArgumentParser, port: int) -> None:
    """Where a server listens, and how large the images are that it takes."""
    parser.add_argument('--host', default='127.0.0.1', help='address to listen on (default: this machine only)')
    parser.add_argument(
        '--port', type=whole_number(0), default=port, metavar='N', help=f'default: {port}; 0 takes any that is free'
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


def add_benchmark_options(parser: argparse.ArgumentParser) -> None:
    """What both benchmarks have."""
    parser.add_argument('--rounds', type=whole_number(1), default=5, metavar='N', help='measurements (default: 5)')
    add_device(parser)
