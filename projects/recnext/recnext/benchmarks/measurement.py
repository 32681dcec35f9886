"""Whole models, mmseg's or mmpretrain's own and this project's, measured alternately on the same images in one run."""

import contextlib
import multiprocessing
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import cv2
import numpy as np
import torch
from mmengine.config import Config
from mmengine.evaluator import BaseMetric
from mmengine.logging import MMLogger
from mmengine.registry import DATASETS, init_default_scope
from mmengine.structures import BaseDataElement
from mmengine.utils import import_modules_from_strings
from mmseg.evaluation import IoUMetric
from mmseg.models import EncoderDecoder
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ..checkpoints.files import read_checkpoint
from ..openmmlab.builder import build_without_weights
from ..openmmlab.config import is_segmentor
from ..openmmlab.deployable import DeployableModel
from ..openmmlab.segmentor import FastEncoderDecoder
from ..runtimes.deployment import Deployment, deploy
from ..utils.devices import keep_freed_memory, lacks_half_precision
from ..utils.errors import UserError
from ..utils.memory import can_tell_peak, peak_memory, reset_peak
from ..utils.timing import Stopwatch

NETWORK = ('backbone', 'neck', 'head')

STAGES = ('load', 'prepare', *NETWORK, 'engine', 'labels', 'metric', 'rest')
"""Where the time of an image goes.

``prepare``: to the device, and normalised; ``engine``: the network, where its parts cannot be told apart;
``labels``: from the head's logits to the labels; ``rest``: such as labels back to the CPU.
"""

STOCK = 'mmseg'
FAST = 'ours'
"""The two between which the ratios are; the others are variations of the second. For classifiers the first is
:data:`STOCK_CLASSIFIER`."""

STOCK_CLASSIFIER = 'mmpretrain'

WARMUP = 1
MEMORY_IMAGES = 3
"""Images for which peak memory is measured."""

PEAK_SIZE = 1536
"""Rows and columns of the matrices whose product tells how fast the machine can be."""


def contenders(
    device: torch.device, engines: Sequence[str] = (), calibrate: str | None = None, stock: str = STOCK
) -> dict[str, Deployment | None]:
    """Names and forms to run the network in; mmseg's own is none of ours.

    Args:
        device: Where it runs. Without instructions for 16 bits, it runs in 32 alone.
        engines: To be measured as well, in each precision of floating point that they have here.
        calibrate: Folder of images with which OpenVINO computes in 8 bits, too.
        stock: What the others are compared with.

    Raises:
        UserError: one of them cannot run here.
    """
    ways = {
        stock: None,
        FAST: Deployment(),
        'ours, norms only': Deployment('norms'),
    }
    half = not lacks_half_precision(device)
    if half:
        ways['ours, bf16'] = Deployment('all', 'bf16')
        ways['ours, bf16, norms only'] = Deployment('norms', 'bf16')
    for engine in engines:
        ways[engine] = Deployment(engine=engine)
        if half:
            with contextlib.suppress(UserError):  # ONNX Runtime has none
                ways[f'{engine}, bf16'] = Deployment(precision='bf16', engine=engine)
    if calibrate:
        ways['openvino, int8'] = Deployment(precision='int8', engine='openvino', calibrate=calibrate)
    return ways


def build_contender(cfg: Config, weights: dict[str, Tensor], way: Deployment | None, device: torch.device) -> nn.Module:
    """The model of a config, as mmseg or mmpretrain has it or as ours.

    Args:
        cfg: With a ``model`` of a type that derives from :class:`.DeployableModel`.
        weights: Under the names of that model.
        way: None for theirs, or as in :func:`contenders`.
        device: Where it runs.
    """
    theirs = dict(type='EncoderDecoder' if is_segmentor(cfg) else 'ImageClassifier')
    model = build_without_weights(cfg.model, **({} if way else theirs))
    model.load_state_dict(weights)
    model.to(device).eval()
    if way:
        keep_freed_memory()  # as the tools do
        deploy(model, way)
    return model


