"A femur that is complete, calibrated and has its landmarks: BMD comes out, and equals what the density itself gives."
import argparse
import json

import numpy as np
import pytest

from bmd_xray.calibration import hu_to_vbmd
from bmd_xray.femur import FemurLandmarks, measure_bmd, t_score
from bmd_xray.measure import add_arguments, run_from_args
from bmd_xray.volume import TOTALSEGMENTATOR, Volume, write_volume

SLOPE, INTERCEPT = .72, -3.
POINTS = dict(head_centre=(0, 0, 0), neck_centre=(22, 0, -16), junction_superior=(24, 0, 4), junction_inferior=(2, 0, -24), junction_anterior=(13, -14, -10),
              junction_posterior=(13, 14, -10), lesser_trochanter=(30, 8, -62), shaft_2cm=(42, 0, -82), shaft_5cm=(42, 0, -112))


def hips(spacing=2., depth=150.):
    "Two femora of round tubes, 176 mm apart: density (mg/cm3), labels, landmarks; the left one denser."
    low, high = np.array([-160., -40, -depth]), np.array([160., 40, 60])
    shape = tuple(((high - low)/spacing).astype(int))[::-1]
    grid = dict(spacing=(spacing,)*3, origin=low)
    density, lab, marks = np.zeros(shape, np.float32), np.zeros(shape, np.uint8), {}
    z, y, x = np.meshgrid(*[np.arange(n)*spacing + o for n, o in zip(shape, low[::-1])], indexing='ij')
    for side, mirror, mg in (('left', 1, 320.), ('right', -1, 240.)):
        at = np.stack([mirror*x - 88, y, z], -1)
        def tube(a, b, r, at=at):
            a, b = np.array(a, float), np.array(b, float)
            t = np.clip((at - a) @ (b - a)/((b - a) @ (b - a)), 0, 1)
            return np.linalg.norm(at - a - t[..., None]*(b - a), axis=-1) - r
        bone = np.minimum.reduce([tube((0, 0, 0), (0, 0, .1), 23), tube((0, 0, 0), (42, 0, -32), 15), tube((42, 0, -32), (42, 0, -300), 14)]) < 0
        density[bone], lab[bone] = mg, TOTALSEGMENTATOR[f'femur_{side}']
        marks[side] = {k: [mirror*(p[0] + 88), p[1], p[2]] for k, p in POINTS.items()}
    return Volume(density, kind='vbmd', **grid), Volume(lab, kind='labels', names=TOTALSEGMENTATOR, **grid), marks


@pytest.fixture(scope='module')
def scan(tmp_path_factory):
    folder = tmp_path_factory.mktemp('scan')
    density, lab, marks = hips()
    hu = np.where(lab.array > 0, (density.array - INTERCEPT)/SLOPE, -100).round(2).astype(np.float32)
    write_volume(folder/'ct.nii.gz', density.like(hu, kind='HU'))
    write_volume(folder/'seg.nii.gz', lab)
    (folder/'marks.json').write_text(json.dumps(marks))
    (folder/'curve.json').write_text(json.dumps(dict(slope=SLOPE, intercept=INTERCEPT, source='phantom scan, made up', kvp=120)))
    return folder, density, lab, marks


def measure(folder, out, *more):
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    assert run_from_args(parser.parse_args([str(folder/'ct.nii.gz'), '--labels', str(folder/'seg.nii.gz'), '--out', str(out), *map(str, more)])) == 0
    return json.loads((out/'measure.json').read_text())


