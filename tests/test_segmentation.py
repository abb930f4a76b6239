"""The segmentation across modules: real scans, headers, runs that are killed, and the shipped weights with their table."""
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import bmd_xray.segmentation_training as training
from bmd_xray.cli import main
from bmd_xray.core import InputError, data_path, read_json
from bmd_xray.segmentation import (BONES, MUSCLE_NAMES, WEIGHTS, Segmenter, SegmenterConfig, SegmentationNet, accept_labels, dice_by_name, load_segmenter,
                                   save_segmenter, segment)
from bmd_xray.volume import read_labels, read_volume

PELVIS = Path(os.environ.get('BMDX_REAL') or Path(__file__).resolve().parents[2]/'shared'/'real')/'ts_pelvis_ct'
TINY = SegmenterConfig(features=(8,)*6, offsets=(-1, 0, 1), size=(32, 32), patients=2, steps=4, batch=2)


@pytest.fixture(scope='module')
def scan():
    return training.Patient('seg-pytest-0001', 2, seed=34).raw_ct('pre', 4.)


@pytest.mark.skipif(not PELVIS.is_dir(), reason='no real pelvis CT here: BMDX_REAL names the folder that holds ts_pelvis_ct')
@pytest.mark.filterwarnings('ignore::bmd_xray.volume.InputWarning')
def test_real_pelvis(record_property):
    "A real CT, against labels that another network gave it."
    ct = read_volume(PELVIS/'example_ct.nii.gz')
    outside = accept_labels(read_labels(PELVIS/'example_seg_fast_force_split.nii.gz', ct))
    for muscle in ('iliacus', 'obturator_externus', 'pectineus'):
        for side in ('left', 'right'): assert f'{muscle}_{side}: absent, not in this table of names' in outside.flags
    found = segment(ct)
    dice = dice_by_name(found.labels, outside.labels)
    record_property('dice', dice)
    assert not any(n.startswith(('iliacus', 'obturator', 'pectineus')) for n in dice) # nothing of theirs stands for these
    assert found.labels.same_grid(ct) and found.uncertainty.same_grid(ct)
    at = {n: ct.to_mm(np.argwhere(found.labels.mask(n))[:, ::-1]).mean(0) for n in ('femur_left', 'femur_right', 'hip_left', 'hip_right', 'sacrum')}
    assert at['femur_right'][0] < at['sacrum'][0] < at['femur_left'][0] and at['femur_left'][2] < at['hip_left'][2] # the patient's sides, by the header
    assert found.flags # cut above the lesser trochanter, metal in the left femur


def test_headers_not_array_order(scan):
    "The same scan stored with rows and slices reversed, header and all: the same labels at the same places."
    ct, _ = scan
    M = ct.direction.copy(); M[:, 1:] *= -1
    turned = replace(ct, array=ct.array[::-1, ::-1], direction=M, origin=ct.to_mm((0, ct.shape[1] - 1, ct.shape[0] - 1)))
    a, b = segment(ct, 0), segment(turned, 0)
    assert b.labels.same_grid(turned) and (b.labels.array[::-1, ::-1] == a.labels.array).all() and a.dice == b.dice


def test_same_scan_same_answer(scan):
    ct = scan[0].crop((slice(20, 34), slice(None), slice(None)))
    torch.manual_seed(1); a = segment(ct)
    torch.manual_seed(2); b = segment(ct)
    assert (a.labels.array == b.labels.array).all() and (a.uncertainty.array == b.uncertainty.array).all() and (a.dice, a.flags) == (b.dice, b.flags)
    assert torch.initial_seed() == 2 # and the caller's randomness is left alone


@pytest.fixture
def toy_scans(tmp_path, monkeypatch):
    "Two small scans of noise and boxes in place of sampled patients."
    def cached(job):
        path = tmp_path/f'{job[0].id}.npy'
        rng = np.random.default_rng(int(job[0].id[-1]))
        scan = rng.integers(-200, 200, (2, 12, 40, 40)).astype(np.int16)
        scan[1] = 0; scan[1, :, 10:20, 10:30] = 1; scan[0, :, 10:20, 10:30] += 500
        np.save(path, scan)
        return path
    monkeypatch.setattr(training, '_cached_scan', cached)


def test_killed_run_ends_the_same(toy_scans, tmp_path, monkeypatch):
    monkeypatch.setattr(training, 'CHECKPOINT_EVERY', 2)
    whole, history = training.fit_segmenter(TINY, checkpoint=tmp_path/'whole.safetensors', progress=False)
    draw, seen = training.draw_slice, []
    def dies(*args, **kw):
        seen.append(0)
        if len(seen) > 2*3: raise KeyboardInterrupt
        return draw(*args, **kw)
    monkeypatch.setattr(training, 'draw_slice', dies)
    with pytest.raises(KeyboardInterrupt): training.fit_segmenter(TINY, checkpoint=tmp_path/'killed.safetensors', progress=False)
    monkeypatch.setattr(training, 'draw_slice', draw)
    again, same = training.fit_segmenter(TINY, checkpoint=tmp_path/'killed.safetensors', progress=False)
    assert history == same and all((v == again.state_dict()[k]).all() for k, v in whole.state_dict().items())
    with pytest.raises(InputError, match="another plan"):
        training.fit_segmenter(replace(TINY, seed=31), checkpoint=tmp_path/"killed.safetensors", progress=False)


def test_weights_round_trip(tmp_path):
    net = SegmentationNet(TINY).eval()
    path = save_segmenter(Segmenter(net, TINY, dict(steps=4)), tmp_path/'w.safetensors')
    back = load_segmenter(path)
    x = torch.randn(1, 6, 32, 32)
    assert back.config == TINY and back.about['steps'] == 4 and torch.allclose(back.net(x), net(x), atol=.02) # half precision
    assert path.read_bytes() == save_segmenter(Segmenter(net, TINY, dict(steps=4)), tmp_path/'v.safetensors').read_bytes()


def test_shipped_weights_and_table():
    "The table belongs to the weights, the patients of the three parts differ, and the figures are what they are said to be."
    about, table = load_segmenter().about, read_json(data_path(WEIGHTS).with_suffix('.json'))
    assert data_path(WEIGHTS).stat().st_size < 2e6 and about['provenance']['time'] == table['provenance']['time']
    parts = [{(p.id, p.seed) for p, _ in training.segmentation_patients(s)} for s in ('train', 'valid', 'test')]
    assert not (parts[0] & parts[1] or parts[0] & parts[2] or parts[1] & parts[2]) and all(i.startswith('seg-') for part in parts for i, _ in part)
    clean = [r['true'] for r in table['held_out'] if r['fault'] == 'none']
    assert len(clean) == 24 and all(n in r for r in clean for n in (*BONES, *MUSCLE_NAMES))


def test_command_says_what_it_takes(capsys):
    assert main(['train-segmentation', '--help']) == 0 and '--fresh' in capsys.readouterr().out
    assert main(['train-segmentation', '--steps', 'many']) == 2
