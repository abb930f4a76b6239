"""Chest BMD across modules: what is printed, presets that fit, equal work, labels that matter, and the command that makes the model."""
from dataclasses import replace

import numpy as np
import pytest

from bmd_xray.chest_cohort import CHEST_COUNTS, ChestPatient
from bmd_xray.chest_study import DEVELOPMENT, ENSEMBLES, MODELS, ChestPlan, ChestStudy
from bmd_xray.cohort import Patient
from bmd_xray.core import data_path, rng_for
from bmd_xray.models.multiroi import MULTI_ROI_NETS, MultiRoiLoss, MultiRoiRegressor
from bmd_xray.predict_run import predict_images
from bmd_xray.presets import PRESETS, resolve_parameters
from bmd_xray.radiograph import Radiograph, write_radiograph
from bmd_xray.regression import RegressionConfig, RegressionData, predict_bmd, train_regression
from bmd_xray.training import reproducible, seed_weights

EXPERIMENTS = 'cxr/regions', 'cxr/backbones', 'cxr/ensembles', 'cxr/landmarks'


def regions(n, seed):
    "Two regions of a made-up film: in the first a square whose side tells both numbers, in the second nothing."
    x, y = np.zeros((n, 2, 32, 32)), []
    for i in range(n):
        r = rng_for(f'square{i}', seed=seed)
        side, top, left = int(r.integers(6, 22)), int(r.integers(1, 9)), int(r.integers(1, 9))
        x[i] = r.uniform(500, 1500) + r.normal(0, 60, (2, 32, 32))
        x[i, 0, top:top + side, left:left + side] += 1500
        y.append([side, 30 - side])
    return RegressionData(x.clip(0, 4095).astype(np.uint16), np.array(y, float), np.array([f'{seed}/{i}' for i in range(n)]))


def test_shuffled_labels_destroy_the_correlation():
    train, test = regions(48, 1), regions(32, 2)
    with reproducible():
        seed_weights(0)
        net = MultiRoiRegressor('resnet18', rois=2, outputs=2, width=.125)
    config = RegressionConfig(160, batch=8, lr=3e-3, augment=None, weights='none')
    r = []
    for d in (train, RegressionData(train.xray, np.random.default_rng(0).permutation(train.target), train.patient)):
        said = predict_bmd(train_regression(net, d, config, loss=MultiRoiLoss(d.target.std(0))), test.xray)
        r.append(np.corrcoef(said[:, 0], test.target[:, 0])[0, 1])
    assert r[0] > .8 and abs(r[1]) < r[0] - .3, r


def test_as_printed():
    study, plan = ChestStudy(), ChestPlan()
    assert study.counts == CHEST_COUNTS and study.roi == 256 and study.located == 'graph'
    assert (plan.arch, plan.optimiser, plan.lr, plan.wd, plan.batch, plan.films, plan.unit) == ('vgg16', 'sgd', 1e-4, 4e-4, 64, 64, 'g/cm2')
    assert round(plan.steps*plan.batch/study.train) == 100  # passes
    assert len(MODELS) == 6 and len(MODELS['multi-ROI']) == 7
    assert [len(m) for m in ENSEMBLES.values()] == [5, 6]


def test_no_patient_is_met_twice():
    for study in (ChestStudy(20, 5, 5, landmark_patients=6), ChestStudy(20, 5, 5, landmark_patients=6, seed=3)):
        learnt, tested = ({p.id for p in ps} for ps in study.patients())
        tried = {p.id for ps in replace(study, development=True).patients() for p in ps}
        assert not learnt & tested and not tried & (learnt | tested) and len(tried) <= DEVELOPMENT


@pytest.mark.parametrize('name', EXPERIMENTS)
@pytest.mark.parametrize('preset', PRESETS)
def test_presets_fit(name, preset):
    p = resolve_parameters(name, preset)
    study, plan = ChestStudy(**p['study']), ChestPlan(**p['plan'])
    assert plan.arch in MULTI_ROI_NETS and study.train >= plan.films and plan.steps >= 3*(plan.record or 1)
    assert plan.batch == plan.films, 'as many pictures a step for every model'
    same = resolve_parameters('cxr/regions', preset)
    assert preset == 'smoke' or (p['study'], p['plan']) == (same['study'], same['plan']), 'networks could not be shared'
    if 'backbones' in p: assert {*p['backbones'], *p['printed']} <= set(MULTI_ROI_NETS)


def test_the_command_makes_either_model(capsys):
    from bmd_xray.cli import main
    for words, own in ((['--help'], '--locator-steps'), (['--kind', 'chest', '--help'], '--landmark-steps')):
        assert main(['train-predictor', *words]) == 0
        assert own in capsys.readouterr().out


SHIPPED = data_path('weights', 'chest')


@pytest.mark.skipif(not (SHIPPED/'predictor.json').exists(), reason='no model there yet: bmdx train-predictor --kind chest makes it')
def test_predict_reads_a_chest_and_refuses_a_hip(tmp_path):
    sampled = ChestPatient('test-chest-film')
    film = sampled.film(sampled.films[0], (192, 192), 3.).astype(np.float32)
    write_radiograph(Radiograph(film, 400/192, (0., 4095.), 1800/1650, view='PA', body_part='CHEST'), tmp_path/'chest.dcm')
    hip = Patient('predict-test-film', 1)
    shot = hip.exposures()[0]
    other = hip.film(shot, (128, 64), spacing_mm=3.).astype(np.float32)
    for name, said in (('hip', 'CHEST'), ('named', 'PELVIS')): # one header lies
        write_radiograph(Radiograph(other, 2.5*shot.sdd/shot.sod, (0., 4095.), shot.sdd/shot.sod, view='AP', body_part=said), tmp_path/f'{name}.dcm')
    table, failed = predict_images([tmp_path/f'{n}.dcm' for n in ('chest', 'hip', 'named')], tmp_path/'out', 'chest', 'hologic', dicom=True)
    assert table.site.tolist() == ['L1', 'L2', 'L3', 'L4'] and table.abmd.between(.3, 1.8).all()
    assert (table.osteoporosis_low <= table.osteoporosis).all() and (table.osteoporosis <= table.osteoporosis_high).all()
    assert len(failed) == 2 and failed.reason.str.contains('chest').all(), failed.reason.tolist()
    assert {'page.png', 'page.html', 'prediction.json', 'dicom'} <= {p.name for p in (tmp_path/'out'/table.film[0]).iterdir()}
