"""Testing in the form in which the network is fastest."""

from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner

from ...runtimes.deployment import Deployment, deploy
from ...utils.errors import UserError
from ..deployable import DeployableModel


@HOOKS.register_module()
class DeployHook(Hook):
    """Brings the model, a DeployableModel, into another form before testing.

    Args:
        fuse: As for :class:`deploy.Deployment`, and so are the others.
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
        model = runner.model
        while hasattr(model, 'module'):  # inside wrappers: distributed, test-time augmentation
            model = model.module
        if not isinstance(model, DeployableModel):
            raise UserError(
                f'DeployHook needs model.type FastEncoderDecoder or RecNeXtClassifier; found {type(model).__name__}.'
            )
        deploy(model, self.deployment)
        runner.logger.info(f'Network: {self.deployment}.')
