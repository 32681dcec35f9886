"""The commands: which there are, what they say of themselves, and what is done with what they are given."""

import argparse
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers.reference import ROOT, config_of, genuine_maps
from helpers.tools import assert_user_error, run_python
from PIL import Image

from projects.recnext.recnext import __version__
from projects.recnext.recnext.checkpoints import download
from projects.recnext.recnext.checkpoints.convert import convert_file
from projects.recnext.recnext.cli import options
from projects.recnext.recnext.cli.doctor import describe_environment
from projects.recnext.recnext.cli.export import FORMATS
from projects.recnext.recnext.cli.main import COMMANDS, build_parser, load_command, main, parse_command
from projects.recnext.recnext.models.deployable import FUSE
from projects.recnext.recnext.openmmlab.config import load_config
from projects.recnext.recnext.runtimes.deployment import ENGINES, PRECISIONS
from projects.recnext.recnext.utils.errors import UserError
from projects.recnext.recnext.utils.paths import list_configs

TOOLS = sorted(path.name for path in (ROOT / 'tools').glob('[a-z]*.py'))


def recnext(*arguments: object, **kwargs: object) -> subprocess.CompletedProcess:
    return run_python('-m', 'projects.recnext.recnext', *arguments, **kwargs)


HELPS = """
import runpy, sys
start, sys.argv = sys.argv[1], ['x', *sys.argv[2:]]
try:
    run = runpy.run_path if start.endswith('.py') else runpy.run_module
    run(start, run_name='__main__')
except SystemExit as end:
    assert end.code == 0
assert not {'torch', 'mmengine', 'numpy'} & set(sys.modules)
"""


@pytest.mark.parametrize(
    'start',
    [*(['tools/' + tool] for tool in TOOLS), [], *([command] for command in COMMANDS)],
    ids=lambda start: ' '.join(start) or 'recnext',
)
def test_help_imports_nothing_heavy(start):
    module = ['projects.recnext.recnext'] if not start or start[0] in COMMANDS else []
    result = subprocess.run(
        [sys.executable, '-c', HELPS, *module, *start, '--help'], capture_output=True, text=True, cwd=ROOT,
        env=dict(PYTHONPATH=f'{ROOT}:{ROOT / "tools"}'),
    )  # fmt: skip
    assert result.returncode == 0 and 'usage' in result.stdout, result.stderr


def test_every_tool_is_a_command_and_says_the_same_of_itself():
    named = {tool: re.search(r"run_tool\('([\w-]+)'", (ROOT / 'tools' / tool).read_text()) for tool in TOOLS}
    assert [tool for tool, found in named.items() if not found] == ['update_model_zoo.py']
    commands = {found[1] for found in named.values() if found}
    assert commands == set(COMMANDS) - {'configs', 'doctor'}
    for tool, found in named.items():
        if found and found[1] != 'export':
            assert (ROOT / 'tools' / tool).read_text().startswith(f'"""{load_command(found[1]).__doc__}"""')


def test_the_list_of_commands_says_what_each_says_of_itself():
    sentences = {name: load_command(name).__doc__.split(':')[0].rstrip('.') for name in COMMANDS}
    assert all(sentences[name].startswith(sentence) for name, sentence in COMMANDS.items())
    listed = recnext('--help').stdout
    assert all(re.search(rf'^  {name} ', listed, re.MULTILINE) for name in COMMANDS)
    assert recnext('--version').stdout == f'recnext {__version__}\n'


def test_a_command_imports_no_other():
    code = 'import sys; from projects.recnext.recnext.cli.main import main\ntry: main(["train", "--help"])\n'
    code += 'finally: print(*(name for name in sys.modules if ".cli." in name), file=sys.stderr)'
    result = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=ROOT)
    files = {name.rpartition('.')[2] for name in result.stderr.split()}
    assert files == {'main', 'options', 'train'}, result.stderr


