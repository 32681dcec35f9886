"""What the pages say: every link, path, command, option and setting that they name exists."""

import argparse
import ast
import functools
import importlib
import importlib.util
import io
import itertools
import json
import os
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

import _cli
import pytest
import yaml
from helpers.reference import CLASSIFIER_CONFIGS, ROOT, config_of
from markdown_it import MarkdownIt
from markdown_it.token import Token
from mmengine.config import Config
from notebook_text import to_markdown

from projects.recnext.recnext.cli import main

FOLDERS = ('.github', 'checkpoints', 'docs', 'examples', 'projects', 'tests', 'tools')
FILES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob('*') if path.is_file())
FILES += sorted(path for path in ROOT.iterdir() if path.is_file())
PAGES = [path.relative_to(ROOT) for path in FILES if path.suffix in ('.md', '.ipynb')]
TOOLS = sorted(path.name for path in (ROOT / 'tools').glob('[!_]*.py'))
SCRIPTS = sorted(path.name for path in (ROOT / 'tools').glob('[!_]*.sh'))
SCRIPT_OPTIONS = {
    option for path in (ROOT / 'tools').glob('*.*h') for option in re.findall(r'--[a-z][\w-]*', path.read_text())
}
"""What the launch scripts take, and what they hand to torchrun and srun."""
TARGETS = re.search(r'^\.PHONY: (.*)$', (ROOT / 'Makefile').read_text(), re.MULTILINE)[1].split()

INTERPRETERS = ('python', 'python3', '.venv/bin/python', 'bash')
OLD_NAMES = 'mmseg 0.30:'
"""A table whose header begins so has names in its first column that are no longer there."""


@dataclass
class Page:
    """What a Markdown page names."""

    path: Path
    """From the root of the repository."""
    links: list[str] = field(default_factory=list)
    headings: list[str] = field(default_factory=list)
    spans: list[str] = field(default_factory=list)
    """Inline code, but for old names."""
    blocks: list[tuple[str, str]] = field(default_factory=list)
    """Language and content of fenced code."""

    @property
    def anchors(self) -> set[str]:
        """As GitHub makes them of headings."""
        found: set[str] = set()
        for heading in self.headings:
            slug = re.sub(r'[^\w\- ]', '', heading.lower()).replace(' ', '-')
            again = (f'{slug}-{number}' for number in itertools.count(1))
            found.add(slug if slug not in found else next(name for name in again if name not in found))
        return found

    @property
    def scripts(self) -> set[str]:
        """Files that the page has its reader write: Python blocks that begin with their name."""
        names = (re.match(r'# (\S+\.py)\n', content) for language, content in self.blocks if language == 'python')
        return {name[1] for name in names if name}

    @property
    def commands(self) -> Iterator[list[str]]:
        """Words of every command, in shell blocks and inline."""
        lines = [
            line
            for language, content in self.blocks
            if language in ('bash', 'sh')
            for line in content.replace('\\\n', ' ').splitlines()
        ]
        for line in [*lines, *(span for span in self.spans if ' ' in span)]:
            try:
                words = shlex.split(line, comments=True)
            except ValueError:  # inline code of another language
                continue
            while words:
                end = next((index for index, word in enumerate(words) if word in ('&&', '||', '|', ';')), len(words))
                yield words[:end]
                words = words[end + 1 :]


def read_page(text: str, path: Path = Path('page.md')) -> Page:
    """Parse Markdown as GitHub does, tables included."""
    page, column, old = Page(path), 0, False
    tokens = MarkdownIt('commonmark').enable('table').parse(text)
    for before, token in zip([Token('', '', 0), *tokens], tokens):
        if token.type == 'table_open':
            old = False
        elif token.type == 'tr_open':
            column = 0
        elif token.type in ('th_open', 'td_open'):
            column += 1
        elif token.type == 'fence':
            page.blocks.append((token.info.strip(), token.content))
        elif token.type == 'inline':
            if before.type == 'th_open' and column == 1:
                old = token.content.startswith(OLD_NAMES)
            if before.type == 'heading_open':
                page.headings.append(''.join(part.content for part in token.children))
            in_table = before.type in ('th_open', 'td_open')
            for part in token.children:
                page.links += [str(part.attrs[key]) for key in ('href', 'src') if key in part.attrs]
                if part.type == 'code_inline' and not (in_table and old and column == 1):
                    page.spans.append(part.content)
    return page


