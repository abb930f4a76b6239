"""Every experiment under its smoke preset, computed anew: it runs through, publishes what it says, and in time."""
import resource

import pytest

from bmd_xray.core import read_json
from bmd_xray.experiment import run
from bmd_xray.presets import list_experiments

SECONDS = 60 # of processor time, which other work on the machine hardly changes; the aim is 12 s on two quiet cores, 24 of these


def spent():
    "Processor time of the processes that were started and have ended, s: the notebook's and its workers'."
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@pytest.mark.timeout(300) # what hangs uses no processor time
@pytest.mark.parametrize('name', list_experiments())
def test_smoke(name, tmp_path, monkeypatch):
    monkeypatch.setenv('BMDX_RUNS', str(tmp_path/'runs'))
    before = spent()
    out = run(name, 'smoke', out=tmp_path/'figures')
    seconds = spent() - before
    manifest = read_json(out/'manifest.json')
    assert manifest['experiment'] == name and manifest['preset'] == 'smoke' and manifest['changed'] == []
    assert sorted([*manifest['outputs'], 'manifest.json']) == sorted(p.name for p in out.iterdir())
    assert any(f.endswith('.csv') for f in manifest['outputs']) and all((out/f).stat().st_size > 0 for f in manifest['outputs'])
    assert 1 < seconds < SECONDS, f'{name}: {seconds:.0f} s of processor time'