ORDERS = [
    ('train', 'c.py --amp --work-dir w', dict(config='c.py', amp=True, work_dir='w', resume=None)),
    ('train', '--resume c.py', dict(config='c.py', resume='auto')),
    ('train', '--resume a.pth c.py', dict(config='c.py', resume='a.pth')),
    ('train', '--work-dir w c.py --resume', dict(config='c.py', resume='auto', work_dir='w')),
    ('train', '--cfg-options a=1 b.c=2 --launcher none c.py', dict(config='c.py', cfg_options={'a': 1, 'b.c': 2})),
    ('test', 'c.py a.pth --tta', dict(config='c.py', checkpoint='a.pth', tta=True)),
    ('test', 'c.py --work-dir w a.pth', dict(config='c.py', checkpoint='a.pth', work_dir='w')),
    ('test', '--show-dir d c.py --launcher none a.pth', dict(config='c.py', checkpoint='a.pth', show_dir='d')),
    ('test', 'c.py a.pth --eval mIoU --out d', dict(config='c.py', checkpoint='a.pth', out='d')),
    ('test', 'c.py --out d', dict(config='c.py', checkpoint=None)),
    ('predict', 'N --device cpu a.pth b.jpg', dict(config='N', checkpoint='a.pth', inputs=['b.jpg'], device='cpu')),
    ('predict', '--fuse none N b.jpg', dict(config='N', checkpoint=None, inputs=['b.jpg'])),
    ('predict', 'N a.pth b.jpg --no-overlay c d', dict(checkpoint='a.pth', inputs=['b.jpg', 'c', 'd'])),
    ('predict', 'N a.pth -- -b.jpg', dict(checkpoint='a.pth', inputs=['-b.jpg'])),
    ('download', 'a --dir d b', dict(names=['a', 'b'], folder='d')),
]


@pytest.mark.parametrize(('command', 'arguments', 'expected'), ORDERS, ids=lambda value: value)
def test_options_and_positionals_come_in_any_order(command, arguments, expected):
    args = vars(parse_command(command, arguments.split()))
    assert {name: args[name] for name in expected} == expected


@pytest.mark.parametrize('name', COMMANDS)
def test_no_option_is_abbreviated(name):
    parser = argparse.ArgumentParser(allow_abbrev=False)
    load_command(name).add_arguments(parser)
    long = [option for action in parser._actions for option in action.option_strings if len(option) > 6]
    for option in long:
        if option[:-1] not in parser._option_string_actions:
            assert parser._get_option_tuples(option[:-1]) == []


@pytest.mark.parametrize(
    'arguments', [['train', 'c.py'], ['train', 'c.py', '--cfg-options', 'a=1'], ['test', 'c', 'p']]
)
def test_without_openmmlab_one_sentence_says_how_to_install_it(arguments):
    code = "import sys; sys.modules |= dict.fromkeys(['mmengine', 'mmcv', 'mmseg', 'mmpretrain'])\n"
    code += f'from projects.recnext.recnext.cli.main import main; main({arguments})'
    result = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=ROOT)
    assert_user_error(result, 'is not installed, which this needs: pip install ".[mmseg]"')
    assert len(result.stderr.splitlines()) == 1


def test_the_words_of_the_options_are_those_of_the_package():
    parser = argparse.ArgumentParser()
    options.add_network_options(parser)
    choices = {action.dest: tuple(action.choices) for action in parser._actions if action.choices}
    assert choices['fuse'] == FUSE
    assert choices['precision'] == PRECISIONS and choices['engine'] == ENGINES


@pytest.mark.parametrize('shell', ['bash', 'zsh', 'fish'])
def test_completion(shell):
    result = recnext('--print-completion', shell)
    assert result.returncode == 0 and all(command in result.stdout for command in COMMANDS), result.stderr
    check = dict(bash=['bash', '-n']).get(shell)
    if check:
        assert subprocess.run(check, input=result.stdout, text=True).returncode == 0


def test_configs_are_listed_and_named_without_their_path(capsys, tmp_path, monkeypatch):
    main(['configs', 'm3', 'fpn'])
    assert capsys.readouterr().out == f'{config_of("m3").stem}  (recnext_m3_ade20k)\n'
    main(['configs'])
    assert len(capsys.readouterr().out.splitlines()) == len(list_configs()) > 30
    with pytest.raises(SystemExit, match='No name of a config holds m3 and nothing'):
        main(['configs', 'm3', 'nothing'])
    monkeypatch.chdir(tmp_path)
    for name in (config_of('m3').stem, config_of('m3').name, 'recnext_m3_ade20k', str(config_of('m3'))):
        assert load_config(name).filename == str(config_of('m3'))
    (tmp_path / 'mine.py').write_text('a = 1')
    assert load_config('mine.py').a == 1
    with pytest.raises(UserError, match=r'No such config: fpn_recnext\n?.*configs'):
        load_config('fpn_recnext')


def test_doctor_names_what_is_there_and_what_is_missing(monkeypatch):
    said = list(describe_environment())
    assert '  train, test: yes' in said and '  web: ready' in said
    assert any(line.startswith('  cpu: ') for line in said)
    find = importlib.util.find_spec
    monkeypatch.setattr(
        'importlib.util.find_spec', lambda name, *_: None if name in ('onnx', 'sklearn') else find(name)
    )
    said = list(describe_environment())
    assert '  export --to onnx: pip install onnx' in said
    assert '  export --to coreml --compress palettize: pip install scikit-learn' in said


