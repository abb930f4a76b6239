"""Every experiment under its smoke preset, computed anew: it runs through, publishes what it says, and in time."""
import time

import pytest

from bmd_xray.core import read_json
from bmd_xray.experiment import run
from bmd_xray.presets import list_experiments

SECONDS = 60 # the aim is 12 on two quiet cores; a test machine may be five times as slow


@pytest.mark.parametrize('name', list_experiments())
def test_smoke(name, tmp_path, monkeypatch):
    monkeypatch.setenv('BMDX_RUNS', str(tmp_path/'runs'))
    start = time.time()
    out = run(name, 'smoke', out=tmp_path/'figures')
    seconds = time.time() - start
    manifest = read_json(out/'manifest.json')
    assert manifest['experiment'] == name and manifest['preset'] == 'smoke' and manifest['changed'] == []
    assert sorted([*manifest['outputs'], 'manifest.json']) == sorted(p.name for p in out.iterdir())
    assert any(f.endswith('.csv') for f in manifest['outputs']) and all((out/f).stat().st_size > 0 for f in manifest['outputs'])
    assert seconds < SECONDS, f'{name}: {seconds:.0f} s'
