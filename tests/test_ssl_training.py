"""Semi-supervised training across modules: what it may look at, equal compute, presets that fit, and labels that matter."""
from dataclasses import replace

import numpy as np
import pytest

from bmd_xray.core import InputError, rng_for
from bmd_xray.hip_rois import COUNTS
from bmd_xray.hip_study import PRETRAINED, TUNED, HipPlan, HipStudy
from bmd_xray.models.se import EmbeddingRegressor
from bmd_xray.presets import PRESETS, resolve_parameters
from bmd_xray.regression import RegressionData, predict_bmd
from bmd_xray.self_training import METHODS, SemiConfig, train_semi
from bmd_xray.training import reproducible, seed_weights

EXPERIMENTS = ('ssl/backbones', 'ssl/methods', 'ssl/margins', 'ssl/labels')


def squares(n, seed):
    "Pictures of a bright square whose area is the target."
    xrays, area = [], []
    for i in range(n):
        r = rng_for(f'square{i}', seed=seed)
        side, top, left = int(r.integers(6, 22)), int(r.integers(1, 9)), int(r.integers(1, 9))
        x = r.uniform(500, 1500) + r.normal(0, 60, (32, 64))
        x[top:top + side, left:left + side] += 1500
        xrays.append(x.clip(0, 4095))
        area.append(side**2/100)
    return RegressionData(np.array(xrays)[:, None].astype(np.uint16), np.array(area), np.array([f'{seed}/{i}' for i in range(n)]))


@pytest.fixture(scope='module')
def sets(): return squares(24, 1), squares(12, 2), squares(24, 3), squares(24, 4)


@pytest.fixture(scope='module')
def net():
    with reproducible():
        seed_weights(0)
        return EmbeddingRegressor(width=.0625)


PLAN = dict(batch=8, lr=3e-3, augment=None, unit='sd')
TUNE = {'once': {}, 'self': dict(triplet=.5, consistency=1.), 'temporal': {}, 'teacher': {}, 'pi': dict(consistency=1.)}


@pytest.mark.parametrize('method', [m for m in METHODS if m != 'supervised'])
def test_unlabelled_targets_are_not_looked_at(method, sets, net):
    train, valid, test, pool = sets
    config = SemiConfig(4, method=method, views=2, record=2, **PLAN, **TUNE[method])
    told = RegressionData(pool.xray, np.full(len(pool), 100.), pool.patient)
    a, b = (predict_bmd(train_semi(net, train, config, valid, p), test.xray) for p in (pool, told))
    assert (a == b).all()
    other = RegressionData(pool.xray[:, :, ::-1].copy(), pool.target, pool.patient)
    assert (predict_bmd(train_semi(net, train, config, valid, other), test.xray) != a).any(), 'the unlabelled pictures change nothing'


def test_shuffled_labels_destroy_the_correlation(sets, net):
    train, valid, test, _ = sets
    config = SemiConfig(60, triplet=.5, record=15, **PLAN)
    shuffled = RegressionData(train.xray, np.random.default_rng(0).permutation(train.target), train.patient)
    r = [np.corrcoef(predict_bmd(train_semi(net, d, config, valid), test.xray), test.target)[0, 1] for d in (train, shuffled)]
    assert r[0] > .8 and r[1] < r[0] - .2, r


def test_same_patients_refused(sets, net):
    train, valid, _, pool = sets
    leaky = RegressionData(pool.xray, pool.target, np.array([*pool.patient[:-1], valid.patient[0]]))
    with pytest.raises(InputError, match='1 of the unlabelled patients'): train_semi(net, train, SemiConfig(1, method='self', **PLAN), valid, leaky)


def test_equal_compute():
    plans = [HipPlan().config(a) for a in TUNED]
    for field in ('steps', 'batch', 'views', 'lr', 'schedule', 'record', 'augment', 'wd'): assert len({getattr(p, field) for p in plans}) == 1, field
    plans = [HipPlan().config(a) for a in PRETRAINED]
    assert {replace(p, triplet=0., adaptive=True) for p in plans} == {plans[0]}


def test_as_printed():
    study = HipStudy()
    assert {k: getattr(study, k) for k in COUNTS} == dict(train=440, valid=150, test=500, unlabelled=8219) and study.roi == 512 and study.landmark_hips == 100
    proposed, rivals = HipPlan().config('Proposed'), [HipPlan().config(a) for a in ('Pi-model', 'Temporal ensembling', 'Mean teacher')]
    assert (proposed.method, proposed.triplet, proposed.consistency, proposed.margin, proposed.unit, proposed.normed) == ('self', .5, 1., .5, 'g/cm2', False)
    assert [r.method for r in rivals] == ['pi', 'temporal', 'teacher'] and not any(r.triplet for r in rivals)
    assert {TUNED[a][0] for a in ('Fine-tuned', 'Pi-model', 'Temporal ensembling', 'Mean teacher', 'Proposed')} == {'Baseline + ATL'}


@pytest.mark.parametrize('name', EXPERIMENTS)
@pytest.mark.parametrize('preset', PRESETS)
def test_presets_fit(name, preset):
    p = resolve_parameters(name, preset)
    study, plan = HipStudy(**p['study']), HipPlan(**p['plan'])
    assert study.train >= plan.batch//2 and plan.pretrain_steps >= 2*plan.pretrain_record and plan.tune_steps >= 2*plan.tune_record
    if 'labels' in p: assert max(p['labels']) <= study.train
    if 'arms' in p: assert set(p['arms']) <= set(TUNED)
