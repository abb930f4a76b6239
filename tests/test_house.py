"""The rules of the house. Each rule is a function that returns its complaints; it is held against the repository, and against a house broken on purpose."""
import ast
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from nbdev.export import nb_export

from bmd_xray.core import InputError, project_root
from bmd_xray.presets import PRESETS, _imports, declared_parameters, list_experiments, load_presets, resolve_parameters

ROOT = project_root()
TRAINING = ['anatomy', 'drr', 'xray', 'cohort', 'pairs', 'models.generators', 'losses', 'decomposition', 'metrics', 'volume', 'batches', 'tissue']
NOT_FOR_TRAINING = ['SimpleITK', 'papermill', 'pingouin', 'seaborn', 'statsmodels'] # a GPU machine need not have them


def lessons(root): return sorted(p for p in (root/'nbs').glob('*.ipynb') if '-checkpoint' not in p.name)
def experiments(root): return [root/'nbs/experiments'/f'{n}.ipynb' for n in list_experiments(root/'nbs/experiments')]
def cells(path, kind='code'): return [c for c in json.loads(path.read_text(encoding='utf-8'))['cells'] if c['cell_type'] == kind]
def source(cell): return ''.join(cell['source'])
def outputs(path): return [o for c in cells(path) for o in c['outputs']]
def text(output): return ''.join(output.get('text', '')) + ''.join(''.join(v) for k, v in output.get('data', {}).items() if k.startswith('text/'))


def exported(root):
    "The library is what the notebooks export: an edit in only one of the two is lost."
    with tempfile.TemporaryDirectory() as d:
        lib = Path(d)/'bmd_xray' # nbdev makes imports relative by this name
        for nb in lessons(root): nb_export(nb, lib_path=lib)
        new = {p.relative_to(lib): p.read_text() for p in lib.rglob('*.py')}
    generated = lambda p: p.name not in ('_modidx.py', '__init__.py')
    old = {p.relative_to(root/'bmd_xray'): p.read_text() for p in (root/'bmd_xray').rglob('*.py')}
    without_paths = lambda s: re.sub(r'(File to edit: |# %% ).*/', r'\1', s or '')
    return [f'bmd_xray/{p}: differs from its notebook' for p in sorted({*filter(generated, new), *filter(generated, old)})
            if without_paths(new.get(p)) != without_paths(old.get(p))]


def one_way(root):
    "Data flow one way: a notebook imports only notebooks with a smaller number."
    numbers, imports = {}, {}
    for path in (root/'bmd_xray').rglob('*.py'):
        if not (header := re.search(r'File to edit: \S*?(\d+)_\S+\.ipynb', path.read_text())): continue
        module = '.'.join(path.relative_to(root/'bmd_xray').with_suffix('').parts)
        numbers[module], imports[module] = int(header[1]), _imports(path.read_text(), f'bmd_xray.{module}'.rpartition('.')[0])
    return [f'{m} ({numbers[m]}) imports {i} ({numbers[i]})' for m in numbers for i in imports[m] if i in numbers and numbers[i] >= numbers[m]]


def named_after_their_module(root):
    "NN_name.ipynb exports the module `name`."
    found = {p: re.search(r'#\|\s*default_exp\s+(\S+)', source(cells(p)[0])) for p in lessons(root) if re.match(r'\d', p.name)}
    return [f'{p.name}: exports {m and m[1]}' for p, m in found.items() if m and p.stem.split('_', 1)[1] != m[1]]


