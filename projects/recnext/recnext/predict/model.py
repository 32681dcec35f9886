"""A trained segmentor is one thing, wherever it comes from: :func:`load` gives a :class:`Model`."""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..checkpoints.files import read_checkpoint
from ..checkpoints.folder import (
    DESCRIPTION,
    HUB,
    Description,
    pull_segmentor,
    read_description,
    read_folder,
    write_folder,
)
from ..checkpoints.keys import (
    BACKBONE,
    ConversionError,
    check_weights_fit,
    convert_state_dict,
    get_state_dict,
    read_classes,
)
from ..checkpoints.releases import read_releases, resolve_checkpoint
from ..models.ade20k import ade20k_classes
from ..models.deployable import Deployable
from ..models.preprocess import Preprocess
from ..runtimes.deployment import DEFAULT, Deployment, deploy
from ..utils.devices import AUTO, find_device, out_of_memory
from ..utils.errors import UserError
from ..utils.files import sha256_of
from ..utils.images import ImageError, read_image
from .prediction import Prediction

MAX_NETWORK_PIXELS = 2**24
"""Of an image as the network sees it; RecNeXt-M3 takes 5 GB for so many."""

Source = str | Path | bytes | Image.Image | np.ndarray
"""An image: a file, the content of one, or pixels (H, W, 3), RGB, uint8."""


class Inputs(Protocol):
    """An image as its network takes it."""

    inputs: Tensor  # (C, h, w)


class Segmenter(Protocol):
    """Images to label maps: a :class:`.RecNeXtSegmentor`, or what :mod:`..openmmlab.loading` makes of a config."""

    def prepare(self, image: np.ndarray) -> Inputs:
        """Return an image (H, W, C), RGB, uint8, ready for :meth:`label_maps`; thread-safe."""

    def label_maps(self, batch: Sequence[Inputs]) -> list[Tensor]:
        """Return the label map (H, W) of each image in its original size."""


class PreparedImage(NamedTuple):
    """An image that is ready for the network."""

    image: np.ndarray  # (H, W, C), RGB, uint8
    data: Inputs