@pytest.mark.parametrize('calibration', ['curve.json', f'{SLOPE},{INTERCEPT},phantom scan by hand'])
def test_bmd_of_two_hips(scan, tmp_path, calibration):
    folder, density, lab, marks = scan
    given = folder/calibration if calibration.endswith('.json') else calibration
    report = measure(folder, tmp_path/'out', '--calibration', given, '--landmarks', folder/'marks.json', '--reference', 'nhanes3')
    for b in report['bmd']:
        truth = measure_bmd(density, lab.mask(f'femur_{b["side"]}'), FemurLandmarks.from_dict(b['side'], marks[b['side']]))
        assert b['refused'] == []
        assert [b[k] for k in ('abmd', 'neck_abmd', 'vbmd')] == pytest.approx([truth.abmd, truth.neck_abmd, truth.vbmd], rel=1e-3)
        assert b['vbmd'] == pytest.approx(320 if b['side'] == 'left' else 240, rel=1e-3)
        assert b['t_score'] == pytest.approx(t_score(truth.abmd, 'nhanes3'), abs=.01) and b['calibration']['source'].startswith('phantom scan')
    page = (tmp_path/'out'/'index.html').read_text()
    assert page.count('BMD measured') == 2 and 'phantom scan' in page and 'nhanes3' in page and f'{report["bmd"][0]["abmd"]:.3f}' in page
    pictures = np.load(tmp_path/'out'/'drr.npz')
    grams = density.array[lab.mask('femur_left')].sum()*density.voxel_volume_mm3*1e-6
    assert pictures['femur_left'].sum()*float(pictures['pixel_mm'])**2/100 == pytest.approx(grams, rel=2e-3) # bone as HA, once there is a calibration


def test_a_femur_whose_landmarks_are_not_found(scan, tmp_path):
    "Tubes have no trochanters: without landmarks BMD is refused, and the reason says what was looked for."
    folder, *_ = scan
    for name, more in (('a', []), ('b', ['--landmarks', 'auto'])):
        report = measure(folder, tmp_path/name, '--calibration', folder/'curve.json', *more)
        for b in report['bmd']:
            assert [r['reason'] for r in b['refused']] == ['no landmarks'] and 'not found automatically' in b['refused'][0]['detail'] and b['landmarks'] is None
    assert {r['reason'] for b in measure(folder, tmp_path/'c')['bmd'] for r in b['refused']} == {'no landmarks', 'no calibration'}


def test_each_lack_is_one_reason(scan, tmp_path):
    folder, *_ = scan
    reasons = lambda name, *more: [r['reason'] for r in measure(folder, tmp_path/name, *more)['bmd'][1]['refused']]
    line, marks = ('--calibration', folder/'curve.json'), ('--landmarks', folder/'marks.json')
    assert reasons('a', *line) == ['no landmarks']
    assert reasons('b', *marks) == ['no calibration']
    one_side = json.loads((folder/'marks.json').read_text())
    (tmp_path/'one.json').write_text(json.dumps(dict(right=one_side['right'])))
    report = measure(folder, tmp_path/'c', *line, '--landmarks', tmp_path/'one.json')
    assert [[r['reason'] for r in b['refused']] for b in report['bmd']] == [[], ['no landmarks']]


def test_a_shorter_scan_loses_its_bmd(tmp_path):
    "The same hips, cut higher and higher: at 20 mm below the lesser trochanter BMD ends, though landmarks and calibration are there."
    _, _, marks = hips()
    for depth, expected in ((150, None), (84, 'region not measurable'), (40, 'region not measurable')):
        density, lab, _ = hips(depth=depth)
        write_volume(tmp_path/'ct.nii.gz', density.like(np.where(lab.array > 0, (density.array - INTERCEPT)/SLOPE, -100).astype(np.float32), kind='HU'))
        write_volume(tmp_path/'seg.nii.gz', lab)
        (tmp_path/'marks.json').write_text(json.dumps(marks))
        report = measure(tmp_path, tmp_path/f'{depth}', '--calibration', '.72,-3,made up', '--landmarks', tmp_path/'marks.json')
        assert [r['reason'] for r in report['bmd'][0]['refused']] == ([expected] if expected else [])
        assert report['structures'][-1]['cut'] == ['caudal']


