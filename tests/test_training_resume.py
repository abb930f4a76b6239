"""A GAN's training, killed at any moment, ends with the same bytes; and what a training refuses."""
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from fastai.callback.core import Callback

from bmd_xray.batches import Augment, PairedData
from bmd_xray.core import InputError
from bmd_xray.decomposition import TrainConfig, train_decomposition

rng = np.random.default_rng(0)
DATA = PairedData(rng.integers(0, 4096, (20, 1, 32, 32)).astype(np.uint16), rng.random((20, 1, 32, 32)).astype(np.float16), np.arange(20))
GAN = dict(batch=4, options=dict(width=8), record=5, loss=dict(l1=100., gc=1., gan=1., fm=10.), discriminator=dict(width=8, scales=1, lr=1e-3),
           augment=Augment())


class Break(Callback):
    "Break off as a kill would: before the forward pass of a step, or between the generator's step and the discriminators'."
    def __init__(self, step, where): self.at, self.order = step, {'before': 80, 'between': 10}[where]
    def _strike(self):
        if self.training and self.clock.step == self.at: raise KeyboardInterrupt
    def before_batch(self):
        if self.order == 80: self._strike()
    def after_step(self):
        if self.order == 10: self._strike()


def weights(trained): return {k: v.clone() for k, v in trained.model.state_dict().items()}
def same(a, b): return a.history == b.history and all(torch.equal(x, b.model.state_dict()[k]) for k, x in a.model.state_dict().items())


@pytest.mark.timeout(300)
@pytest.mark.parametrize('precision', ['float32', 'bfloat16'])
def test_gan_goes_on_exactly_after_every_step(tmp_path, precision):
    plan = TrainConfig(12, ema=.9, precision=precision, **GAN)
    train, valid = DATA.of(slice(0, 14)), DATA.of(slice(14, 20))
    whole = train_decomposition(train, plan, valid=valid, progress=False)
    for step, where in ((1, 'before'), (8, 'before'), (9, 'between')):
        kept = dict(valid=valid, checkpoint=tmp_path/f'{step}{where}.safetensors', checkpoint_every=2, progress=False)
        with pytest.raises(KeyboardInterrupt): train_decomposition(train, plan, cbs=[Break(step, where)], **kept)
        assert same(train_decomposition(train, plan, **kept), whole), (step, where)


def test_discriminators_matter_and_learn():
    "The checkpoint's exactness says nothing if discriminators do nothing: they change the generator, and they get better at their trade."
    with_gan = train_decomposition(DATA, TrainConfig(30, **GAN), progress=False)
    without = train_decomposition(DATA, TrainConfig(30, **GAN | dict(loss=dict(l1=100., gc=1.))), progress=False)
    assert not same(with_gan, without)
    first, last = with_gan.history[0], with_gan.history[-1]
    assert last['d_real'] + last['d_fake'] < first['d_real'] + first['d_fake'], (first, last)
    assert {'gan', 'fm', 'd_real', 'd_fake'} <= set(first) and not {'gan', 'd_real'} & set(without.history[0])


SCRIPT = '''
import sys
sys.path.insert(0, sys.argv[2])
from pathlib import Path
from test_training_resume import DATA, GAN
from bmd_xray.decomposition import TrainConfig, save_model, train_decomposition
out = Path(sys.argv[1])
trained = train_decomposition(DATA, TrainConfig(40, **GAN), checkpoint=out/'run.safetensors', checkpoint_every=1, progress=False)
save_model(trained, out/'model')
'''

@pytest.mark.timeout(300)
def test_gan_killed_by_the_system(tmp_path):
    start = lambda out: subprocess.Popen([sys.executable, '-c', SCRIPT, str(out), str(Path(__file__).parent)], env=os.environ | dict(OMP_NUM_THREADS='1'),
                                         stderr=subprocess.PIPE, text=True)
    def finish(process): assert process.wait(120) == 0, process.stderr.read()
    finish(start(tmp_path/'whole'))
    process = start(tmp_path/'broken')
    while process.poll() is None and not (tmp_path/'broken'/'run.safetensors').exists(): time.sleep(.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL and not (tmp_path/'broken'/'model').exists()
    finish(start(tmp_path/'broken'))
    for name in ('model.json', 'model.safetensors'): assert (tmp_path/'whole'/'model'/name).read_bytes() == (tmp_path/'broken'/'model'/name).read_bytes()


@pytest.mark.parametrize('change, says', [
    (dict(loss=dict(l1=1., perceptual=1.)), 'loss: got perceptual'), (dict(loss=dict(gan=1.), discriminator=dict(mode='wgan', scales=1)), 'GAN loss: got wgan'),
    (dict(loss=dict(gan=1.)), 'discriminator: got 3 scales'), (dict(discriminator=dict(layers=2)), 'discriminator: got layers'),
    (dict(loss=dict(gan=0., fm=0.)), 'loss'), (dict(precision='float16'), 'precision: got float16'), (dict(keep='first'), 'keep: got first')])
def test_refused(change, says):
    with pytest.raises(InputError, match=says): train_decomposition(DATA, TrainConfig(**dict(steps=1, batch=4, options=dict(width=8)) | change))
