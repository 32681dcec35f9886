"""The hooks of MMEngine that training and testing here have; configs name them, or a run registers them."""

import math
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.evaluator import Evaluator
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from mmseg.evaluation import IoUMetric
from torch import nn

from ..checkpoints.files import CheckpointError, read_checkpoint
from ..runtimes.deployment import Deployment, deploy
from ..utils.errors import UserError
from ..utils.evaluation import RECORD
from .deployable import DeployableModel
from .record import EvaluationRecord
from .resume import list_checkpoints

MAX_IMAGES_NAMED = 8
"""Images that the message of :class:`FiniteLossHook` names."""


def unwrap(model: nn.Module) -> nn.Module:
    """Return the model inside wrappers: of several processes, of test-time augmentation."""
    while hasattr(model, 'module'):
        model = model.module
    return model


@HOOKS.register_module()
class AdaptiveClipHook(Hook):
    """Clip gradients in training relative to the weights that they belong to.

    Brock et al., High-Performance Large-Scale Image Recognition Without Normalization
    (https://arxiv.org/abs/2102.06171), as timm does it. It works with any OptimWrapper that does not scale the loss.

    Args:
        clip_factor: The most that a gradient's norm may be of its weight's.
    """

    def __init__(self, clip_factor: float = 0.01) -> None:
        from timm.utils.agc import adaptive_clip_grad

        self.clip_factor = clip_factor
        self._clip_gradients = adaptive_clip_grad

    def before_train(self, runner: Runner) -> None:
        """Clip before every step of the optimizer."""

        def clip(optimizer: torch.optim.Optimizer, *_: object) -> None:
            for group in optimizer.param_groups:
                self._clip_gradients(group['params'], self.clip_factor)

        runner.optim_wrapper.optimizer.register_step_pre_hook(clip)


@HOOKS.register_module()
class ChannelsLastHook(Hook):
    """Keep the weights in channels-last order in training; convolutions then keep the activations so too."""

    def before_train(self, runner: Runner) -> None:
        """Reorder the weights; their values and shapes stay."""
        runner.model.to(memory_format=torch.channels_last)


@HOOKS.register_module()
class CompileHook(Hook):
    """Compile the network for training with torch.compile: not mmengine's whole training step, only what computes.

    The names of the weights stay, so checkpoints are the same. The first iterations take minutes.
    """

    def before_train(self, runner: Runner) -> None:
        """Compile backbone, neck and head, each on its own."""
        compile_for_training(runner.model.module if is_model_wrapper(runner.model) else runner.model)


def compile_for_training(model: DeployableModel, **options: str) -> None:
    """Compile the parts of a model, in place, with options of torch.compile."""
    for name, part in model.parts().items():
        if name == 'head':
            # Heads call their own forward method, past the compiled call.
            part.forward = torch.compile(part.forward, **options)
        else:
            part.compile(**options)


@HOOKS.register_module()
class ThroughputHook(Hook):
    """Add images per second, of all processes together, to what is logged of training."""

    # After IterTimerHook, which measures, and before LoggerHook, which prints.
    priority = 'NORMAL'

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: dict, outputs: dict | None = None) -> None:
        """Log the images of one iteration over its seconds."""
        seconds = runner.message_hub.get_scalar('train/time').current()
        images = len(data_batch['inputs']) * runner.world_size
        runner.message_hub.update_scalar('train/images_per_second', images / seconds)


@HOOKS.register_module()
class FiniteLossHook(Hook):
    """Stop training as soon as a loss is NaN or infinite, before a corrupted checkpoint is saved.

    It costs no time: mmengine's RuntimeInfoHook waits for the losses of every iteration anyway.

    Raises:
        UserError: with the iteration, the losses, the images and the last good checkpoint.
    """

    # Before LoggerHook and CheckpointHook: nothing of this iteration is written.
    priority = 'NORMAL'

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: dict, outputs: dict | None = None) -> None:
        """Look at the losses of one iteration; mmengine counts it from 0, the logs from 1."""
        losses = {name: value.item() for name, value in (outputs or {}).items() if 'loss' in name}
        if all(map(math.isfinite, losses.values())):
            return
        paths = [sample.metainfo.get('img_path', 'unnamed') for sample in data_batch['data_samples']]
        more = f'\n  and {len(paths) - MAX_IMAGES_NAMED} more' if len(paths) > MAX_IMAGES_NAMED else ''
        process = f' of process {runner.rank + 1}' if runner.world_size > 1 else ''
        raise UserError(
            f'Training stopped in iteration {runner.iter + 1}: '
            + ', '.join(f'{name} is {value}' for name, value in losses.items() if not math.isfinite(value))
            + f'. The images{process}:\n  '
            + '\n  '.join(map(str, paths[:MAX_IMAGES_NAMED]))
            + more
            + f'\n{_advice(runner)}'
        )