def text_of(path: Path) -> str:
    """A page as Markdown."""
    text = (ROOT / path).read_text()
    return '\n\n'.join(to_markdown(json.loads(text))) if path.suffix == '.ipynb' else text


@functools.cache
def configs() -> list[Config]:
    """One of a segmentor, one of a classifier."""
    distilled = next(path for path in CLASSIFIER_CONFIGS if 'm3-distilled' in path.name)
    return [Config.fromfile(path) for path in (config_of('m3'), distilled)]


@functools.cache
def help_of(tool: str) -> str:
    """What ``--help`` prints, run as a user does."""
    command = [sys.executable, str(ROOT / 'tools' / tool), '--help']
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return result.stdout


def refusal_of_recnext(arguments: list[str]) -> str:
    """What the command's parser has against these arguments; nothing, if they are a command and no more."""
    if len(arguments) == 1 and arguments[0] in main.COMMANDS:
        return ''
    said = io.StringIO()
    with mock.patch.object(main, 'carry_out'), redirect_stderr(said), redirect_stdout(io.StringIO()):
        try:
            main.main(arguments)
        except SystemExit as end:
            if end.code:
                return said.getvalue().splitlines()[-1]
    return ''


def refusal_of(tool: str, arguments: list[str]) -> str:
    """What the tool's own parser, without abbreviations, has against these arguments."""
    parse = argparse.ArgumentParser.parse_args

    def parse_whole_words(parser: argparse.ArgumentParser, *given: object) -> argparse.Namespace:
        parser.allow_abbrev = False
        return parse(parser, *given)

    said = io.StringIO()
    with (
        mock.patch.object(argparse.ArgumentParser, 'parse_args', parse_whole_words),
        mock.patch.object(sys, 'argv', [tool, *arguments]),
        mock.patch.object(_cli, 'carry_out'),
        mock.patch.object(main, 'carry_out'),
        redirect_stderr(said),
        redirect_stdout(io.StringIO()),
    ):
        try:
            runpy.run_path(str(ROOT / 'tools' / tool), run_name='__main__')
        except SystemExit as end:
            if end.code:
                return said.getvalue().splitlines()[-1]
    return ''


def exists(name: str, page: Page) -> bool:
    return name in page.scripts or (ROOT / name).exists()