def experiments_begin_and_finish(root):
    "An experiment declares its parameters in one tagged cell, begins under its own name and finishes; params.yml fits it."
    complaints, top = [], root/'nbs/experiments'
    for name, path in zip(list_experiments(top), experiments(root)):
        code = [source(c) for c in cells(path)]
        try:
            declared_parameters(path)
            for preset in ['smoke', *load_presets(top).get(name, {})]: resolve_parameters(name, preset, top)
        except InputError as e: complaints.append(str(e))
        begins = re.compile(rf'''begin\(['"]{re.escape(name)}['"], globals\(\)''')
        if not any(begins.search(c) for c in code): complaints.append(f'{name}: no begin({name!r}, globals())')
        if 'finish()' not in code[-1]: complaints.append(f'{name}: the last cell does not call exp.finish()')
        asks = re.compile(rf'''preset\s*(==|!=|in)\s*[\[('"]*({'|'.join(PRESETS)})''')
        if any(asks.search(c) for c in code): complaints.append(f'{name}: asks which preset it is')
    return complaints


def results_say_their_preset(root):
    "An experiment's notebook that shows a result says with which preset and seed."
    said = re.compile(rf"· ({'|'.join(PRESETS)}), seed \d+, run [0-9a-f]+")
    return [f'{p.name}: shows results without preset and seed' for p in experiments(root) if outputs(p) and not any(said.search(text(o)) for o in outputs(p))]


def small(root): return [f'{p.name}: {p.stat().st_size//1000} kB' for p in [*lessons(root), *experiments(root)] if p.stat().st_size > 300_000]


def no_errors(root):
    return [f"{p.name}: shows {o['ename']}" for p in [*lessons(root), *experiments(root)] for o in outputs(p) if o['output_type'] == 'error']


def no_places(root):
    "No picture, table or message names a folder of the machine it was made on."
    places = [str(p) for p in {ROOT, Path.home(), Path(tempfile.gettempdir())} if len(p.parts) > 1]
    return [f'{p.name}: an output names {place}' for p in [*lessons(root), *experiments(root)] for o in outputs(p) for place in places
            if f'{place}/' in text(o)]


def checks_that_run(root):
    "fastcore's expect_fail is a context manager: called with a function, it checks nothing."
    files = {*lessons(root), *experiments(root), *(root/'tests').rglob('*.py')} - {Path(__file__)}
    return [f'{p.name}: expect_fail called with a function' for p in files if re.search(r'expect_fail\((lambda|\w+[,)])', p.read_text())]


def documented(root):
    "Every public function and class says in a docstring what it is."
    complaints = []
    for path in (root/'bmd_xray').rglob('*.py'):
        for node in ast.parse(path.read_text()).body:
            public = isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith('_')
            if public and not ast.get_docstring(node): complaints.append(f'{path.name}: {node.name} has no docstring')
    return complaints


def whole_figures(root):
    "What is committed under figures/ is one whole run of its preset, as it is defined."
    complaints = []
    for manifest in (root/'figures').rglob('manifest.json'):
        m, folder = json.loads(manifest.read_text()), manifest.parent
        there = {p.name for p in folder.iterdir() if p.is_file()} - {'manifest.json'}
        if there != set(m['outputs']): complaints.append(f"{folder}: {sorted(there ^ set(m['outputs']))} in one of manifest and folder only")
        # a variant stands under a name of its own, and its manifest says what was changed
        if m['changed'] and folder.name == m.get('experiment', folder.name).split('/')[-1]: complaints.append(f"{folder}: {m['changed']} not as the preset says")  # noqa: E501
        others = {json.loads((folder/f).read_text())['run'] for f in there if f.endswith('.json')} - {m['run']}
        if others: complaints.append(f'{folder}: files of run {others}')
    return complaints


RULES = [exported, one_way, named_after_their_module, experiments_begin_and_finish, results_say_their_preset, small, no_errors, no_places, checks_that_run,
         documented, whole_figures]

@pytest.mark.parametrize('rule', RULES, ids=lambda r: r.__name__)
def test_house(rule): assert rule(ROOT) == []


