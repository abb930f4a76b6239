"""What the networks promise beyond their notebooks: other people's code agrees, physical units come out, all learn and are saved, and timm may be missing."""
import subprocess
import sys

import numpy as np
import pytest
import torch

from bmd_xray.batches import PairedData, Scaling
from bmd_xray.decomposition import TrainConfig, load_model, predict_drr, save_model, train_decomposition
from bmd_xray.losses import GanLoss
from bmd_xray.models.backbones import WindowAttention, import_timm
from bmd_xray.models.discriminators import MultiScaleDiscriminator
from bmd_xray.models.generators import make_generator

NARROW = dict(features=16, channels=8, modules=(1, 1, 1)) # an HRFormer for one thread


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1); torch.manual_seed(0)
    yield
    torch.set_num_threads(before)


def test_window_attention_is_swins():
    "With the same weights, timm's window attention says the same of each window."
    import_timm()
    from timm.models.swin_transformer import WindowAttention as Swin
    ours, theirs = WindowAttention(12, 3, window=4), Swin(12, 3, window_size=(4, 4))
    torch.nn.init.normal_(ours.bias)
    theirs.load_state_dict({'qkv.weight': ours.qkv.weight, 'qkv.bias': ours.qkv.bias, 'proj.weight': ours.out.weight, 'proj.bias': ours.out.bias,
                            'relative_position_bias_table': ours.bias}, strict=False)
    x = torch.randn(5, 4, 4, 12)
    torch.testing.assert_close(ours(x), theirs(x.reshape(5, 16, 12)).reshape(x.shape), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(('arch', 'options'), [('daformer', dict(size='mit_b0', features=32)), ('hrnet_w18', dict(features=32))])
def test_timm_generators_learn_everywhere(arch, options):
    net = make_generator(arch, outputs=2, **options)
    x = torch.randn(2, 1, 64, 32)
    (y := net(x)).backward(torch.randn(2, 2, 64, 32))
    assert y.shape == (2, 2, 64, 32) and y.abs().max() <= 1
    assert [n for n, p in net.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in net.modules())


def test_drrs_come_out_in_physical_units():
    "tanh's -1 ... 1 is 0 ... the training set's maximum, channel by channel; the ends are reached."
    scaling, net = Scaling((4.04, 2.5)), make_generator('hrformer_s', outputs=2, **NARROW)
    x = torch.randn(2, 1, 64, 32)
    for bias, expected in ((-50., (0., 0.)), (50., (4.04, 2.5))):
        torch.nn.init.constant_(net.decoder.body[-2].bias, bias)
        drr = scaling.to_physical(net(x))
        assert drr.amax((0, 2, 3)).tolist() == pytest.approx(expected, abs=1e-5)
        assert drr.amin((0, 2, 3)).tolist() == pytest.approx(expected, abs=1e-5)
    torch.nn.init.zeros_(net.decoder.body[-2].bias); torch.nn.init.zeros_(net.decoder.body[-2].weight)
    assert scaling.to_physical(net(x)).mean((0, 2, 3)).tolist() == pytest.approx([2.02, 1.25], abs=1e-5)


def test_trains_and_is_saved_as_the_small_one(tmp_path):
    "Two runs end alike though stochastic depth draws; what is read back predicts the same; no picture depends on its neighbours in the batch."
    rng = np.random.default_rng(0)
    data = PairedData(rng.integers(0, 4096, (4, 1, 64, 32)).astype(np.uint16), rng.random((4, 1, 64, 32)).astype(np.float16), np.arange(4))
    plan = TrainConfig(3, batch=2, arch='hrformer_s', options=dict(NARROW), augment=None)
    one, two = (train_decomposition(data, plan, progress=False) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one.model.state_dict().values(), two.model.state_dict().values()))
    fresh = make_generator('hrformer_s', **NARROW)
    assert all(not torch.equal(p, q) for p, q in zip(one.model.parameters(), fresh.parameters()))
    again = load_model(save_model(one, tmp_path/'model'))
    said = predict_drr(one, data.xray)
    np.testing.assert_array_equal(predict_drr(again, data.xray), said)
    np.testing.assert_allclose(np.concatenate([predict_drr(one, data.xray[k:k + 1]) for k in range(4)]), said, atol=1e-5)


def test_gan_loss_and_generator_in_turns():
    "One step of each side moves that side alone, and brings its own loss down."
    net, loss = make_generator('resnet', width=8, blocks=1), GanLoss(MultiScaleDiscriminator(scales=2, width=8))
    x, true = torch.randn(2, 1, 64, 64), torch.rand(2, 1, 64, 64)
    loss.see(x)
    sides = dict(generator=(net, lambda: loss(net(x), true)), discriminator=(loss.discriminator, lambda: loss.judge(net(x), true)))
    for learning, (part, objective) in sides.items():
        before = {k: [p.detach().clone() for p in n.parameters()] for k, (n, _) in sides.items()}
        optimiser = torch.optim.AdamW(part.parameters(), lr=1e-3)
        first = objective().item()
        for _ in range(3): optimiser.zero_grad(); objective().backward(); optimiser.step()
        assert objective().item() < first
        for k, (n, _) in sides.items():
            moved = any(not torch.equal(a, b) for a, b in zip(before[k], n.parameters()))
            assert moved == (k == learning), (k, learning)


def test_without_timm_and_torchvision():
    "The modules import, and what is ours works, where neither is installed; what needs timm says so."
    code = '''
import sys
sys.modules['timm'] = sys.modules['torchvision'] = None
import torch, bmd_xray.losses, bmd_xray.models.regressors, bmd_xray.models.discriminators
from bmd_xray.models.generators import make_generator
print(*make_generator('hrformer_s', features=16, channels=8, modules=(1, 1, 1))(torch.zeros(1, 1, 64, 32)).shape)
for arch in ('hrnet_w18', 'daformer'):
    try: make_generator(arch)
    except Exception as e: print(e)'''
    r = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert r.stdout.splitlines() == ['1 1 64 32'] + ['this network: got no timm, expected timm 1.0: pip install timm']*2, r.stderr[-500:]
