"""What a training promises across processes: the same bytes, after a kill too; and what it may import."""
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from bmd_xray.batches import Augment, PairedData
from bmd_xray.bmd import drr_to_bmd, fit_bmd
from bmd_xray.decomposition import TrainConfig, predict_drr, train_decomposition

SCRIPT = '''
import sys
from pathlib import Path
import numpy as np
from bmd_xray.batches import PairedData
from bmd_xray.decomposition import TrainConfig, save_model, train_decomposition
rng = np.random.default_rng(0)
data = PairedData(rng.integers(0, 4096, (24, 1, 32, 16)).astype(np.uint16), rng.random((24, 1, 32, 16)).astype(np.float16), np.arange(24))
train, valid = data.of(slice(0, 18)), data.of(slice(18, 24))
out = Path(sys.argv[1])
checkpoint = out/'run.safetensors' if sys.argv[2] == 'checkpoint' else None
plan = TrainConfig(60, batch=4, options=dict(width=8), record=15, ema=.95, keep='best')
trained = train_decomposition(train, plan, valid=valid, checkpoint=checkpoint, checkpoint_every=2, progress=False)
save_model(trained, out/'model')
'''

def start(out:Path, kind:str) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, '-c', SCRIPT, str(out), kind], env=os.environ | dict(OMP_NUM_THREADS='1'), stderr=subprocess.PIPE, text=True)

def finish(process:subprocess.Popen):
    assert process.wait(120) == 0, process.stderr.read()

def contents(out:Path) -> dict[str, bytes]: return {p.name: p.read_bytes() for p in sorted((out/'model').iterdir())}

@pytest.mark.timeout(300)
def test_killed_run_ends_with_the_same_bytes(tmp_path):
    finish(start(tmp_path/'whole', 'alone'))
    broken = tmp_path/'broken'
    checkpoint = broken/'run.safetensors'
    process = start(broken, 'checkpoint')
    while process.poll() is None and not checkpoint.exists(): time.sleep(.002)  # as soon as it has written something
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL and not (broken/'model').exists()
    finish(start(broken, 'checkpoint'))
    assert contents(broken) == contents(tmp_path/'whole')
    assert set(contents(broken)) == {'model.json', 'model.safetensors'}

def test_imports_without_the_heavy_and_the_absent():
    "A training machine may lack SimpleITK, papermill, pingouin; fastai.vision cannot be imported beside a CPU torch."
    code = '''
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in ('SimpleITK', 'papermill', 'pingouin', 'torchvision') or name.startswith('fastai.vision'): raise ImportError('refused ' + name)
sys.meta_path.insert(0, Refuse())
import bmd_xray.losses, bmd_xray.bmd, bmd_xray.models.generators, bmd_xray.batches, bmd_xray.decomposition
'''
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

def hips(n:int, seed:int, gain:float, offset:float) -> tuple[PairedData, np.ndarray]:
    "Ellipses of bone in unrelated soft tissue, shown by a display with this gain and offset."
    rng, (r, c) = np.random.default_rng(seed), np.mgrid[:64, :32]
    rho, tissue = rng.uniform(.4, 1.2, n), rng.uniform(.5, 1.5, n)
    bone = np.stack([p*np.sqrt(np.clip(1 - ((r - rng.uniform(26, 38))/13)**2 - ((c - rng.uniform(13, 19))/7)**2, 0, 1)) for p in rho])
    film = 4095*(offset + gain*(tissue[:, None, None] + .5*bone)) + rng.normal(0, 8, bone.shape)
    return PairedData(film.clip(0, 4095).astype(np.uint16)[:, None], bone.astype(np.float32)[:, None], np.array([f'{seed}/{i}' for i in range(n)])), rho

@pytest.mark.timeout(300)
def test_another_display_biases_and_calibration_mends():
    "On films of twice the contrast a network reads too much bone; a line fitted on the other hospital's training patients mends the bias, fine-tuning too."
    here, here_rho = hips(64, 1, gain=.2, offset=.1)
    there, there_rho = hips(24, 2, gain=.4, offset=.05)
    test, truth = hips(32, 3, gain=.4, offset=.05)
    plan = dict(batch=8, options=dict(width=16), augment=Augment().scaled(.2, 0.))
    first = train_decomposition(here, TrainConfig(250, lr=3e-3, **plan), progress=False)
    mean = lambda trained, data: drr_to_bmd(predict_drr(trained, data.xray)[:, 0])
    line = fit_bmd(drr_to_bmd(here.drr[:, 0]), here_rho)
    pretrained = line(mean(first, test))
    calibrated = fit_bmd(mean(first, there), there_rho)(mean(first, test))
    second = train_decomposition(there, TrainConfig(100, lr=1e-3, **plan), init=first, progress=False)
    tuned = line(mean(second, test))
    error = {k: np.abs(v - truth).mean() for k, v in dict(pretrained=pretrained, calibrated=calibrated, tuned=tuned).items()}
    assert (pretrained - truth).mean() > .05, error
    assert max(error['calibrated'], error['tuned']) < .6*error['pretrained'], error
    assert np.corrcoef(tuned, truth)[0, 1] > .9, error
