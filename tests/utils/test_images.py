"""Images as a viewer shows them: every kind of file, and bad ones."""

import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
from helpers.scenes import HEIGHT, WIDTH, save, scene
from PIL import Image, ImageCms

from projects.recnext.recnext.utils.images import ImageError, read_image


def grey(image: np.ndarray) -> np.ndarray:
    return np.array(Image.fromarray(image).convert('L'))


def turned(image: np.ndarray, orientation: int) -> np.ndarray:
    """What has to be stored so that a viewer, which obeys EXIF, shows the image."""
    undo = {2: lambda a: a[:, ::-1], 3: lambda a: a[::-1, ::-1], 4: lambda a: a[::-1], 5: lambda a: a.swapaxes(0, 1)}
    undo |= {6: lambda a: np.rot90(a, 1), 7: lambda a: np.rot90(a, 2).swapaxes(0, 1), 8: lambda a: np.rot90(a, -1)}
    return np.ascontiguousarray(undo[orientation](image))


@pytest.mark.parametrize('suffix', ['.png', '.tif', '.webp', '.jpg'])
@pytest.mark.parametrize('orientation', range(2, 9))
def test_rotated_images_are_upright(tmp_path, suffix, orientation):
    image = cv2.GaussianBlur(scene(), (0, 0), 3)  # so that JPEG's blocks do not matter
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = dict(lossless=True) if suffix == '.webp' else dict(quality=100) if suffix == '.jpg' else {}
    path = save(tmp_path / f'a{suffix}', turned(image, orientation), exif=exif, **options)
    read = read_image(path).astype(int)
    assert read.shape == image.shape and np.abs(read - image).max() <= (12 if suffix == '.jpg' else 0)


@pytest.mark.parametrize('suffix', ['.jpg', '.png', '.bmp', '.webp'])
@pytest.mark.parametrize('mode', ['RGB', 'L'])
def test_ordinary_images_are_those_of_mmsegs_pipeline(tmp_path, suffix, mode):
    path = save(tmp_path / f'a{suffix}', Image.fromarray(scene()).convert(mode))
    assert np.array_equal(read_image(path), cv2.imread(str(path), cv2.IMREAD_COLOR)[..., ::-1])