def test_a_synthetic_patient(tmp_path):
    "From known materials through scanner, files and labels back to numbers: muscles and BMD of a whole patient, one femur with a prosthesis."
    from bmd_xray.anatomy import JointAngles, bone_pose, landmarks, sample_anatomy, sample_covariates, voxelise
    from bmd_xray.core import rng_for
    from bmd_xray.ct import Scanner, phantom_to_hu
    from bmd_xray.geometry import apply
    anatomy, angles, scanner = sample_anatomy(sample_covariates('measured'), 'measured'), JointAngles(), Scanner()
    body = voxelise(anatomy, angles, 2.5, implant='left', region=((-215, 215), (-135, 165), (-220, 165)))  # no muscle cut
    ct = phantom_to_hu(body, scanner, rng_for('measured', 'ct'))
    write_volume(tmp_path/'ct.nii.gz', ct)
    write_volume(tmp_path/'seg.nii.gz', body.volume('labels'))
    marks = {s: {k: apply(bone_pose(anatomy, angles, f'femur_{s}'), v).tolist() for k, v in landmarks(anatomy, s).items()} for s in ('left', 'right')}
    (tmp_path/'marks.json').write_text(json.dumps(marks))
    line = scanner.true_calibration()
    report = measure(tmp_path, tmp_path/'out', '--calibration', f'{line.slope},{line.intercept},{line.source}', '--landmarks', tmp_path/'marks.json')
    rows = {(r['structure'], r['side']): r for r in report['structures']}
    right, left = report['bmd']
    at = FemurLandmarks.from_dict('right', marks['right'])
    direct = measure_bmd(hu_to_vbmd(ct, line), body.mask('femur_right'), at) # the same numbers without files in between
    assert [right[k] for k in ('abmd', 'neck_abmd', 'vbmd')] == pytest.approx([direct.abmd, direct.neck_abmd, direct.vbmd], rel=1e-4)
    auto = measure(tmp_path, tmp_path/'auto', '--calibration', f'{line.slope},{line.intercept},{line.source}') # landmarks found, not given
    found, lost = auto['bmd']
    assert found['landmarks']['source'] == 'found automatically' and right['landmarks']['source'] == 'given'
    assert found['abmd'] == pytest.approx(right['abmd'], abs=.01) and found['neck_abmd'] == pytest.approx(right['neck_abmd'], abs=.03)
    for name in ('head_centre', 'neck_centre', 'shaft_2cm'): assert np.linalg.norm(np.array(found['landmarks']['points'][name]) - getattr(at, name)) < 3
    assert [r['reason'] for r in lost['refused']] == ['metal in the femur']
    assert 'found automatically' in (tmp_path/'auto'/'index.html').read_text() and 'found automatically' in (tmp_path/'auto'/'bmd.csv').read_text()
    truth = measure_bmd(body.volume('vbmd'), body.mask('femur_right'), at)
    assert -45 < right['vbmd'] - truth.vbmd < 5 # one energy cannot tell fatty marrow from missing mineral: QCT reads low
    assert [r['reason'] for r in left['refused']] == ['metal in the femur'] and 'abmd' not in left
    clean = phantom_to_hu(body, Scanner(noise=0, fwhm=0, fwhm_z=0, streaks=0), rng_for('measured', 'ct')).array
    for stem in ('gluteus_maximus', 'gluteus_medius', 'gluteus_minimus', 'iliacus', 'obturator_externus', 'pectineus'):
        for side in ('left', 'right'):
            mask, r = body.mask(f'{stem}_{side}'), rows[stem, side]
            assert r['state'] == 'complete' and r['volume_cm3'] == pytest.approx(mask.sum()*2.5**3/1000)
            if side == 'right': assert r['mean_hu'] == pytest.approx(clean[mask].mean(), abs=6), stem # noise, blur and far metal move a muscle's mean little
    assert abs(rows['obturator_externus', 'left']['mean_hu'] - clean[body.mask('obturator_externus_left')].mean()) > 10 # streaks beside the prosthesis:
    assert rows['obturator_externus', 'left']['metal_share'] > .5 # flagged
