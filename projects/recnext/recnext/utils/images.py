"""Images as a viewer shows them, from any common file: 8 bits, RGB, the right way up."""

import io
import warnings
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

from .errors import UserError

IMAGE_SUFFIXES = frozenset(
    '.avif .bmp .gif .jfif .jp2 .jpe .jpeg .jpg .pbm .pgm .png .pnm .ppm .tga .tif .tiff .webp'.split()
)
"""What the images in a folder are called, in lower case; a file that is named itself may have any name."""

FORMATS = ('AVIF', 'BMP', 'GIF', 'JPEG', 'JPEG2000', 'PNG', 'PPM', 'TGA', 'TIFF', 'WEBP')
"""What is read, whatever a file is called. Pillow knows more; for some, such as EPS, it starts other programs."""

ORDINARY_FORMATS = ('JPEG', 'MPO', 'PNG', 'BMP', 'WEBP')
ORDINARY_MODES = ('RGB', 'L')
WHITE = (255, 255, 255, 255)


class ImageError(UserError):
    """An input that cannot be predicted; the others can."""


def read_image(source: str | Path | bytes | Image.Image, name: str | None = None) -> np.ndarray:
    """Read an image as a viewer shows it.

    Ordinary ones, in colour or grey, are decoded as mmseg decodes them, pixel for pixel. Rotated ones (EXIF) are set
    upright, CMYK becomes RGB by its own colour profile, what is transparent becomes white, of 16 bits the upper 8
    count, and of several pages or frames the first.

    Args:
        source: A file, the content of one, or what Pillow has opened.
        name: What the messages call it; None means the path.

    Returns:
        (H, W, 3), RGB, uint8.

    Raises:
        ImageError: no such file, not an image, damaged, or of more pixels than Pillow takes for honest (twice
            ``PIL.Image.MAX_IMAGE_PIXELS``).
    """
    name = name or str(source)
    try:
        if isinstance(source, Image.Image):
            return np.array(_to_rgb(source))
        with _open(source) as image:
            ordinary = image.format in ORDINARY_FORMATS and image.mode in ORDINARY_MODES
            if not ordinary or 'transparency' in image.info:
                return np.array(_to_rgb(image))
        content = source if isinstance(source, bytes) else Path(source).read_bytes()
        pixels = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR)  # as mmcv does
    except Image.DecompressionBombError:
        limit = 2 * Image.MAX_IMAGE_PIXELS / 1e6
        raise ImageError(f'{name} has more than {limit:.0f} million pixels. Cut it into parts.') from None
    except UnidentifiedImageError:
        raise ImageError(f'{name} is not an image of a known format.') from None
    except Exception as error:  # a damaged file can fail in any way
        raise ImageError(f'{name} cannot be read: {getattr(error, "strerror", None) or error}') from None
    if pixels is None:
        raise ImageError(f'{name} cannot be read: truncated or damaged.')
    return cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB)


def pixels_in_header(source: str | Path | bytes) -> int:
    """Height times width of an image, from its header; 0 if it cannot be read."""
    try:
        with _open(source) as image:
            return image.width * image.height
    except Exception:  # read_image will say why
        return 0


def silence_opencv() -> None:
    """Keep OpenCV to one thread, and it and Pillow quiet about files whose failure is reported anyway."""
    cv2.setNumThreads(0)
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
    warnings.simplefilter('ignore', Image.DecompressionBombWarning)


def _open(source: str | Path | bytes) -> Image.Image:
    Image.init()
    known = [name for name in FORMATS if name in Image.OPEN]  # AVIF is not in every Pillow
    return Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=known)


def _to_rgb(image: Image.Image) -> Image.Image:
    image = ImageOps.exif_transpose(image)
    if image.mode == 'F':
        raise ValueError('floating-point pixels, in which black and white are not known; expected 8 or 16 bits')
    if image.mode.startswith('I'):
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError('pixels of 32 bits; expected 8 or 16')
        image = Image.fromarray((values >> 8).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert('RGBA')
        return Image.alpha_composite(Image.new('RGBA', image.size, WHITE), image).convert('RGB')
    return _by_profile(image) if image.mode == 'CMYK' else image.convert('RGB')


def _by_profile(image: Image.Image) -> Image.Image:
    """CMYK to RGB by the profile in the file, where there is one that works."""
    profile = image.info.get('icc_profile')
    if profile:
        try:
            srgb = ImageCms.createProfile('sRGB')
            return ImageCms.profileToProfile(image, io.BytesIO(profile), srgb, outputMode='RGB')
        except ImageCms.PyCMSError:
            pass
    return image.convert('RGB')