class Checker:
    """Complaints about a page, as texts.

    Args:
        stand_in: Program that prints its arguments, one a line; in the place of Python and srun under the scripts.
        has_option: Whether pytest knows an option.
    """

    def __init__(self, stand_in: Path, has_option: Callable[[str], bool]) -> None:
        self.stand_in = stand_in
        self.has_option = has_option

    def __call__(self, page: Page) -> Iterator[str]:
        for link in page.links:
            yield from self.check_link(link, page)
        for words in page.commands:
            yield from self.check_command(words, page)
        for span in page.spans:
            yield from self.check_span(span, page)
        for language, content in page.blocks:
            if language == 'python':
                yield from self.check_python(content)

    def check_link(self, link: str, page: Page) -> Iterator[str]:
        if re.match(r'[a-z]+:', link):  # elsewhere: nobody to ask without a network
            return
        target, _, anchor = link.partition('#')
        path = (ROOT / page.path.parent / target).resolve() if target else ROOT / page.path
        if target and not (path.exists() and path.is_relative_to(ROOT)):
            yield f'link to {link}, which does not exist'
        elif anchor:
            there = read_page(path.read_text()) if target else page
            if anchor not in there.anchors:
                yield f'link to {link}, but there is no such heading'

    def check_command(self, words: list[str], page: Page) -> Iterator[str]:
        command = ' '.join(words)
        environment = {}
        while words and re.match(r'[A-Z_]+=', words[0]):
            name, _, environment[name] = words[0].partition('=')
            words = words[1:]
        started = bool(words) and words[0] in INTERPRETERS
        words = words[started:]
        if not words:
            return
        program, arguments = words[0], words[1:]
        if program == 'make':
            for target in arguments:
                if '=' not in target and target not in TARGETS:
                    yield f'{command}: no target {target} in the Makefile'
        elif [program, *arguments[:1]] == ['-m', 'pytest']:
            yield from self.check_pytest(arguments[1:], command)
        elif program == 'recnext':
            refusal = refusal_of_recnext(arguments)
            if refusal:
                yield f'{command}: {refusal}'
            yield from self.check_settings(arguments, command)
        elif program == 'pip':
            for flag, name in itertools.pairwise(arguments):
                if flag == '-r' and not exists(name, page):
                    yield f'{command}: no file {name}'
        elif re.fullmatch(r'\S+\.(py|sh)', program):
            if not exists(program, page):
                yield f'{command}: no file {program}'
            elif program.startswith('tools/') and not started:  # no command, but an option of that tool
                for word in arguments:
                    if word.startswith('--') and word not in _options(Path(program).name):
                        yield f'{command}: no option {word}'
            elif program.startswith('tools/'):
                yield from self.check_tool(Path(program).name, arguments, environment, command)
            for name in arguments:
                if name.endswith('.py') and not exists(name, page):
                    yield f'{command}: no file {name}'

    def check_tool(self, name: str, arguments: list[str], environment: dict, command: str) -> Iterator[str]:
        if name in SCRIPTS:
            result = subprocess.run(
                ['bash', ROOT / 'tools' / name, *arguments],
                env={**os.environ, **environment, 'PYTHON': str(self.stand_in), 'PATH': self.path},
                capture_output=True, text=True, timeout=60,
            )  # fmt: skip
            if result.returncode:
                yield f'{command}: {result.stderr.strip()}'
                return
            # A script ends by starting a tool; from its name on, the words are the tool's.
            started = result.stdout.splitlines()
            index = next(index for index, word in enumerate(started) if Path(word).name in TOOLS)
            name, arguments = Path(started[index]).name, started[index + 1 :]
        refusal = refusal_of(name, arguments)
        if refusal:
            yield f'{command}: {refusal}'
        yield from self.check_settings(arguments, command)

    @property
    def path(self) -> str:
        return f'{self.stand_in.parent}:{os.environ["PATH"]}'

    def check_settings(self, arguments: list[str], command: str) -> Iterator[str]:
        """After ``--cfg-options``: that the config has them, or at least what they are settings of."""
        settings = False
        for word in arguments:
            if word.startswith('--'):
                settings = word == '--cfg-options'
            elif settings and '=' in word:
                parts = word.partition('=')[0].split('.')
                if not parts[0].isupper() and not _in_configs(parts[:-1] or parts):
                    yield f'{command}: no {".".join(parts)} in the configs'

    def check_pytest(self, arguments: list[str], command: str) -> Iterator[str]:
        for word in arguments:
            if word.startswith('--') and not self.has_option(word.partition('=')[0]):
                yield f'{command}: pytest has no option {word}'
            elif '/' in word and not (ROOT / word.partition('::')[0]).exists():
                yield f'{command}: no file {word}'

    def check_span(self, span: str, page: Page) -> Iterator[str]:
        if re.fullmatch(rf'({"|".join(map(re.escape, FOLDERS))})/\S+', span) and not _may_be_missing(span):
            if not exists(span.partition('::')[0], page):
                yield f'no file {span}'
        elif re.fullmatch(r'[\w.-]+\.(py|sh|txt|toml|yaml)', span):
            if span not in {path.name for path in FILES}:
                yield f'no file is called {span}'
        elif re.fullmatch(r'[a-z_]+(\.[a-z_]+)+', span) and _in_configs(span.split('.')[:1]):
            if not _in_configs(span.split('.')):
                yield f'no {span} in the configs'
        elif span.startswith('--'):
            options = [word for word in span.split() if word.startswith('--')]
            known = set(options) <= SCRIPT_OPTIONS or any(set(options) <= _options(tool) for tool in TOOLS)
            if not known and not all(map(self.has_option, options)):
                yield f'no tool has {span}'
            yield from self.check_settings(span.split(), span)

    def check_python(self, content: str) -> Iterator[str]:
        """That it is Python, and that what it imports from the package is there."""
        try:
            tree = ast.parse(content)
        except SyntaxError as error:
            yield f'not Python: {error}'
            return
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module.startswith('projects.'):
                try:
                    module = importlib.import_module(node.module)
                except ModuleNotFoundError:
                    yield f'no module {node.module}'
                    continue
                for name in node.names:
                    if not hasattr(module, name.name):
                        yield f'no {name.name} in {node.module}'


def _in_configs(parts: list[str]) -> bool:
    return any(_has(config, parts) for config in configs())


def _has(settings: object, parts: list[str]) -> bool:
    for part in parts:
        if not isinstance(settings, dict | Config) or part not in settings:
            return False
        settings = settings[part]
    return True


def _may_be_missing(path: str) -> bool:
    """Weights and the hashes of what was downloaded; git ignores or lacks them."""
    return path.startswith('checkpoints/') and path.endswith(('.pth', 'sha256.json'))


