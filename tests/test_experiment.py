"""The runner across processes: killed at any moment it resumes without repeating, ends with the same numbers, and leaves nothing half done in sight."""
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import psutil
import pytest

from bmd_xray.core import InputError, read_json
from bmd_xray.experiment import ExperimentError, run

BMDX = Path(sys.executable).with_name('bmdx')
PARAMETERS = "preset = 'smoke'\nseed = 0\nitems = 6\nseconds = .0\ncounter = ''\n"
BEGIN = "from bmd_xray.experiment import begin\nexp = begin('toy/slow', globals())\nexp.uses(counter='a log, no data', seconds='only the time it takes')"
WORK = """import time, numpy as np, pandas as pd
def work(i):
    time.sleep(seconds)
    with open(counter, 'a') as f: f.write(f'{i}\\n')
    return dict(item=i, value=float(np.random.rand() + i))
"""
SAVE = "rows = exp.map('work', work, range(items), workers=2)\nexp.save_table(pd.DataFrame(rows), 'rows')"


def notebook(path, *sources, tagged=True):
    "A notebook of these cells, the first one tagged `parameters`."
    path.parent.mkdir(parents=True, exist_ok=True)
    cells = [dict(cell_type='code', id=f'c{i}', source=s, outputs=[], execution_count=None, metadata={'tags': ['parameters'] if tagged and i == 0 else []})
             for i, s in enumerate(sources)]
    kernel = dict(name='python3', display_name='python3', language='python')
    path.write_text(json.dumps(dict(nbformat=4, nbformat_minor=5, metadata=dict(kernelspec=kernel), cells=cells)))


@pytest.fixture
def house(tmp_path, monkeypatch):
    "Experiments, runs and figures of our own."
    for name in ('experiments', 'runs', 'figures'): monkeypatch.setenv(f'BMDX_{name.upper()}', str(tmp_path/name))
    notebook(tmp_path/'experiments/toy/slow.ipynb', PARAMETERS, BEGIN, WORK, SAVE, 'exp.finish()')
    (tmp_path/'experiments/params.yml').write_text('toy/slow: {demo: {items: 4}}')
    return tmp_path


def kill_tree(pid):
    "kill -9 the process, its notebook and their workers: a power cut."
    family = psutil.Process(pid).children(recursive=True)
    for p in [psutil.Process(pid), *family]:
        try: p.send_signal(signal.SIGKILL)
        except psutil.NoSuchProcess: pass
    psutil.wait_procs(family, timeout=10)


def finished(house): return sorted((house/'runs').rglob('work-*.safetensors'))


def test_kill_and_resume(house):
    log = house/'log'
    command = [BMDX, 'run', 'toy/slow', '-p', 'seconds=1.0', '-p', f'counter={log}']
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)
    deadline = time.time() + 60
    while len(finished(house)) < 2 and time.time() < deadline and process.poll() is None: time.sleep(.05)
    time.sleep(.3) # into the middle of the next items
    kill_tree(process.pid)
    process.wait()
    stored = finished(house)
    assert 2 <= len(stored) < 6, process.stdout.read().decode()
    assert not (house/'figures').exists()
    stamps, interrupted = {p: p.stat().st_mtime_ns for p in stored}, log.read_text().split()

    resumed = subprocess.run(command, capture_output=True, text=True, check=True)
    assert f'{len(stored)} of 6 done before' in resumed.stdout
    assert {p: p.stat().st_mtime_ns for p in stored} == stamps
    repeated = log.read_text().split()[len(interrupted):]
    assert len(repeated) == 6 - len(stored) == len(set(repeated))
    manifest = read_json(house/'figures/smoke/toy/slow/manifest.json')
    assert manifest['stages']['work']['items'] == 6 and manifest['stages']['work']['resumed'] == len(stored)
    after_kill = (house/'figures/smoke/toy/slow/rows.csv').read_bytes()

    fresh = subprocess.run([*command, '--fresh', '-p', 'seconds=0.0'], capture_output=True, text=True, check=True)
    assert 'done before' not in fresh.stdout and len(log.read_text().split()) == len(interrupted) + len(repeated) + 6
    assert (house/'figures/smoke/toy/slow/rows.csv').read_bytes() == after_kill


def test_refusals_come_before_anything_runs(house):
    notebook(house/'experiments/toy/untagged.ipynb', PARAMETERS, BEGIN, tagged=False)
    for name, preset, parameters, said in [('toy/slaw', 'smoke', {}, 'did you mean toy/slow'), ('toy/slow', 'fast', {}, "preset: got 'fast'"),
                                           ('toy/slow', 'gpu', {}, "expected of ['smoke', 'demo']"), ('toy/slow', 'smoke', dict(item=3), 'did you mean items'),
                                           ('toy/slow', 'smoke', dict(items='3'), 'expected int'), ('toy/untagged', 'smoke', {}, '0 cells tagged')]:
        with pytest.raises(InputError, match=said.replace('[', r'\[')): run(name, preset, **parameters)
    assert not (house/'runs').exists() and not (house/'figures').exists()


def test_failures_keep_the_last_result_and_say_where(house):
    log = str(house/'log')
    out = run('toy/slow', counter=log)
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    notebook(house/'experiments/toy/slow.ipynb', PARAMETERS, BEGIN, WORK, SAVE, '1/0')
    with pytest.raises(ExperimentError, match='ZeroDivisionError: division by zero'): run('toy/slow', counter=log)
    notebook(house/'experiments/toy/slow.ipynb', PARAMETERS, BEGIN, WORK, SAVE)
    with pytest.raises(InputError, match=r'published nothing, expected exp.finish\(\)'): run('toy/slow', counter=log, seed=1)
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before
    with pytest.raises(ExperimentError, match='process died'):
        notebook(house/'experiments/toy/slow.ipynb', PARAMETERS, 'import os, signal\nos.kill(os.getpid(), signal.SIGKILL)')
        run('toy/slow', counter=log)


def test_plain_papermill_takes_the_preset(house):
    executed, log = house/'executed.ipynb', house/'log'
    subprocess.run([Path(sys.executable).with_name('papermill'), house/'experiments/toy/slow.ipynb', executed, '-p', 'preset', 'demo', '-p', 'counter', log],
                   check=True, capture_output=True, cwd=house)
    out = house/'figures/demo/toy/slow'
    assert pd.read_csv(out/'rows.csv')['item'].tolist() == [0, 1, 2, 3]
    manifest = read_json(out/'manifest.json')
    assert (manifest['preset'], manifest['parameters']['items'], manifest['changed']) == ('demo', 4, ['counter'])
    assert set(manifest) >= {'seed', 'git_commit', 'git_dirty', 'versions', 'hardware', 'time', 'wall_time_s', 'data_hash', 'code', 'outputs'}
    assert sorted(os.listdir(out)) == sorted([*manifest['outputs'], 'manifest.json']) == ['manifest.json', 'rows.csv', 'rows.json']
    assert run('toy/slow', 'demo', counter=str(log)) == out
    assert len(log.read_text().split()) == 4 # the runner found the finished stages of papermill's run


def test_command_line_errors_are_one_line(house):
    for words, code, said in [(['run', 'toy/slow', '--preset', 'fast'], 2, "got 'fast'"), (['run', 'toy/slow', '-p', 'items'], 2, 'expected name=value'),
                              (['rum'], 2, 'did you mean run')]:
        r = subprocess.run([BMDX, *words], capture_output=True, text=True)
        assert r.returncode == code and said in r.stderr and r.stdout == '' and 'Traceback' not in r.stderr