class Model:
    """A trained segmentor with its preprocessing, classes, colours and provenance. Made by :func:`load`.

    Example:
        >>> model = load('recnext_m3_ade20k')
        >>> prediction = model('photo.jpg')
        >>> prediction.labels, prediction.areas[0].name
        >>> prediction.overlay().save('overlay.jpg')

    Attributes:
        classes: Names.
        palette: (classes, 3), RGB, uint8.
        provenance: What decides the predictions, for a person to read and for a restarted run to compare.
        description: What :meth:`save` writes; None for a config that has no such form.
    """

    def __init__(
        self,
        network: Deployable,
        segmenter: Segmenter,
        classes: Sequence[str],
        palette: Sequence[Sequence[int]],
        provenance: dict,
        description: Description | None = None,
    ) -> None:
        self.network = network
        self.classes = [name.strip() for name in classes]
        self.palette = np.array(palette, np.uint8)
        self.provenance = provenance
        self.description = description
        self._segmenter = segmenter

    def __call__(self, image: Source | Sequence[Source]) -> Prediction | list[Prediction]:
        """Predict an image, or several together.

        Args:
            image: A path, the bytes of a file, a PIL image, or an array (H, W, 3), RGB, uint8; or a list of such.
                Files are shown upright (EXIF), in 8 bits, transparent parts white.

        Returns:
            A :class:`.Prediction`, or a list of them in the order of the images.

        Raises:
            ImageError: one cannot be read, or is too large.
        """
        if isinstance(image, list | tuple):
            return self.predict([self.prepare(one) for one in image])
        return self.predict([self.prepare(image)])[0]

    def prepare(self, image: Source, name: str | None = None) -> PreparedImage:
        """Read an image and bring it into the size of the network; may run in several threads.

        Args:
            image: As for a call.
            name: What messages call it; None means the path.

        Raises:
            ImageError: it cannot be read, or is too large.
        """
        name = name or (str(image) if isinstance(image, str | Path) else 'The image')
        pixels = image if isinstance(image, np.ndarray) else read_image(image, name)
        channels = self.description.network['in_channels'] if self.description else 3
        if channels != 3 and not isinstance(image, np.ndarray):
            raise ImageError(f'{name} has three channels, and this network takes {channels}: give it arrays.')
        if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != channels:
            raise ImageError(
                f'{name} is an array of {pixels.dtype} {pixels.shape}; expected uint8 (height, width, {channels})'
                f'{", RGB" * (channels == 3)}.'
            )
        sizes = self.description.preprocess.sizes(*pixels.shape[:2]) if self.description else ()
        for height, width in sizes:  # before it takes the memory
            check_size(name, height, width)
        try:
            data = self._segmenter.prepare(pixels)
        except Exception as error:  # cv2's and whatever a pipeline of the user's raises
            raise ImageError(f'{name} does not go through the test pipeline: {type(error).__name__}: {error}') from None
        check_size(name, *data.inputs.shape[-2:])
        return PreparedImage(pixels, data)

    @torch.no_grad()
    def predict(self, batch: Sequence[PreparedImage]) -> list[Prediction]:
        """Predict prepared images together; those of one size go through the network at once.

        Raises:
            ImageError: the device has too little memory for them.
        """
        try:
            maps = self._segmenter.label_maps([prepared.data for prepared in batch])
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            sizes = ', '.join('{1} × {0}'.format(*prepared.image.shape) for prepared in batch)
            raise ImageError(f'The device has too little memory for {len(batch)} images of {sizes} pixels.') from None
        kind = torch.uint8 if len(self.classes) <= 256 else torch.uint16
        labels = [labels.to(kind).cpu().numpy() for labels in maps]
        return [Prediction(prepared.image, map_, self.classes, self.palette) for prepared, map_ in zip(batch, labels)]

    def to(self, device: str | torch.device) -> 'Model':
        """Move the network to a device, in place, and return the model.

        Raises:
            UserError: there is no such device, or the network runs in a backend that is bound to its own.
        """
        if self.provenance['engine'] != 'torch':
            raise UserError(f'The network runs in {self.provenance["engine"]}: load it anew with device={device!r}.')
        self.network.to(find_device(device))
        return self

    def save(self, folder: str | Path) -> None:
        """Write ``config.json`` and ``model.safetensors``, which :func:`load` takes.

        Raises:
            UserError: the model has no such form, or is fused: load it with ``fuse='none'``.
        """
        description = self._describable('saved')
        weights = self.network.state_dict()
        if self.provenance['fuse'] != 'none' or self.provenance['precision'] != 'fp32':
            raise UserError("A fused or converted network is not saved: load it with fuse='none' and fp32.")
        write_folder(folder, description, weights)

    def push_to_hub(self, repository: str, license: str = 'apache-2.0', private: bool = False) -> str:
        """Put the model on the Hugging Face hub in one commit, with a card for people.

        Args:
            repository: ``'user/name'``, which is created if it is not there.
            license: Of the weights, as the hub spells it.
            private: Whether a new repository is for its owner alone.

        Returns:
            The address of the commit.

        Raises:
            UserError: as :meth:`save`, or the hub refuses. Nothing stays here.
        """
        from .push import push_model

        return push_model(self, repository, license, private)

    def _describable(self, action: str) -> Description:
        if self.description is None:
            raise UserError(
                f'Only RecNeXt with Semantic FPN and a test pipeline of Resize and ResizeToMultiple is {action} as '
                'config.json and safetensors; this config has another network or pipeline.'
            )
        return self.description


def check_size(name: str, height: int, width: int) -> None:
    """Refuse what is larger than a network should see at once."""
    if height * width > MAX_NETWORK_PIXELS:
        raise ImageError(
            f'{name} reaches the network as {width} × {height} pixels; expected at most '
            f'{MAX_NETWORK_PIXELS / 1e6:.0f} million. Cut it into parts, or put Resize in the test pipeline.'
        )


def load(
    model: str | Path,
    checkpoint: str | Path | None = None,
    device: str | torch.device = AUTO,
    precision: str = 'fp32',
    backend: str = 'torch',
    fuse: str = 'all',
    calibrate: str | None = None,
    cfg_options: dict | None = None,
) -> Model:
    """Load a trained segmentor, in the form in which it runs fastest.

    Args:
        model: The name of a release (``recnext_m3_ade20k``), whose weights are downloaded unless they are there or
            named; a folder with ``config.json`` and ``model.safetensors``; ``hf://user/name[@revision]``; or any config
            of mmseg, with a checkpoint, which alone imports OpenMMLab.
        checkpoint: Weights, of this project or as released (0.x); a path or an address. None means those that
            ``model`` brings.
        device: ``'auto'``, ``'cpu'``, ``'cuda:1'``, ...
        precision: ``'fp32'``, ``'bf16'``, ``'fp16'``, ``'int8'``.
        backend: ``'torch'``, ``'compile'``, ``'cudagraph'``, ``'openvino'``, ``'onnxruntime'``.
        fuse: ``'all'``, ``'norms'``, ``'none'``: what is multiplied out; the label maps stay the same.
        calibrate: Folder of images, for ``'int8'``.
        cfg_options: Changes to a config, by dotted names.

    Returns:
        The model, ready to predict.

    Raises:
        UserError: no such model, checkpoint or device, or one that does not fit the other.
    """
    deployment = Deployment(fuse, precision, engine=backend, calibrate=calibrate)
    return load_deployed(model, checkpoint, device, deployment, cfg_options)


