"""The diagrams of the pages, as SVG in one style: `python docs/diagrams/draw.py` writes them anew, beside itself."""

import sys
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

FOLDER = Path(__file__).parent
ROOT = FOLDER.parents[1]

# Light fills with dark lines, legible in print. Blue and orange differ for the colour-blind, and words tell them too.
STYLE = """
    .data { fill: #e2e8f0; stroke: #4a5568 } .step { fill: #bee3f8; stroke: #2b6cb0 }
    .end { fill: #feebc8; stroke: #dd6b20 }
    .arrow { stroke: #2d3748; fill: none; marker-end: url(#tip) } .late { stroke-dasharray: 5 4 }
    .small { font-size: 12px; fill: #4a5568 } .bold { font-weight: bold }
    text { text-anchor: middle; fill: #1a202c } .left { text-anchor: start }
"""


@dataclass
class Drawing:
    """A picture of boxes and arrows; lengths in pixels, from the upper left corner."""

    title: str
    width: int
    height: int
    parts: list[str] = field(default_factory=list)

    def box(self, kind: str, x: int, y: int, width: int, name: str, *lines: str, height: int = 56) -> None:
        """A box with its name in bold and small lines below; ``kind``: data, step or end."""
        self.parts.append(f'<rect class="{kind}" x="{x}" y="{y}" width="{width}" height="{height}" rx="4"/>')
        top = y + height / 2 - 7.5 * len(lines) + 4
        self.parts.append(f'<text class="bold" x="{x + width / 2:g}" y="{top:g}">{escape(name)}</text>')
        for number, line in enumerate(lines, 1):
            below = top + 1 + 15 * number
            self.parts.append(f'<text class="small" x="{x + width / 2:g}" y="{below:g}">{escape(line)}</text>')

    def arrow(self, path: str, late: bool = False) -> None:
        self.parts.append(f'<path class="arrow{" late" if late else ""}" d="{path}"/>')

    def text(self, x: int, y: int, words: str, kind: str = 'left') -> None:
        self.parts.append(f'<text class="{kind}" x="{x}" y="{y}">{escape(words)}</text>')

    def svg(self) -> str:
        size = f'viewBox="0 0 {self.width} {self.height}" width="{self.width}" height="{self.height}"'
        size_of_tip = 'markerWidth="8" markerHeight="8" refX="7" refY="4" orient="auto"'
        tip = f'<marker id="tip" {size_of_tip}><path d="M0,0 L8,4 L0,8 z" fill="#2d3748"/></marker>'
        return '\n'.join(
            [
                f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="14" role="img">',
                f'  <title>{escape(self.title)}</title>',
                f'  <style>{STYLE}  </style>',
                f'  <defs>{tip}</defs>',
                f'  <rect width="{self.width}" height="{self.height}" fill="white"/>',
                *(f'  {part}' for part in self.parts),
                '</svg>\n',
            ]
        )


ROOMS = dict(
    cli='the command recnext',
    web='pages in a browser',
    serving='predictions over HTTP',
    benchmarks='beside mmseg',
    reports='pages about runs',
    export='Core ML, ONNX',
    predict='recnext.load, a Model, files, videos',
    openmmlab='everything that touches OpenMMLab: configs, the Runner, hooks, data',
    runtimes='networks in other engines',
    timm='the models in timm',
    samples='drawn scenes',
    drawing='overlays',
    checkpoints='found, fetched, read, written, renamed; config.json',
    models='networks, folding, label maps, preprocessing, in torch alone',
    utils='files, images, devices, errors',
)


def rooms() -> Drawing:
    """The layers that import-linter checks, from pyproject.toml."""
    contracts = tomllib.loads((ROOT / 'pyproject.toml').read_text())['tool']['importlinter']['contracts']
    layers = [layer.split(' | ') for layer in contracts[0]['layers']]
    drawing = Drawing('The rooms of the package: each imports only rooms below it', 800, 76 * len(layers) + 76)
    drawing.box('data', 20, 12, 760, 'tools', 'thin files of a clone, one for each command', height=52)
    for row, layer in enumerate(layers, 1):
        width = (760 - 16 * (len(layer) - 1)) // len(layer)
        for column, room in enumerate(layer):
            drawing.box('step', 20 + column * (width + 16), 12 + 76 * row, width, room, ROOMS[room], height=52)
        drawing.arrow(f'M400,{76 * row - 12} V{76 * row + 10}')
    return drawing