def stored(kind: str, folder: Path) -> tuple[Path, np.ndarray, int]:
    """A file, what it should look like (RGB), and by how much that may be missed."""
    image, suffix, tolerance, options = scene(), '.png', 0, {}
    expected = image
    hole = np.full((HEIGHT, WIDTH), 255, np.uint8)
    hole[:20, :30] = 0
    white = np.where(hole[..., None] == 0, 255, image)
    if kind == 'alpha':
        image, expected = np.dstack([image, hole]), white
    elif kind == 'half transparent':
        image, expected, tolerance = np.dstack([image, hole // 2]), np.where(hole[..., None], 255 - (255 - image.astype(int)) * 127 / 255, 255), 1  # fmt: skip # noqa: E501
    elif kind == 'grey with alpha':
        image = np.dstack([grey(image), hole])
        expected = np.where(hole[..., None] == 0, 255, image[..., :1]).repeat(3, 2)
    elif kind == 'palette':
        image = Image.fromarray(image).quantize(64)
        expected = np.array(image.convert('RGB'))
    elif kind == 'palette with transparency':
        image = Image.fromarray(image).quantize(64)
        options = dict(transparency=5)
        expected = np.where((np.array(image) == 5)[..., None], 255, np.array(image.convert('RGB')))
    elif kind == 'gif':
        image, suffix = Image.fromarray(image).quantize(64), '.gif'
        expected = np.array(image.convert('RGB'))
    elif kind == 'bilevel':
        image = Image.fromarray(image).convert('1')
        expected = np.array(image.convert('RGB'))
    elif kind in ('16 bits, grey, png', '16 bits, grey, tif'):
        image, suffix = grey(image).astype(np.uint16) * 257, f'.{kind[-3:]}'
        expected = (image // 257)[..., None].repeat(3, 2)
    elif kind in ('16 bits, colour, png', '16 bits, colour, tif'):
        path = folder / f'a.{kind[-3:]}'
        assert cv2.imwrite(str(path), image[..., ::-1].astype(np.uint16) * 257)
        return path, image, 0
    elif kind in ('cmyk, jpg', 'cmyk, tif'):
        image, suffix = Image.fromarray(image).convert('CMYK'), f'.{kind[-3:]}'
        tolerance, options = (8, dict(quality=100, subsampling=0)) if suffix == '.jpg' else (0, {})
    elif kind == 'several pages':
        options, suffix = dict(save_all=True, append_images=[Image.fromarray(scene(1))]), '.tif'
    return save(folder / f'a{suffix}', image, **options), expected, tolerance


KINDS = [
    'alpha', 'half transparent', 'grey with alpha', 'palette', 'palette with transparency', 'gif', 'bilevel',
    '16 bits, grey, png', '16 bits, grey, tif', '16 bits, colour, png', '16 bits, colour, tif', 'cmyk, jpg',
    'cmyk, tif', 'several pages',
]  # fmt: skip


@pytest.mark.parametrize('kind', KINDS)
def test_every_kind_of_image_looks_as_in_a_viewer(tmp_path, kind):
    path, expected, tolerance = stored(kind, tmp_path)
    read = read_image(path)
    assert read.shape == (HEIGHT, WIDTH, 3) and read.dtype == np.uint8
    assert np.abs(read.astype(int) - expected).max() <= tolerance


def test_cmyk_by_its_own_profile(tmp_path, monkeypatch):
    asked = []

    def convert(image, source, target, outputMode):
        asked.append(source.read())
        return image.convert(outputMode)

    monkeypatch.setattr(ImageCms, 'profileToProfile', convert)
    read_image(save(tmp_path / 'a.jpg', Image.fromarray(scene()).convert('CMYK'), icc_profile=b'the profile'))
    assert asked == [b'the profile']


def test_cmyk_whose_profile_is_broken(tmp_path):
    image = Image.fromarray(scene()).convert('CMYK')
    broken = read_image(save(tmp_path / 'a.tif', image, icc_profile=b'no profile'))
    assert np.array_equal(broken, scene())


def png_of_size(width: int, height: int) -> bytes:
    """A file that says it has so many pixels, and has hardly any bytes."""
    chunks = [
        (b'IHDR', width.to_bytes(4, 'big') + height.to_bytes(4, 'big') + bytes([8, 2, 0, 0, 0])),
        (b'IDAT', b''),
        (b'IEND', b''),
    ]
    body = b''.join(len(d).to_bytes(4, 'big') + n + d + zlib.crc32(n + d).to_bytes(4, 'big') for n, d in chunks)
    return b'\x89PNG\r\n\x1a\n' + body


def bad_file(kind: str, folder: Path) -> Path:
    path = folder / 'bad.png'
    if kind == 'missing':
        return path
    if kind == 'a folder':
        path.mkdir()
        return path
    if kind == 'floating point':
        return save(path.with_suffix('.tif'), grey(scene()).astype(np.float32))
    if kind == '32 bits':
        return save(path.with_suffix('.tif'), grey(scene()).astype(np.int32) * 1000)
    if kind.startswith('truncated'):
        path = save(path.with_suffix(kind.split()[1]), scene())
    contents = {
        'empty': b'',
        'text': b'not an image',
        'bomb': png_of_size(20000, 20000),
        'no pixels': png_of_size(9, 9),
    }
    path.write_bytes(contents[kind] if kind in contents else path.read_bytes()[: path.stat().st_size // 2])
    return path


BAD = {
    'missing': 'No such file', 'a folder': 'directory', 'empty': 'not an image', 'text': 'not an image',
    'bomb': '179 million pixels', 'no pixels': 'damaged', 'floating point': 'floating-point', '32 bits': '32 bits',
    'truncated .jpg': 'damaged', 'truncated .png': 'damaged', 'truncated .gif': 'truncated',
    'truncated .tif': 'cannot be read', 'truncated .webp': 'cannot be read',
}  # fmt: skip


@pytest.mark.parametrize('kind', BAD)
def test_bad_files_are_named_with_the_reason(tmp_path, kind):
    with pytest.raises(ImageError, match=rf'bad\..*{BAD[kind]}'):
        read_image(bad_file(kind, tmp_path))


def test_what_pillow_has_opened_is_read_as_the_file_is(tmp_path):
    path = save(tmp_path / 'a.png', scene())
    assert np.array_equal(read_image(Image.open(path)), read_image(path))
