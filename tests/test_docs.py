"""The start page and the site: generated, complete, and no link into nothing."""
import importlib
import re
import shutil
import subprocess
import sys

import nbformat
import pytest

from bmd_xray.core import project_root

ROOT = project_root()
sys.path.insert(0, str(ROOT/'docs'))
build, readme = importlib.import_module('build'), importlib.import_module('readme')


def test_readme_is_what_the_start_page_says(tmp_path, monkeypatch, capsys):
    assert readme.main(['--check']) == 0, 'run python docs/readme.py'
    shutil.copytree(ROOT/'nbs', tmp_path/'nbs', ignore=shutil.ignore_patterns('experiments'))
    monkeypatch.setattr(readme, 'ROOT', tmp_path)
    (tmp_path/'README.md').write_text('edited by hand')
    assert readme.main(['--check']) == 1 and 'docs/readme.py' in capsys.readouterr().err


def test_readme_says_what_it_must():
    text = (ROOT/'README.md').read_text(encoding='utf-8')
    for words in ('make demo', 'make lab', 'bmdx measure', 'Research use only', '![', 'Suehara', 'BMD-GAN', 'MSKdeX', 'Wang', 'Zheng'):
        assert words in text, words
    named = set(re.findall(r'^make (\w+)', text, re.M)) | set(re.findall(r'`make (\w+)`', text))
    targets = set(re.findall(r'^(\w+):', (ROOT/'Makefile').read_text(), re.M))
    assert named and named <= targets, named - targets
    commands = set(re.findall(r'bmdx ([\w-]+)', text))
    known = set(importlib.import_module('bmd_xray.cli').COMMANDS)
    assert commands <= known, commands - known
    for link in re.findall(r'\]\(([^)#]+)\)', text): assert link.startswith('http') or (ROOT/link).exists(), link


@pytest.fixture(scope='module')
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp('site')/'source'
    build.prepare(folder)
    return folder


def markdown(path):
    if path.suffix == '.md': return path.read_text(encoding='utf-8')
    return '\n\n'.join(c.source for c in nbformat.read(path, 4).cells if c.cell_type == 'markdown')


def test_every_public_function_has_a_card(source):
    anchors = {a for p in [*source.rglob('*.ipynb')] for a in re.findall(r'^\(([\w.]+)\)=', markdown(p), re.M)}
    missing = []
    for path in sorted((ROOT/'bmd_xray').rglob('*.py')):
        module = '.'.join(path.relative_to(ROOT/'bmd_xray').with_suffix('').parts)
        if path.name in ('__init__.py', '_modidx.py'): continue
        defined = re.findall(r'^(?:def|class) ([a-zA-Z]\w*)', path.read_text(encoding='utf-8'), re.M)
        missing += [f'{module}.{n}' for n in defined if not any(a == f'{module}.{n}' or a.startswith(f'{module}.') and a.endswith(f'.{n}') for a in anchors)]
    assert not missing, missing


def test_links_lead_somewhere(source):
    anchors = {a for p in [*source.rglob('*.ipynb'), *source.rglob('*.md')] for a in re.findall(r'^\(([\w.]+)\)=', markdown(p), re.M)}
    broken = []
    for page in [*source.rglob('*.ipynb'), *source.rglob('*.md')]:
        text = re.sub(r'```.*?```|`[^`]*`', '', markdown(page), flags=re.S)
        for link in re.findall(r'\]\(([^)\s]+)\)', text):
            if link.startswith(('http', 'attachment:')): continue
            there = link[1:] in anchors if link.startswith('#') else (source/link[1:] if link.startswith('/') else page.parent/link.split('#')[0]).exists()
            if not there: broken.append(f'{page.relative_to(source)}: {link}')
    assert not broken, broken


def test_no_page_shows_a_traceback(source):
    assert not [p.name for p in source.rglob('*.ipynb') for c in nbformat.read(p, 4).cells if any(o.output_type == 'error' for o in c.get('outputs', []))]


def test_a_page_hides_plumbing_and_shows_signatures(tmp_path):
    cells = ['#| default_exp toy', '#| export\nimport math', '#| hide\nsecret = 1',
             '#| export\ndef area(\n    r, # radius, mm\n) -> float: # mm2\n    "Of a circle, see `other`."\n    return math.pi*r**2\ndef _inner(): pass',
             'area(1)']
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell('# Toy\nSee `area` and $$a=b$$ there.'), *map(nbformat.v4.new_code_cell, cells)])
    nbformat.write(notebook, tmp_path/'05_toy.ipynb')
    made = build.page(tmp_path/'05_toy.ipynb', {'area': 'toy'})
    text = '\n'.join(c.source for c in made.cells)
    assert 'secret' not in text and 'import math' not in text and '#|' not in text
    assert '(toy.area)=\n## area' in text and '    r, # radius, mm' in text and 'toy._inner' not in text
    assert '[`area`](#toy.area)' in text and '\n$$\na=b\n$$\n' in text
    assert [c.metadata.get('tags') for c in made.cells if 'math.pi' in c.source and c.cell_type == 'code'] == [['hide-input']]


def test_site_builds_without_a_warning(source):
    pytest.importorskip('myst_nb', reason='pip install -c constraints.txt -e ".[docs]"')
    pytest.importorskip('pydata_sphinx_theme')
    site = source.parent/'site'
    done = subprocess.run([sys.executable, '-m', 'sphinx', '-q', '-W', '--keep-going', '-b', 'html', str(source), str(site)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    fetched = re.compile(r'(?:<script[^>]*src|<link[^>]*href)="(https?://[^"]+)"')
    remote = [(p.name, u) for p in site.rglob('*.html') for u in fetched.findall(p.read_text(encoding='utf-8'))]
    assert not remote, remote
    assert 'render_objects' in (site/'searchindex.js').read_text(encoding='utf-8')
