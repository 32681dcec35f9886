"""Images per second in the log of training."""

from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner


@HOOKS.register_module()
class ThroughputHook(Hook):
    """Adds images per second, of all processes together, to what is logged of training."""

    # After IterTimerHook, which measures, and before LoggerHook, which prints.
    priority = 'NORMAL'

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: dict, outputs: dict | None = None) -> None:
        """Log the images of one iteration over its seconds."""
        seconds = runner.message_hub.get_scalar('train/time').current()
        images = len(data_batch['inputs']) * runner.world_size
        runner.message_hub.update_scalar('train/images_per_second', images / seconds)