def initial_weights(cfg: Config, checkpoint: str | None) -> dict[str, Tensor]:
    """Of a checkpoint that fits the config, or random ones."""
    torch.manual_seed(0)
    model = build_without_weights(cfg.model)
    if checkpoint:
        return model.adapt_state_dict(read_checkpoint(checkpoint))
    model.init_weights()
    return model.state_dict()


def parts(model: nn.Module) -> dict[str, nn.Module]:
    """The parts of the network by name, as in :data:`NETWORK`; a neck need not be there."""
    if isinstance(model, EncoderDecoder):
        return FastEncoderDecoder.parts(model)
    return {name: getattr(model, name) for name in NETWORK}


def watch(model: nn.Module, stopwatch: Stopwatch, whole: bool) -> None:
    """Count the parts of a model; where they cannot be told apart, the whole network.

    It is the forward methods that are counted, as mmseg's heads call their own past the hooks.
    """
    if whole:
        model.forward_logits = stopwatch.timed('engine', model.forward_logits)
    else:
        for name, part in parts(model).items():
            part.forward = stopwatch.timed(name, part.forward)
    model.predict = stopwatch.timed('predict', model.predict)
    model.test_step = stopwatch.timed('step', model.test_step)


def measure(
    cfg: Config,
    weights: dict[str, Tensor],
    images: int,
    rounds: int,
    ways: dict[str, Deployment | None],
    device: torch.device,
) -> dict:
    """Test the first images of the config's test set with every contender in turn, several times over.

    Each contender has a process of its own, which waits while the others work.

    Returns:
        For each contender: ``images_per_second``, end to end; ``milliseconds`` an image by stage, medians over the
        rounds, averaged over the images; ``different_pixels`` of all ``pixels`` against mmseg; ``mIoU``; ``memory_mb``,
        the peak of the network alone and what prediction adds to it; ``process_mb``, the peak of the whole process when
        it tests (Linux) or of the accelerator's allocator; ``start_seconds`` from weights in memory to the first
        logits, in which an engine converts the network or finds it in its cache; ``logit_error``, root mean square
        over that of mmseg's logits, for the first image; ``gflop`` and ``parameters`` by part. For classifiers,
        with mmpretrain for mmseg, ``top1`` for ``mIoU``, and ``different_images`` of all ``images``.

    Raises:
        UserError: a contender's process died.
    """
    context = multiprocessing.get_context('spawn')
    processes, connections, results, stock = [], {}, {}, None
    counted = 'pixels' if is_segmentor(cfg) else 'images'

    def hear(name: str) -> Any:  # noqa: ANN401  (whatever the process sends)
        try:
            return connections[name].recv()
        except EOFError:
            raise UserError(f'The process of {name!r} ended; its own message stands above.') from None

    try:
        for name, way in ways.items():
            connections[name], theirs = context.Pipe()
            args = (theirs, cfg.to_dict(), weights, way, images, str(device))
            processes.append(context.Process(target=_compete, args=args, daemon=True))
            processes[-1].start()
            theirs.close()  # or the end of the process would not be heard
            results[name], labels, logits = hear(name)
            stock = stock or (labels, logits)
            results[name][f'different_{counted}'] = sum(int((a != b).sum()) for a, b in zip(labels, stock[0]))
            results[name][counted] = sum(a.size for a in labels)
            results[name]['logit_error'] = float(np.linalg.norm(logits - stock[1]) / np.linalg.norm(stock[1]))
        readings = {name: [] for name in connections}
        for _ in range(WARMUP + rounds):
            for name, connection in connections.items():
                connection.send(True)
                readings[name].append(hear(name))
    finally:
        for process in processes:
            process.terminate()
            process.join()
    for name, result in results.items():
        of_images = list(zip(*readings[name][WARMUP:]))
        result['milliseconds'] = {
            stage: sum(median(r.get(stage, 0) for r in of_image) for of_image in of_images) * 1e3 / len(of_images)
            for stage in ('image', *STAGES)
        }
        result['images_per_second'] = 1e3 / result['milliseconds'].pop('image')
    return results


