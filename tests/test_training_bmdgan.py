"""BMD-GAN's stages: no test patient is trained on in any of them, and a kept network is used for what it was trained for alone."""
from dataclasses import replace

import numpy as np
import pytest

from bmd_xray import bmdgan
from bmd_xray.bmdgan import ARMS, Plan, Study, dataset_a, dataset_b, decomposer, predict_fold, split, stage_one
from bmd_xray.core import InputError
from bmd_xray.pairs import PairSet

STUDY = Study(a_patients=3, b_patients=8, rows=64, cols=32, spacing_mm=6., folds=2)
PLAN = Plan('small', dict(width=8), stage_one_steps=3, stage_two_steps=2, batch=4, lr=1e-3, schedule='onecycle', loss=dict(l1=100., gc=1.))

@pytest.fixture(autouse=True)
def fresh():
    bmdgan._audited.cache_clear(); yield; bmdgan._audited.cache_clear()

@pytest.mark.timeout(300)
@pytest.mark.parametrize('how', ['name', 'picture'])
def test_a_test_patient_in_dataset_a_is_found(monkeypatch, how):
    "By name, and by a film under another name."
    a, (_, test) = dataset_a(STUDY), split(STUDY, 0)
    table = a.table.copy()
    if how == 'name': table.loc[0, 'patient'] = test.table.patient[0]
    xray = a.xray.copy()
    if how == 'picture': xray[0] = test.xray[0]
    monkeypatch.setattr(bmdgan, 'dataset_a', lambda study: PairSet(xray, a.drr, table))
    bmdgan._audited.cache_clear()
    with pytest.raises(InputError, match='test patient'): split(STUDY, 0)

@pytest.mark.timeout(300)
def test_networks_are_kept_by_what_decides_them():
    "Stage one does not depend on folds and regression, stage two does not depend on sample weights; all depend on the seed."
    of = lambda f, *args: f(*args).folder
    one, two = of(stage_one, STUDY, PLAN), of(decomposer, STUDY, PLAN, 0)
    assert of(stage_one, replace(STUDY, folds=4, seed=3), replace(PLAN, sample_weights='none', frozen_steps=1)) == one
    assert of(decomposer, STUDY, replace(PLAN, sample_weights='none', tuned_steps=1), 0) == two
    changed = [replace(PLAN, **c) for c in (dict(hierarchical=False), dict(positions=('standing',)), dict(seed=1))]
    others = [of(decomposer, STUDY, PLAN, 1), of(decomposer, replace(STUDY, ct='ct'), PLAN, 0), *[of(decomposer, STUDY, p, 0) for p in changed]]
    assert len({two, *others}) == 6
    assert (one/'diary'/'curves.csv').exists() and list((two/'diary').glob('samples-*.png'))

@pytest.mark.parametrize('change, says', [(dict(arm='guess'), 'arm: got guess'), (dict(target='age'), 'target: got age')])
def test_refused(change, says):
    with pytest.raises(InputError, match=says): predict_fold(**dict(study=STUDY, plan=PLAN, fold=0, arm=ARMS[0], target='dxa') | change)

def test_positions_and_patients_that_are_not_there():
    with pytest.raises(InputError, match='training positions: got'): split(STUDY, 0, Plan(positions=('sitting',)))
    with pytest.raises(InputError, match='training patients: got 9, expected 4 or fewer'): split(STUDY, 0, Plan(train_patients=9))
    assert np.isfinite(dataset_b(STUDY).table.dxa).all()