def load_deployed(
    model: str | Path,
    checkpoint: str | Path | None = None,
    device: str | torch.device = AUTO,
    deployment: Deployment = DEFAULT,
    cfg_options: dict | None = None,
) -> Model:
    """Do as :func:`load`, with all the settings of a :class:`.Deployment`."""
    device = find_device(device)  # before anything is fetched
    loaded = load_core(str(model), checkpoint, cfg_options)
    if loaded is None:
        loaded = _load_configured(model, checkpoint, cfg_options)
    loaded.network.to(device)
    deploy(loaded.network, deployment)
    loaded.provenance.update(dataclasses.asdict(deployment))
    return loaded


def _load_configured(config: str | Path, checkpoint: str | Path | None, cfg_options: dict | None) -> Model:
    try:
        from ..openmmlab.loading import load_configured
    except ModuleNotFoundError as error:
        raise UserError(
            f'{config} is no release, folder or hf:// address, and to read it as a config takes OpenMMLab, which is '
            f'not installed ({error.name}): pip install ".[mmseg]"'
        ) from None
    return Model(*load_configured(config, checkpoint, cfg_options))


def load_core(name: str, checkpoint: str | Path | None, cfg_options: dict | None) -> Model | None:
    """Load what needs no config: a release, a folder, or one of the hub; None if ``name`` is none of them."""
    release = {release['name']: release for release in read_releases()}.get(name)
    folder = Path(name) / DESCRIPTION
    if release is None and not folder.is_file() and not name.startswith(HUB):
        return None
    if release is not None and release['task'] != 'segmentation':
        raise UserError(
            f'{name} is an ImageNet classifier, not a segmentor. To start training from it, set '
            'model.backbone.init_cfg.checkpoint; to classify, timm.create_model after '
            'import projects.recnext.recnext.timm.'
        )
    if cfg_options:
        raise UserError(f'--cfg-options change a config, and {name} is none. Name the config instead.')
    if release is not None:
        classes, palette = ade20k_classes()
        network = dict(arch=release['arch'], in_channels=3, fpn_channels=256, head_channels=128, threshold=None)
        description, weights = Description(network, Preprocess(), classes, palette), None
    else:
        # Weights that are named are taken in the place of its own, which are not downloaded then.
        own = checkpoint is None
        place = pull_segmentor(name, own) if name.startswith(HUB) else Path(name)
        description, weights = read_folder(place) if own else (read_description(place / DESCRIPTION), None)
        description = description if own else dataclasses.replace(description, provenance={}, metrics={})
    if checkpoint is None and weights is None:
        from ..checkpoints.download import find_released_weights

        weights = find_released_weights(name)
    return _build(name, description, Path(weights) if checkpoint is None else resolve_checkpoint(str(checkpoint)))


def _build(name: str, description: Description, file: Path) -> Model:
    content = read_checkpoint(file)
    conversion = convert_state_dict(get_state_dict(content))
    if conversion.layout.kind != 'segmentor':
        raise ConversionError(
            f'{file} holds the weights of a {conversion.layout.kind} (arch {conversion.arch}), not of a segmentor. '
            f'To start training from them, set model.{BACKBONE}init_cfg.checkpoint to the file.'
        )
    network = description.build_on_meta()
    try:
        check_weights_fit(conversion.state_dict, network.state_dict(), f'{name}; they are of arch {conversion.arch}')
    except ConversionError as error:
        raise ConversionError(f'{file}: {error}') from None
    network.load_state_dict(conversion.state_dict, assign=True)
    named, coloured = read_classes(content, len(description.classes))
    classes, palette = named or description.classes, coloured or description.palette
    sha256 = sha256_of(file)
    description = dataclasses.replace(
        description,
        classes=tuple(classes),
        palette=tuple(map(tuple, palette)),
        # Of a folder's own weights it says more than the name of the file in it.
        provenance=description.provenance or dict(file=file.name, file_sha256=sha256),
    )
    content = json.dumps([*map(description.to_dict().get, ('network', 'preprocess', 'classes', 'palette'))])
    provenance = dict(
        model=Path(name).name,
        network_and_pipeline=hashlib.sha256(content.encode()).hexdigest(),
        checkpoint=file.name,
        sha256=sha256,
    )
    return Model(network, network, classes, palette, provenance, description)
