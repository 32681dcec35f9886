"""The site made of the Markdown pages (`make docs`), which stay where they are: their links work on GitHub too."""

import json
import os
import re
import sys
import zlib
from pathlib import Path

import yaml
from docutils import nodes
from myst_parser.parsers.sphinx_ import MystParser
from sphinx.addnodes import download_reference, pending_xref
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.transforms import SphinxTransform
from sphinx.util.nodes import make_refnode

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / 'projects' / 'recnext' / 'recnext'
sys.path[:0] = [str(ROOT), str(ROOT / 'docs')]

from notebook_text import to_markdown  # noqa: E402  (beside this file)

project = 'RecNeXt with Semantic FPN'
author = 'the authors of recnext-semfpn'
copyright = f'{author}, Apache-2.0'
extensions = [
    'myst_parser',
    'sphinx.ext.autodoc',
    'sphinx.ext.napoleon',
    'sphinx.ext.intersphinx',
    'sphinxarg.ext',
    'sphinx_copybutton',
]

# The pages, wherever they are in the repository.
root_doc = 'docs/index'
include_patterns = ['docs/**', '*.md', 'checkpoints/README.md', 'examples/**/README.md', 'projects/recnext/README.md']
exclude_patterns = ['.venv', 'build', 'data', 'work_dirs', '.github', 'docs/_static']
nitpicky = True
highlight_language = 'text'
show_warning_types = True

myst_heading_anchors = 4
myst_ref_domains = ['std', 'py']

autodoc_member_order = 'bysource'
autodoc_typehints = 'description'
autodoc_typehints_description_target = 'documented_params'
autodoc_inherit_docstrings = False
napoleon_numpy_docstring = False
napoleon_use_rtype = False

html_theme = 'furo'
html_title = project
html_static_path = ['_static']
html_css_files = ['site.css']
html_extra_path = ['_static/index.html']  # leads from the folder of the site to its first page
html_copy_source = False
html_show_sphinx = False
copybutton_exclude = '.linenos, .gp, .go'


def write_inventories(folder: Path) -> dict[str, tuple[str, str]]:
    """What intersphinx asks the public docs for, from the names in inventories.yaml: building needs no network."""
    folder.mkdir(parents=True, exist_ok=True)
    mapping = {}
    for name, site in yaml.safe_load((ROOT / 'docs' / 'inventories.yaml').read_text()).items():
        lines = [
            f'{entry} py:{role} 1 {page} -' for role, pages in site['objects'].items() for entry, page in pages.items()
        ]
        head = f'# Sphinx inventory version 2\n# Project: {name}\n# Version: \n# The rest is compressed using zlib.\n'
        path = folder / f'{name}.inv'
        path.write_bytes(head.encode() + zlib.compress('\n'.join([*lines, '']).encode()))
        mapping[name] = (site['address'], str(path))
    return mapping


intersphinx_mapping = write_inventories(ROOT / 'build' / 'inventories')


class LinkToRepository(SphinxTransform):
    """A link to a file that is not a page leads to the repository, if its address is known.

    If it is not, the file is copied into the site, and a folder loses its link.
    """

    default_priority = 10

    def apply(self, **kwargs: object) -> None:
        address = os.environ.get('REPOSITORY')
        folder = (ROOT / self.env.docname).parent
        for node in [*self.document.findall(download_reference), *self.document.findall(pending_xref)]:
            path = Path(os.path.normpath(folder / node['reftarget']))
            if isinstance(node, pending_xref) and not (node['reftype'] == 'myst' and path.is_dir()):
                continue
            if address:
                kind = 'tree' if path.is_dir() else 'blob'
                uri = f'{address}/{kind}/main/{path.relative_to(ROOT).as_posix()}'
                node.replace_self(nodes.reference('', '', *node.children, refuri=uri))
            elif path.is_dir():
                node.replace_self(nodes.inline('', '', *node.children))


class NotebookParser(MystParser):
    """A page out of a notebook; nothing in it is run."""

    supported = ('notebook',)

    def parse(self, inputstring: str, document: nodes.document) -> None:
        super().parse('\n\n'.join(to_markdown(json.loads(inputstring))), document)


def find_in_package(
    app: Sphinx, env: BuildEnvironment, node: pending_xref, contnode: nodes.Element
) -> nodes.Node | None:
    """What a docstring names as its file does: a link if the reference has it, code if only the package has."""
    if node.get('refdomain') != 'py':
        return None
    python, target = env.domains.python_domain, node['reftarget']
    found = {
        entry.node_id: (name, entry) for name, entry in python.objects.items() if f'.{name}'.endswith(f'.{target}')
    }
    if len(found) == 1:
        ((name, entry),) = found.values()
        return make_refnode(app.builder, node['refdoc'], entry.docname, entry.node_id, contnode, name)
    word = re.escape(target.rpartition('.')[2])
    defined = re.compile(rf'^\s*(?:class|def) {word}\b|^{word}\b.* = ', re.MULTILINE)
    files = list(PACKAGE.rglob('*.py'))
    known = any(path.stem == word or defined.search(path.read_text()) for path in files)
    return contnode if known else None


def setup(app: Sphinx) -> None:
    app.add_source_suffix('.ipynb', 'notebook')
    app.add_source_parser(NotebookParser)
    app.add_transform(LinkToRepository)
    app.connect('missing-reference', find_in_package)