def _advice(runner: Runner) -> str:
    smaller = 'with a smaller learning rate: --cfg-options optim_wrapper.optimizer.lr=...'
    start = last_good_checkpoint(runner.cfg, runner.iter)
    if '://' in str(address := (runner.cfg.default_hooks.get('checkpoint') or {}).get('out_dir')):
        return f'Checkpoints are in {address}.\n  Start from one of before {smaller} load_from=...'
    if start is None:
        return f'There is no good checkpoint in {runner.work_dir} yet. Start again {smaller}'
    return f'The last good checkpoint is {start}.\n  Start from its weights {smaller} load_from={start}'


def last_good_checkpoint(cfg: Config, iteration: int) -> Path | None:
    """Return the newest numbered checkpoint of a run that was written before some iteration and is finite.

    Args:
        cfg: Of the run.
        iteration: How many iterations had been completed when the loss was not finite. A checkpoint of just as many
            holds the weights that gave this loss, and is not good.
    """
    for path in list_checkpoints(cfg):
        try:
            checkpoint = read_checkpoint(path)
        except CheckpointError:
            continue
        finite = all(bool(torch.isfinite(tensor).all()) for tensor in checkpoint['state_dict'].values())
        if finite and checkpoint['meta']['iter'] < iteration:
            return path
    return None


@HOOKS.register_module()
class DeployHook(Hook):
    """Bring the model, a DeployableModel, into another form before testing.

    Args:
        fuse: As for :class:`.Deployment`, and so are the others.
    """

    def __init__(
        self,
        fuse: str = 'all',
        precision: str = 'fp32',
        channels_last: bool = True,
        engine: str = 'torch',
        calibrate: str | None = None,
        keep_float: list[str] | None = None,
    ) -> None:
        self.deployment = Deployment(fuse, precision, channels_last, engine, calibrate, keep_float)

    def before_test(self, runner: Runner) -> None:
        """Fold and convert the network that was loaded."""
        model = unwrap(runner.model)
        if not isinstance(model, DeployableModel):
            raise UserError(
                f'DeployHook needs model.type FastEncoderDecoder or RecNeXtClassifier; found {type(model).__name__}.'
            )
        deploy(model, self.deployment)
        runner.logger.info(f'Network: {self.deployment}.')


@HOOKS.register_module()
class NoAlgorithmSearchHook(Hook):
    """Let cuDNN choose its algorithms without trying them, in validation and testing; training keeps its setting.

    mmseg's configs have ``env_cfg.cudnn_benchmark=True``, with which each convolution tries many algorithms on the
    first images of every size. Training crops are of one size. Images that are tested come in hundreds, and for each
    the search takes longer than the images.
    """

    searching: bool | None = None

    def before_val(self, runner: Runner) -> None:
        """Stop searching."""
        self.searching, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, False

    def after_val(self, runner: Runner) -> None:
        """Go on as before."""
        torch.backends.cudnn.benchmark = self.searching

    before_test = before_val
    after_test = after_val


class _EvaluatorHook(Hook):
    """Change the evaluator of validation and testing before each begins."""

    def before_val_epoch(self, runner: Runner) -> None:
        """Change that of validation."""
        self.change(runner, runner.val_loop.evaluator, f'validation at iteration {runner.iter}')

    def before_test_epoch(self, runner: Runner) -> None:
        """Change that of testing."""
        self.change(runner, runner.test_loop.evaluator, f'test of {runner.cfg.get("load_from")}')

    def change(self, runner: Runner, evaluator: Evaluator, description: str) -> None:
        """Change an evaluator, in place."""
        raise NotImplementedError


@HOOKS.register_module()
class EvaluationRecordHook(_EvaluatorHook):
    """Set an :class:`EvaluationRecord` beside the IoUMetric of validation and testing; there may be none.

    A metric of its own in the config would do the same, but the config would no longer be that of mmseg's own tools,
    which know a single evaluator. Nothing is recorded with ``format_only``, where there need be no annotations.
    """

    def change(self, runner: Runner, evaluator: Evaluator, description: str) -> None:
        evaluator.metrics = [metric for metric in evaluator.metrics if not isinstance(metric, EvaluationRecord)]
        for metric in evaluator.metrics:
            if isinstance(metric, IoUMetric) and not metric.format_only:
                path = Path(runner.log_dir, RECORD)
                record = EvaluationRecord(
                    path, description, metric.ignore_index, metric.collect_device, metric.collect_dir
                )
                record.dataset_meta = evaluator.dataset_meta
                evaluator.metrics = [*evaluator.metrics, record]
                break


class GatherInWorkDirHook(_EvaluatorHook):
    """Let the metrics of several processes gather their parts in the work dir.

    Defect: mmengine makes a folder ``.dist_test`` where the run was started, and leaves it there.

    Repair: a folder that it is told the name of, it removes.
    """

    def change(self, runner: Runner, evaluator: Evaluator, description: str) -> None:
        for metric in evaluator.metrics:
            if metric.collect_device == 'cpu' and metric.collect_dir is None:
                metric.collect_dir = str(Path(runner.work_dir, '.gathering'))
