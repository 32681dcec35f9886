"""Files predicted as the command line does it."""

from projects.recnext.recnext.predict.files import predict_files
from projects.recnext.recnext.predict.inputs import find_inputs
from projects.recnext.recnext.predict.model import load_deployed
from projects.recnext.recnext.runtimes.deployment import DEFAULT


def infer(
    config,
    checkpoint,
    inputs,
    out_dir,
    overlay=True,
    batch_size=1,
    share=(0, 1),
    deployment=DEFAULT,
    cfg_options=None,
):
    found = find_inputs(inputs, out_dir)
    model = load_deployed(config, checkpoint, 'cpu', deployment, cfg_options)
    return predict_files(model, found, out_dir, overlay, batch_size, share)