INT8 = ('--to', 'onnx', '--precision', 'int8')


@pytest.mark.parametrize(
    ('arguments', 'words'),
    [
        ([], 'COMMAND'),
        (['predict'], 'CONFIG'),
        (['download'], 'expected either NAME or --all'),
        (['download', 'recnext_m3_ade20k', '--all'], 'expected either NAME or --all'),
        (['export', 'a', 'b', '--out', 'c', '--to', 'onnx', '--target', 'iOS16'], '--target is for --to coreml'),
        (['export', 'a', 'b', '--out', 'c', '--to', 'executorch', '--compress', 'none'], '--compress is for'),
        (['export', 'a', 'b', '--out', 'c', '--to', 'executorch', '--precision', 'fp16'], '--precision fp16 is not'),
        (['export', 'a', 'b', '--out', 'c'], '--to'),
        (['export', 'a', 'b', '--out', 'c', '--to', 'onnx', '--calibrate', 'd'], '--calibrate is for --precision int8'),
        (['export', 'a', 'b', '--out', 'c', '--to', 'onnx', '--keep-float', 'd'], '--keep-float is for'),
        (['export', 'a', 'b', '--out', 'c', *INT8, '--max-drop', '-1'], 'expected a number of at least 0'),
        (['export', 'a', 'b', '--out', 'c', *INT8, '--max-drop', '2', '--no-verify'], '--max-drop needs a segmentor'),
        (['train', 'a', '--cfg-options', 'no-equals-sign'], '--cfg-options takes key=value'),
    ],
)
def test_wrong_use_exits_with_2(arguments, words, capsys):
    with pytest.raises(SystemExit) as end:
        main(arguments)
    said = capsys.readouterr().err
    assert end.value.code == 2 and words in said and said.startswith('usage: recnext')


def test_formats_are_those_there_are():
    parser = build_parser()
    assert set(FORMATS) == {'coreml', 'executorch', 'litert', 'onnx', 'web'} and parser.parse_args(
        ['export', 'a', '--to', 'coreml', '--out', 'b', '--precision', 'fp32']
    ).precision == 'fp32'  # fmt: skip


@pytest.fixture
def released_m3(real_m3, tmp_path, monkeypatch) -> Path:
    """A folder in the place of ``checkpoints/`` with the genuine M3 as the release."""
    monkeypatch.setattr(download, 'CHECKPOINTS', tmp_path / 'checkpoints')
    (tmp_path / 'checkpoints').mkdir()
    convert_file(real_m3, tmp_path / 'checkpoints' / 'recnext_m3_ade20k.pth')
    return tmp_path / 'checkpoints'


def test_a_released_name_brings_its_own_weights(released_m3, ade20k_sample, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    photos = sorted(str(path) for path in (ade20k_sample / 'images' / 'validation').glob('*.jpg'))[:2]
    main(['predict', 'recnext_m3_ade20k', *photos])
    for photo in photos:
        labels = Image.open(tmp_path / 'predicted' / 'labels' / f'{Path(photo).stem}.png')
        assert (np.array(labels) != genuine_maps()[Path(photo).stem]).sum() == 0


def test_weights_that_are_not_there_are_downloaded_first(released_m3, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(download, 'download_release', lambda release, folder: asked.append((release['name'], folder)))
    place = download.find_released_weights('recnext_a4_ade20k')
    assert place == released_m3 / 'recnext_a4_ade20k.pth' and asked == [('recnext_a4_ade20k', released_m3)]
    with pytest.raises(UserError, match='expected weights for it'):
        download.find_released_weights('mine.py')


def test_a_mistake_is_said_without_a_traceback(tmp_path):
    assert_user_error(recnext('predict', 'no_such', 'a.jpg', cwd=tmp_path), 'No such config: no_such')


def test_a_reader_that_has_ended_is_no_error():
    command = [sys.executable, '-m', 'projects.recnext.recnext', 'configs']
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT)
    process.stdout.close()
    assert (process.stderr.read(), process.wait()) == (b'', 141)
    process.stderr.close()


def test_the_device_is_looked_for_before_anything_is_fetched(monkeypatch, capsys):
    monkeypatch.setattr(download, 'find_released_weights', lambda config: pytest.fail('fetched'))
    with pytest.raises(SystemExit, match="error: 'foo' is no device"):
        main(['test', 'recnext_m3_ade20k', '--device', 'foo'])