def _options(tool: str) -> set[str]:
    return set(re.findall(r'--[a-z][\w-]*', help_of(tool)))


@pytest.fixture(scope='module')
def complaints(tmp_path_factory, pytestconfig) -> Checker:
    stand_in = tmp_path_factory.mktemp('bin') / 'srun'
    stand_in.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    stand_in.chmod(0o755)
    unknown = object()
    return Checker(stand_in, lambda option: pytestconfig.getoption(option, default=unknown) is not unknown)


@pytest.mark.parametrize('path', PAGES, ids=str)
def test_what_a_page_names_exists(complaints, path):
    assert list(complaints(read_page(text_of(path), path))) == []


def test_the_pages_are_found():
    assert {'README.md', 'CONTRIBUTING.md', 'CHANGELOG.md', 'docs/own_dataset.md'} <= set(map(str, PAGES))
    readme = read_page((ROOT / 'README.md').read_text())
    assert len(readme.links) > 30 and len(list(readme.commands)) > 10 and 'two-commands' in readme.anchors


M3 = 'projects/recnext/configs/fpn_recnext-m3_8xb4-80k_ade20k-512x512.py'


@pytest.mark.parametrize(
    ('text', 'complaint'),
    [
        ('[page](docs/nowhere.md)', 'docs/nowhere.md, which does not exist'),
        ('![picture](docs/nowhere.png)', 'docs/nowhere.png, which does not exist'),
        ('[![picture](docs/nowhere.png)](README.md)', 'docs/nowhere.png, which does not exist'),
        ('[page][1]\n\n[1]: docs/nowhere.md', 'docs/nowhere.md, which does not exist'),
        ('[outside](../shared/FACTS.md)', '../shared/FACTS.md, which does not exist'),
        ('[part](README.md#nothing)', 'no such heading'),
        ('# One\n\n[part](#two)', 'no such heading'),
        ('```bash\npython tools/trian.py CONFIG\n```', 'no file tools/trian.py'),
        ('`python tools/trian.py CONFIG`', 'no file tools/trian.py'),
        ('```bash\npython tools/train.py CONFIG --no-validate\n```', 'unrecognized arguments: --no-validate'),
        ('```bash\npython tools/train.py \\\n  CONFIG --seed 1\n```', 'unrecognized arguments: --seed 1'),
        ('`python tools/train.py CONFIG --work DIR`', 'unrecognized arguments: --work DIR'),
        ('`python tools/infer.py CONFIG`', 'required: INPUT'),
        ('`python tools/test.py CONFIG CHECKPOINT --fuse some`', 'invalid choice'),
        ('`python tools/train.py CONFIG && python tools/infer.py CONFIG`', 'required: INPUT'),
        ('`python tools/train.py projects/recnext/configs/m3.py`', 'no file projects/recnext/configs/m3.py'),
        ('`python tools/train.py CONFIG --cfg-options optimizer.lr=1`', 'no optimizer.lr in the configs'),
        ('`tools/train.py --tta`', 'no option --tta'),
        ('`bash tools/dist_train.sh CONFIG`', 'usage: bash tools/dist_train.sh'),
        ('`bash tools/dist_test.sh CONFIG CHECKPOINT 8 --aug-test`', 'unrecognized arguments: --aug-test'),
        ('`GPUS=8 bash tools/slurm_train.sh PARTITION JOB CONFIG --gpus 8`', 'unrecognized arguments: --gpus 8'),
        ('`make tests`', 'no target tests'),
        ('```bash\nmake site\n```', 'no target site'),
        ('`pip install -r requirement.txt`', 'no file requirement.txt'),
        ('`python -m pytest tests/test_nothing.py`', 'no file tests/test_nothing.py'),
        ('`python -m pytest tests/openmmlab/test_resume.py --murders 3`', 'pytest has no option --murders'),
        ('`projects/recnext/recnext/nothing.py`', 'no file projects/recnext/recnext/nothing.py'),
        ('`nothing.py`', 'no file is called nothing.py'),
        ('`fpn_recnext-m9_8xb4-80k_ade20k-512x512.py`', 'no file is called fpn_recnext-m9'),
        ('`--auto-resume`', 'no tool has --auto-resume'),
        ('`--resume --sweep`', 'no tool has --resume --sweep'),
        ('`--cfg-options evaluation.interval=1`', 'no evaluation.interval in the configs'),
        ('`train_dataloader.samples_per_gpu`', 'no train_dataloader.samples_per_gpu in the configs'),
        (
            '```python\nfrom projects.recnext.recnext.nothing import one\n```',
            'no module projects.recnext.recnext.nothing',
        ),
        (
            '```python\nfrom projects.recnext.recnext.models.recnext import one\n```',
            'no one in projects.recnext.recnext.models.recnext',
        ),
        ('```python\nif\n```', 'not Python'),
        ('| mmseg 0.30: option | here |\n|---|---|\n| `--old` | `--new` |', 'no tool has --new'),
    ],
)
def test_a_page_that_is_wrong_is_seen(complaints, text, complaint):
    (found,) = complaints(read_page(text))
    assert complaint in found


