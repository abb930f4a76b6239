"""Two processes that average their gradients train the network that one process trains; a compiled network is the network."""
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from bmd_xray.decomposition import TrainConfig, load_model, predict_drr, train_decomposition
from test_training_resume import DATA, GAN

SCRIPT = '''
import sys
sys.path.insert(0, sys.argv[2])
from test_training_resume import DATA, GAN
from bmd_xray.decomposition import TrainConfig, save_model, train_decomposition
from bmd_xray.training import processes
trained = train_decomposition(DATA, TrainConfig(8, **GAN), checkpoint=sys.argv[1] + '/run.safetensors', checkpoint_every=3, progress=False)
if processes()[0] == 0: save_model(trained, sys.argv[1] + '/model')
'''

@pytest.mark.timeout(300)
def test_two_processes_are_one(tmp_path):
    "By accelerate on two CPU processes (gloo): weights and record of a GAN's training, to rounding."
    pytest.importorskip('accelerate')
    script = tmp_path/'train.py'
    script.write_text(SCRIPT)
    command = [sys.executable, '-m', 'accelerate.commands.launch', '--cpu', '--num_processes', '2', '--num_machines', '1', '--mixed_precision', 'no',
               '--dynamo_backend', 'no', '--main_process_port', '0', str(script), str(tmp_path), str(Path(__file__).parent)]
    done = subprocess.run(command, env=os.environ | dict(OMP_NUM_THREADS='1', ACCELERATE_USE_CPU='true'), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-1500:]
    together, alone = load_model(tmp_path/'model'), train_decomposition(DATA, TrainConfig(8, **GAN), progress=False)
    assert np.abs(predict_drr(together, DATA.xray) - predict_drr(alone, DATA.xray)).max() < 1e-4
    for a, b in zip(together.history, alone.history, strict=True):
        assert a.keys() == b.keys() and all(np.isclose(a[k], b[k], rtol=1e-3, atol=1e-5) for k in a), (a, b)

@pytest.mark.timeout(900)
@pytest.mark.skipif(shutil.which('g++') is None, reason="torch.compile needs a C++ compiler on a CPU, and here is none")
def test_compiled_is_the_network():
    plan = dict(batch=4, options=dict(width=8, depth=1, bottom=1), augment=None)
    try: compiled = train_decomposition(DATA, TrainConfig(3, compile=True, **plan), progress=False)
    except torch._dynamo.exc.BackendCompilerFailed as e: pytest.skip(f'the compiler does not work here: {str(e)[:200]}')
    plain = train_decomposition(DATA, TrainConfig(3, **plan), progress=False)
    assert not any('_orig_mod' in k for k in compiled.model.state_dict())
    assert np.abs(predict_drr(compiled, DATA.xray) - predict_drr(plain, DATA.xray)).max() < 1e-3

def test_diary_of_a_run(tmp_path):
    "Curves, sample pictures and TensorBoard's events stand in the folder when the run ends; the run is the same without them."
    pytest.importorskip('tensorboard')
    from PIL import Image

    from bmd_xray.training import Diary
    train, valid = DATA.of(slice(0, 14)), DATA.of(slice(14, 20))
    kept = train_decomposition(train, TrainConfig(10, **GAN), valid=valid, cbs=[Diary(tmp_path, samples=3, tensorboard=True)], progress=False)
    plain = train_decomposition(train, TrainConfig(10, **GAN), valid=valid, progress=False)
    assert kept.history == plain.history
    assert len((tmp_path/'curves.csv').read_text().splitlines()) == 1 + len(kept.history)
    pages = sorted(tmp_path.glob('samples-*.png'))
    assert [p.name for p in pages] == ['samples-000005.png', 'samples-000010.png']
    page = np.asarray(Image.open(pages[-1]))
    assert page.shape == (3*32, 3*32)
    seen = kept.scaling.to_network(predict_drr(kept, valid.xray[:1]))[0, 0].clip(-1, 1)
    assert np.abs(page[64:, :32].astype(float) - 255*(seen + 1)/2).max() < 1.5 # the last line is the predictions
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    events = EventAccumulator(str(tmp_path)); events.Reload()
    assert [e.step for e in events.Scalars('d_real')] == [5, 10]