def put(path, *codes, tags=(), outputs=(), size=0):
    "A notebook of these cells; tags and outputs go to the first."
    path.parent.mkdir(parents=True, exist_ok=True)
    made = [dict(cell_type='code', id=f'c{i}', source=c, execution_count=None, outputs=[], metadata=dict(tags=[])) for i, c in enumerate(codes)]
    made[0] |= dict(outputs=list(outputs), metadata=dict(tags=list(tags)))
    path.write_text(json.dumps(dict(nbformat=4, nbformat_minor=5, metadata=dict(padding='x'*size), cells=made)))


@pytest.fixture
def broken(tmp_path):
    "A house in which every rule is broken."
    lib, nbs = tmp_path/'bmd_xray', tmp_path/'nbs'
    (tmp_path/'tests').mkdir(); lib.mkdir()
    head = '# AUTOGENERATED! DO NOT EDIT! File to edit: ../nbs/{}.ipynb.\n'
    (lib/'metrics.py').write_text(head.format('00_metrics') + 'from .core import InputError\ndef bare(): pass\n')
    (lib/'core.py').write_text(head.format('05_core') + '"edited by hand"\n')
    stream = dict(output_type='stream', name='stdout', text=f'written to {Path(tempfile.gettempdir())}/x\n')
    error = dict(output_type='error', ename='ValueError', evalue='', traceback=[])
    put(nbs/'05_core.ipynb', '#| default_exp core', '#| export\nx = 1', 'expect_fail(lambda: 1/0)', outputs=[stream, error], size=300_000)
    put(nbs/'06_other.ipynb', '#| default_exp metrics')
    put(nbs/'experiments/a/b.ipynb', "preset = 'smoke'\nseed = 0", "if preset == 'demo': seed = 1", outputs=[stream])
    out = tmp_path/'figures/demo/a/b'; out.mkdir(parents=True)
    (out/'manifest.json').write_text(json.dumps(dict(outputs=['t.json', 'gone.png'], changed=['seed'], run='1')))
    (out/'t.json').write_text(json.dumps(dict(run='2')))
    return tmp_path

SAYS = {exported: ['core.py: differs', 'metrics.py: differs'], one_way: [r'metrics \(0\) imports core \(5\)'],
        named_after_their_module: ['06_other.ipynb: exports metrics'],
        experiments_begin_and_finish: ['0 cells tagged', 'no begin', 'finish', 'asks which preset'], results_say_their_preset: ['b.ipynb: shows results'],
        small: ['05_core.ipynb: 30. kB'], no_errors: ['05_core.ipynb: shows ValueError'],
        no_places: ['05_core.ipynb: an output names', 'b.ipynb: an output names'], checks_that_run: ['05_core.ipynb'],
        documented: ['bare has no docstring'], whole_figures: ['gone.png', 'not as the preset says', "files of run {'2'}"]}

@pytest.mark.parametrize('rule', RULES, ids=lambda r: r.__name__)
def test_every_rule_can_be_broken(rule, broken):
    complaints = rule(broken)
    assert all(any(re.search(said, c) for c in complaints) for said in SAYS[rule]), complaints


def test_lines_and_names():
    "What `ruff.toml` asks for."
    r = subprocess.run([sys.executable, '-m', 'ruff', 'check', '--no-cache', '--output-format', 'concise', str(ROOT)], capture_output=True, text=True)
    assert r.returncode == 0, r.stdout


def test_training_needs_little():
    "What a GPU machine trains with is imported where the desk's libraries are missing."
    modules = [m for m in TRAINING if (ROOT/'bmd_xray'/f"{m.replace('.', '/')}.py").exists()]
    code = f'''import sys, importlib
for m in {NOT_FOR_TRAINING}: sys.modules[m] = None
for m in {modules}: importlib.import_module('bmd_xray.' + m)
import bmd_xray.metrics'''
    r = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=ROOT)
    assert r.returncode == 0, r.stderr[-500:]
    light = 'import sys, bmd_xray.metrics, bmd_xray.cli; sys.exit(len({"torch", "papermill"} & set(sys.modules)))'
    assert subprocess.run([sys.executable, '-c', light], cwd=ROOT).returncode == 0