@torch.no_grad()
def _compete(
    connection: Connection, cfg: dict, weights: dict[str, Tensor], way: Deployment | None, images: int, device: str
) -> None:
    """The process of one contender: says what it is, then tests the images once for every message."""
    cfg, device = Config(cfg), torch.device(device)
    import_modules_from_strings(**cfg.get('custom_imports', dict(imports=[])))
    init_default_scope(cfg.default_scope)
    MMLogger.get_current_instance().setLevel('ERROR')  # the metric prints a table of its own
    dataset = DATASETS.build(cfg.test_dataloader.dataset)
    sample = dataset[0]
    began = perf_counter()
    model = build_contender(cfg, weights, way, device)
    _logits(model, sample)
    started = perf_counter()
    whole = way is not None and way.whole
    facts = dict(
        start_seconds=started - began,
        # An engine has memory of its own, and counts no operations.
        memory_mb=None if whole else measure_memory(model, dataset, device),
        parameters=count_parameters(model),
        gflop=None if whole else count_gflop(model, dataset),
    )
    trial = (Trial if is_segmentor(cfg) else ClassifierTrial)(model, dataset, device, whole)
    images = min(images, len(dataset))
    if can_tell_peak(device):
        reset_peak(device)
    labels = [trial.test([index])[0] for index in range(images)]
    facts['process_mb'] = peak_memory(device) if can_tell_peak(device) else None
    facts |= trial.score()
    logits = _logits(model, dataset[0]).float().cpu().numpy()
    connection.send((facts, labels, logits))
    while connection.recv():
        connection.send([trial.time([index]) for index in range(images)])


class Trial:
    """Tests batches of a dataset, from the files to the metric, under a stopwatch.

    Args:
        segmentor: In the form to be measured; see :func:`watch`.
        dataset: With the images, and their annotations for the metric; another of the same classes may take its place.
        device: Where the segmentor is.
        whole: Whether the parts of its network cannot be told apart.
    """

    def __init__(self, segmentor: nn.Module, dataset: Sequence[dict], device: torch.device, whole: bool) -> None:
        self.segmentor, self.dataset = segmentor, dataset
        self.metric = self.make_metric()
        self.metric.dataset_meta = dataset.metainfo
        self.stopwatch = Stopwatch(device)
        watch(segmentor, self.stopwatch, whole)
        self._load = self.stopwatch.timed('load', lambda index: self.dataset[index])
        self._process = self.stopwatch.timed('metric', self.metric.process)

    def test(self, indices: Sequence[int]) -> list[np.ndarray]:
        """The labels of some images, tested as one batch: maps (H, W); the metric has counted them."""
        batch = _batch_of(*map(self._load, indices))
        predictions = self.segmentor.test_step(batch)
        self._process(batch, [prediction.to_dict() for prediction in predictions])
        return [self.labels_in(prediction).cpu().short().numpy() for prediction in predictions]

    @staticmethod
    def make_metric() -> BaseMetric:
        return IoUMetric(iou_metrics=['mIoU'])

    @staticmethod
    def labels_in(prediction: BaseDataElement) -> Tensor:
        return prediction.pred_sem_seg.data[0]

    def score(self) -> dict[str, float]:
        """Of all images that were tested so far, in per cent."""
        return dict(mIoU=float(self.metric.evaluate(len(self.metric.results))['mIoU']))

    def time(self, indices: Sequence[int]) -> dict[str, float]:
        """Seconds of a batch: under ``image`` all of it, and those of :data:`STAGES`."""
        self.stopwatch.read()
        self.stopwatch.timed('image', self.test)(indices)
        self.metric.results.clear()
        seconds = self.stopwatch.read()
        seconds['prepare'] = seconds['step'] - seconds['predict']
        seconds['labels'] = seconds['predict'] - sum(seconds.get(part, 0) for part in (*NETWORK, 'engine'))
        seconds['rest'] = seconds['image'] - seconds['load'] - seconds['step'] - seconds['metric']
        return seconds


class ClassifierTrial(Trial):
    """As :class:`Trial`; the label of an image is a single one, (1,)."""

    @staticmethod
    def make_metric() -> BaseMetric:
        from mmpretrain.evaluation import Accuracy

        return Accuracy(topk=1)

    @staticmethod
    def labels_in(prediction: BaseDataElement) -> Tensor:
        return prediction.pred_label

    def score(self) -> dict[str, float]:
        return dict(top1=float(self.metric.evaluate(len(self.metric.results))['accuracy/top1']))