def image() -> Drawing:
    drawing = Drawing('The way of an image from the file to its label map', 900, 385)
    drawing.box('data', 20, 30, 150, 'file', 'JPEG, PNG, TIFF, ...')
    drawing.box('step', 210, 30, 190, 'read', 'upright, 3 channels, 8 bits')
    drawing.box('step', 440, 30, 210, 'test pipeline', 'shorter side 512, then', 'both sides multiples of 32')
    drawing.box('step', 690, 30, 190, 'preprocessor', 'normalised, channels last')
    drawing.arrow('M170,58 H208'), drawing.arrow('M400,58 H438'), drawing.arrow('M650,58 H688')
    drawing.arrow('M785,86 V118 H115 V148')
    drawing.box('step', 20, 150, 190, 'RecNeXt', 'four maps,', 'strides 4, 8, 16, 32')
    drawing.box('step', 250, 150, 210, 'FPN and FPNHead', 'folded into each other')
    drawing.box('data', 500, 150, 170, 'logits', '150 × H/4 × W/4')
    drawing.arrow('M210,178 H248'), drawing.arrow('M460,178 H498'), drawing.arrow('M585,206 V238 H115 V268')
    drawing.box('step', 20, 270, 190, 'rule out', 'classes that cannot win', 'in a tile of 32 × 32')
    drawing.box('step', 250, 270, 170, 'evaluate', 'the 2 or 3 that are left')
    drawing.box('step', 460, 270, 190, 'settle', 'near ties, with', "mmseg's own operations")
    drawing.box('end', 690, 270, 190, 'label map', 'original size, every', "pixel equal to mmseg's")
    drawing.arrow('M210,298 H248'), drawing.arrow('M420,298 H458'), drawing.arrow('M650,298 H688')
    drawing.arrow('M670,178 H785 V268', late=True)
    drawing.text(785, 142, 'mmseg: 150 maps', 'small'), drawing.text(785, 158, 'resized twice, argmax', 'small')
    drawing.arrow('M785,326 V348')
    drawing.text(785, 368, 'PNG, areas (JSON), overlay', 'small')
    return drawing


def checkpoint() -> Drawing:
    drawing = Drawing('The way of a checkpoint from its source to its use', 900, 470)
    drawing.box('data', 20, 20, 200, 'recnext_m3_ade20k', 'a released name')
    drawing.box('data', 20, 100, 200, 'file or address', '.pth, .safetensors')
    drawing.box('data', 20, 180, 200, 'hf://user/name', 'the Hugging Face hub')
    drawing.box('step', 270, 60, 170, 'fetch', 'whole or not at all,', 'SHA-256 on record')
    (
        drawing.arrow('M220,48 H245 V80 H268'),
        drawing.arrow('M220,128 H245 V96 H268'),
        drawing.arrow('M220,208 H255 V108 H268'),
    )
    drawing.box('step', 490, 60, 180, 'read_checkpoint', 'tensors, plain data:', 'nothing in it is run')
    drawing.box('step', 710, 60, 170, 'detect layout', '0.x, 1.x,', 'timm, mmpretrain')
    drawing.arrow('M440,88 H488'), drawing.arrow('M670,88 H708'), drawing.arrow('M795,116 V178')
    drawing.box('step', 710, 180, 170, 'convert_state_dict', 'names of 1.x')
    drawing.box('step', 490, 180, 180, 'fits exactly?', 'names, shapes, dtypes')
    drawing.box('end', 270, 180, 170, 'refused', 'each misfit by name')
    drawing.arrow('M710,208 H672'), drawing.arrow('M490,208 H442', late=True)
    drawing.text(466, 200, 'no', 'small'), drawing.text(592, 258, 'yes', 'left small')
    drawing.arrow('M580,236 V290'), drawing.arrow('M110,290 H790 V318'), drawing.arrow('M110,290 V318')
    drawing.arrow('M336,290 V318'), drawing.arrow('M563,290 V318')
    drawing.box('end', 20, 320, 180, 'train', 'load_from, init_cfg,', '--resume')
    drawing.box('step', 246, 320, 180, 'switch_to_deploy', 'norms and FPN folded')
    drawing.box('end', 473, 320, 180, 'convert', '1.x, 0.x, timm,', 'mmpretrain')
    drawing.box('end', 700, 320, 180, 'push', 'safetensors, config')
    drawing.arrow('M290,376 V402 H200 V408'), drawing.arrow('M380,376 V402 H480 V408')
    drawing.box('end', 110, 410, 180, 'test, predict', height=40)
    drawing.box('end', 390, 410, 180, 'export', height=40)
    return drawing


DRAWINGS = dict(rooms=rooms, image=image, checkpoint=checkpoint)

if __name__ == '__main__':
    for name, draw in DRAWINGS.items():
        (FOLDER / f'{name}.svg').write_text(draw().svg())
