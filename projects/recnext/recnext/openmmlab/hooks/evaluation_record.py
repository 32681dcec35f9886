"""A record of every validation and test, beside the metric that measures it."""

from pathlib import Path

from mmengine.evaluator import Evaluator
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from mmseg.evaluation import IoUMetric

from ...utils.evaluation import RECORD
from ..record import EvaluationRecord


@HOOKS.register_module()
class EvaluationRecordHook(Hook):
    """Sets an :class:`EvaluationRecord` beside the IoUMetric of validation and testing; there may be none.

    A metric of its own in the config would do the same, but the config would no longer be that of mmseg's own tools,
    which know a single evaluator. Nothing is recorded with ``format_only``, where there need be no annotations.
    """

    def before_val_epoch(self, runner: Runner) -> None:
        """Record this validation, in the place of the one before."""
        self._add_record(runner, runner.val_loop.evaluator, f'validation at iteration {runner.iter}')

    def before_test_epoch(self, runner: Runner) -> None:
        """Record this test."""
        self._add_record(runner, runner.test_loop.evaluator, f'test of {runner.cfg.get("load_from")}')

    def _add_record(self, runner: Runner, evaluator: Evaluator, of: str) -> None:
        evaluator.metrics = [metric for metric in evaluator.metrics if not isinstance(metric, EvaluationRecord)]
        for metric in evaluator.metrics:
            if isinstance(metric, IoUMetric) and not metric.format_only:
                record = EvaluationRecord(
                    Path(runner.log_dir, RECORD), of, metric.ignore_index, metric.collect_device, metric.collect_dir
                )
                record.dataset_meta = evaluator.dataset_meta
                evaluator.metrics = [*evaluator.metrics, record]
                break