def count_parameters(model: nn.Module) -> dict[str, int]:
    """By part of the network."""
    return {name: sum(p.numel() for p in part.parameters()) for name, part in parts(model).items()}


@torch.no_grad()
def count_gflop(model: nn.Module, dataset: Sequence[dict]) -> dict[str, float]:
    """Multiplications and additions, in 1e9, of the convolutions and matrix products for the first image."""
    with FlopCounterMode(display=False) as counter:
        model(_batch_inputs(model, dataset[0]))
    counts = counter.get_flop_counts()
    of = {
        part: sum(counts.get(f'{type(model).__name__}.{part}', {}).values()) for part in parts(model) if part != 'head'
    }
    # Heads call themselves past the counter's hooks.
    of['head'] = counter.get_total_flops() - sum(of.values())
    return {part: count / 1e9 for part, count in of.items()}


@torch.no_grad()
def measure_peak(device: torch.device) -> float:
    """GFLOP/s, in single precision, of a large matrix product or of a large convolution, whichever is faster.

    What the machine can do: the floor under every network.
    """
    matrix = torch.randn(PEAK_SIZE, PEAK_SIZE, device=device)
    maps = torch.randn(1, 256, 64, 88, device=device).to(memory_format=torch.channels_last)
    kernel = torch.randn(256, 256, 3, 3, device=device).to(memory_format=torch.channels_last)
    stopwatch = Stopwatch(device)
    best = 0.0
    for operation, flop in (
        (lambda: torch.mm(matrix, matrix), 2 * PEAK_SIZE**3),
        (lambda: nn.functional.conv2d(maps, kernel, padding=1), 2 * kernel.numel() * maps[0, 0].numel()),
    ):
        for _ in range(20):
            stopwatch.timed('operation', operation)()
            best = max(best, flop / stopwatch.read()['operation'] / 1e9)
    return best


def _batch_of(*samples: dict) -> dict:
    return {key: [sample[key] for sample in samples] for key in ('inputs', 'data_samples')}


def _logits(model: nn.Module, sample: dict) -> Tensor:
    """By the engine that a model of ours runs in; those of a model as it is come from its parts."""
    inputs = _batch_inputs(model, sample)
    return model.forward_logits(inputs) if isinstance(model, DeployableModel) else model(inputs)


def _batch_inputs(model: nn.Module, sample: dict) -> Tensor:
    return model.data_preprocessor(_batch_of(sample))['inputs']


@torch.no_grad()
def measure_memory(model: nn.Module, dataset: Sequence[dict], device: torch.device) -> dict[str, float] | None:
    """Peak memory in MB: of the network alone, and what prediction adds; None where the system does not tell."""
    if not can_tell_peak(device):
        return None
    samples = [dataset[index] for index in range(min(MEMORY_IMAGES, len(dataset)))]
    inputs = [_batch_inputs(model, sample) for sample in samples]
    before = reset_peak(device)
    for images in inputs:
        model(images)
    network = peak_memory(device)
    for sample in samples:
        model.test_step(_batch_of(sample))
    return dict(network=network - before, prediction_adds=peak_memory(device) - network)


def copies_at(cfg: Config, size: tuple[int, int], images: int, folder: Path) -> None:
    """Write the first test images and annotations stretched to another size, and point the config at them."""
    dataset = DATASETS.build({**cfg.test_dataloader.dataset, 'pipeline': []})
    for place in ('images', 'annotations'):
        (folder / place).mkdir(parents=True, exist_ok=True)
    for index in range(min(images, len(dataset))):
        info = dataset.get_data_info(index)
        for place, key, how in (
            ('images', 'img_path', cv2.INTER_CUBIC),
            ('annotations', 'seg_map_path', cv2.INTER_NEAREST_EXACT),
        ):
            picture = cv2.imread(info[key], cv2.IMREAD_UNCHANGED)
            cv2.imwrite(str(folder / place / Path(info[key]).name), cv2.resize(picture, size[::-1], interpolation=how))
    cfg.test_dataloader.dataset.update(
        data_root=str(folder), data_prefix=dict(img_path='images', seg_map_path='annotations')
    )