@pytest.mark.parametrize(
    'text',
    [
        '[a](https://nowhere.example/x) [b](README.md#two-commands) [c](docs)',
        '# One, two `three`\n# One, two three\n[a](#one-two-three) [b](#one-two-three-1)',
        f'```bash\npython tools/test.py {M3} x.pth --out DIR  # a comment\n```',
        '`CUDA_VISIBLE_DEVICES=2 python tools/train.py CONFIG --resume --cfg-options randomness.deterministic=True`',
        '`NNODES=2 NODE_RANK=1 PORT=29500 bash tools/dist_train.sh CONFIG 8 --amp`',
        '```python\n# own/config.py\n```\n\n`python tools/train.py own/config.py`',
        '| mmseg 0.30: option | here |\n|---|---|\n| `--old`, `old.py` | `--tta` |',
        '```text\npython tools/nothing.py\n```',
        '`tools/test.py --out` and `tools/test.py`',
    ],
)
def test_a_page_that_is_right_passes(complaints, text):
    assert list(complaints(read_page(text))) == []


@pytest.mark.parametrize('tool', TOOLS)
def test_help(tool):
    assert help_of(tool).startswith(f'usage: {tool}')


@pytest.mark.parametrize('tool', TOOLS + SCRIPTS)
def test_every_tool_is_on_a_page(tool):
    pages = [path for path in PAGES if path.name != 'CHANGELOG.md']
    assert any(f'tools/{tool}' in (ROOT / path).read_text() for path in pages), f'no page names tools/{tool}'


def test_every_old_option_has_its_successor():
    """Those of mmseg 0.30's tools/train.py and tools/test.py, and the settings that people ask for."""
    section = (ROOT / 'docs' / 'migration.md').read_text()
    old = ' '.join(line.split('|')[1] for line in section.splitlines() if line.startswith('|'))
    named = set(re.findall(r'--[\w-]+', old))
    train = '--work-dir --load-from --resume-from --no-validate --gpus --gpu-ids --gpu-id --seed --diff_seed '
    train += '--deterministic --options --cfg-options --launcher --local_rank --auto-resume'
    test = (
        '--work-dir --aug-test --out --format-only --eval --show --show-dir --gpu-collect --gpu-id --tmpdir --options '
    )
    test += '--cfg-options --eval-options --launcher --opacity --local_rank'
    assert set(f'{train} {test}'.split()) <= named
    for setting in (
        'samples_per_gpu',
        'workers_per_gpu',
        'revise_keys',
        'evaluation',
        'lr_config',
        'checkpoint_config',
    ):
        assert setting in old


def test_hooks_run_the_ruff_of_the_lock():
    hooks = yaml.safe_load((ROOT / '.pre-commit-config.yaml').read_text())['repos']
    revisions = {Path(repo['repo']).name: repo['rev'] for repo in hooks}
    pinned = re.search(r'^ruff==(\S+)', (ROOT / 'requirements.lock').read_text(), re.MULTILINE)[1]
    assert revisions['ruff-pre-commit'] == f'v{pinned}'
    ids = [hook['id'] for repo in hooks for hook in repo['hooks']]
    assert ids == ['ruff-check', 'ruff-format', 'trailing-whitespace', 'end-of-file-fixer', 'check-yaml']


def test_the_workflow_calls_make():
    workflow = yaml.safe_load((ROOT / '.github' / 'workflows' / 'ci.yml').read_text())
    (job,) = workflow['jobs'].values()
    assert job['strategy']['matrix']['python-version'] == ['3.10', '3.11', '3.12']  # texts: 3.10 would be 3.1
    commands = [step['run'].split() for step in job['steps'] if 'run' in step]
    assert commands == [['make', 'lint'], ['make', 'docs'], ['make', 'test']]
    assert {'lint', 'docs', 'test'} <= set(TARGETS)
