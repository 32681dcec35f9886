"""Where the metrics of several processes gather their parts."""

from pathlib import Path

from mmengine.evaluator import Evaluator
from mmengine.hooks import Hook
from mmengine.runner import Runner


class GatherInWorkDirHook(Hook):
    """Lets the metrics of several processes gather their parts in the work dir.

    Defect: mmengine makes a folder ``.dist_test`` where the run was started, and leaves it there.

    Repair: a folder that it is told the name of, it removes.
    """

    def before_val_epoch(self, runner: Runner) -> None:
        """For validation."""
        self._name_folder(runner, runner.val_loop.evaluator)

    def before_test_epoch(self, runner: Runner) -> None:
        """For testing."""
        self._name_folder(runner, runner.test_loop.evaluator)

    def _name_folder(self, runner: Runner, evaluator: Evaluator) -> None:
        for metric in evaluator.metrics:
            if metric.collect_device == 'cpu' and metric.collect_dir is None:
                metric.collect_dir = str(Path(runner.work_dir, '.gathering'))
