"""The calibration phantom in scans that no cohort makes: other grids, other phantoms, tilted, short, noisy; spoilt ones; scans without one."""
import os
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from bmd_xray.calibration import B_MAS200, Calibration
from bmd_xray.core import InputError, rng_for
from bmd_xray.phantom import calibrate, calibrate_phantom, find_rods, internal_calibration
from bmd_xray.volume import Volume, read_volume

LINE = Calibration(.72, -4., 'painted')
HU = (np.array(B_MAS200) - LINE.intercept)/LINE.slope


def scene(spacing=(2., 2., 2.5), length=200., radius=9., step=45., tilt=(0., 0.), row=0., noise=15., rods=HU, phantom=True,
          span=(-999, 999), key='scene', body=True):
    """A body of fat and muscle with two bones over a phantom on a table, edges mixed over a pixel.

    tilt: of the rods against z, slope in x and y; row: of the row against x, slope; span: where along z the phantom is, mm. Centres are those in the middle."""
    x, y, z = (np.arange(lo, hi, s, dtype=np.float32) for (lo, hi), s in zip(((-190, 190), (-120, 150), (-length/2, length/2)), spacing))
    middle = float(z[[0, -1]].mean())
    z, y = z[:, None, None], y[:, None]
    def paint(hu, depth, value): # depth mm inside a surface
        share = np.clip(.5 + depth/spacing[0], 0, 1)
        return hu*(1 - share) + value*share
    hu = np.full(np.broadcast_shapes(x.shape, y.shape, z.shape), -1000, np.float32)
    if body:
        for a, b, value in ((170, 95, -100), (145, 72, 52)): hu = paint(hu, (1 - np.hypot(x/a, y/b))*b, value)
        for at in (-85, 85): hu = paint(paint(hu, 16 - np.hypot(x - at, y - 5), 1100), 11 - np.hypot(x - at, y - 5), 80)
    hu = paint(hu, 4 - abs(y - 140) + 0*x, -100) # the table
    centre = np.array([6.3, 113.7])
    u, v = x - centre[0] - tilt[0]*(z - middle), y - centre[1] - tilt[1]*(z - middle)
    n = np.hypot(1, row)
    along, across = (u + row*v)/n, (v - row*u)/n
    places = (np.arange(len(rods)) - (len(rods) - 1)/2)*step
    if phantom:
        plain = hu
        hu = paint(hu, np.minimum(13.5 - abs(across), places[-1] + 25 - abs(along)), -6)
        for p, h in zip(places, rods): hu = paint(hu, radius - np.hypot(along - p, across), h)
        hu = np.where((z > span[0]) & (z < span[1]), hu, plain)
    hu = hu + rng_for(key, 'noise').normal(0, noise, hu.shape)
    ct = Volume(np.rint(np.clip(hu, -1024, 3071)).astype(np.int16), spacing, (float(x[0]), -120., float(z[0, 0, 0])),
                provenance=dict(kvp=120., model='painted'))
    return ct, np.stack([centre[0] + places/n, centre[1] + places*row/n, places*0 + middle], 1)


def edit(ct, where, value):
    a = ct.array.copy()
    a[:, where] = value(a[:, where]) if callable(value) else value
    return ct.like(a)


def near(ct, point, r):
    at = ct.to_mm(np.stack(np.meshgrid(np.arange(ct.shape[2]), np.arange(ct.shape[1]), [0]), -1)[:, :, 0])
    return np.hypot(at[..., 0] - point[0], at[..., 1] - point[1]) < r


@pytest.fixture(scope='module')
def plain(): return scene()


@pytest.mark.parametrize('kind', [
    dict(spacing=(.8, .8, 5.), length=120.), dict(spacing=(1., 1., 1.), length=60.), dict(spacing=(3., 3., 3.)), dict(spacing=(1.5, 1.5, 10.)),
    dict(tilt=(.12, 0.)), dict(tilt=(-.05, .05)), dict(row=.1), dict(row=-.15, tilt=(.05, 0)), dict(noise=0), dict(noise=30),
    dict(radius=7.5, step=32.), dict(radius=11., step=50.), dict(length=50.), dict(span=(-60, 70)), dict(body=False)], ids=str)
def test_found_and_read(kind):
    ct, centres = scene(**kind)
    line, report = calibrate_phantom(ct)
    assert np.linalg.norm(np.array(report['centres_mm']) - centres, axis=1).max() < .5
    assert line.slope == pytest.approx(LINE.slope, rel=.01) and line.intercept == pytest.approx(LINE.intercept, abs=1.)
    assert line.r > .9998 and abs(report['radius_mm'] - kind.get('radius', 9)) < .3
    assert report['spacing_mm'] == pytest.approx(kind.get('step', 45), abs=.2)
    assert report['tilt_deg'] == pytest.approx(np.degrees(np.arctan(np.hypot(*kind.get('tilt', (0, 0))))), abs=.4)


def test_a_phantom_moved_or_turned_is_the_same(plain):
    ct, centres = plain
    rods = find_rods(ct)
    for array, mirror in ((np.flip(ct.array, 2), 0), (np.flip(ct.array, 1), 1), (np.flip(ct.array, 0), 2)):
        turned = find_rods(ct.like(array))
        expected = rods.centres.copy()
        expected[:, mirror] = 2*ct.centre[mirror] - expected[:, mirror]
        np.testing.assert_allclose(turned.centres, expected, atol=.1)
        np.testing.assert_allclose(turned.hu, rods.hu, atol=.5)
    stored = replace(ct, array=np.flip(ct.array, 1), origin=ct.to_mm([0, ct.shape[1] - 1, 0]), direction=np.diag([1., -1, 1]))
    np.testing.assert_allclose(find_rods(stored).centres, rods.centres, atol=1e-6)
    np.testing.assert_allclose(find_rods(replace(ct, origin=np.add(ct.origin, [300, -70, 1000]))).centres, rods.centres + [300, -70, 1000], atol=1e-6)


@pytest.mark.parametrize('rods, why', [
    (HU[[0, 2, 1, 3, 4]], 'rise'), (HU[[0, 1, 2, 4, 3]], 'rise'), (HU[[1, 2, 3, 4, 0]], 'rise'), (HU[[2, 0, 4, 1, 3]], 'rise'),
    (np.r_[HU[:2], -6, HU[3:]], 'rise'), (np.r_[HU[:4], HU[4] + 60], 'rod of 200'), (np.r_[HU[:2], 200, HU[3:]], 'r of at least .98'),
    (np.r_[HU[:4], -1000], 'rod 5 of 5'), (HU[:4], 'rod'), (HU[1:], 'rod')], ids=lambda v: v if isinstance(v, str) else ','.join(f'{h:.0f}' for h in v))
def test_a_wrong_row_is_refused(rods, why):
    with pytest.raises(InputError, match='phantom') as e: calibrate(scene(rods=rods)[0], LINE)
    assert why in str(e.value)


@pytest.mark.parametrize('low, high', [(0, 145), (0, 140), (52, 190), (60, 190)])
def test_a_row_cut_by_the_picture_is_refused(plain, low, high):
    ct = plain[0].crop((slice(None), slice(None), slice(low, high)))
    with pytest.raises(InputError, match='outside the field of view'): calibrate(ct, LINE)


def test_a_row_cut_by_the_round_field_is_refused(plain):
    ct, centres = plain
    with pytest.raises(InputError, match='rod [15] of 5'): calibrate(edit(ct, ~near(ct, (0, 40), 110), -1024), LINE)


def test_metal_on_the_table(plain):
    ct, centres = plain
    with pytest.raises(InputError, match='metal within 30 mm of rod 2'): calibrate(edit(ct, near(ct, centres[1] + [3, 15, 0], 4), 3000), LINE)
    far = edit(ct, near(ct, (-180, 130), 5), 3000) # away from the rods it does no harm
    assert calibrate(far)[0].slope == pytest.approx(LINE.slope, rel=.01)


def test_one_spoilt_rod_is_left_out_and_two_are_not(plain):
    ct, centres = plain
    holes = edit(ct, near(ct, centres[2], 5), -900)
    line, report = calibrate(holes)
    assert report['dropped'] == [100] and '100 mg/cm3 left out' in line.source and line.slope == pytest.approx(LINE.slope, rel=.01)
    with pytest.raises(InputError): calibrate_phantom(edit(holes, near(ct, centres[3], 5), -900))
    few = ct.array.copy()
    few[10:16] = edit(ct, near(ct, centres[2], 9), -900).array[10:16] # a bubble a few slices long
    assert calibrate(ct.like(few))[1]['dropped'] == []


def test_streaks_in_some_slices_do_not_move_the_line(plain):
    ct, centres = plain
    a = ct.array.copy()
    a[20:40, 40:45, 40:45] = 3071 # metal, and what it does to the phantom in the same slices
    a[20:40, near(ct, centres[4], 20)] += 150
    assert calibrate(ct.like(a))[0].slope == pytest.approx(LINE.slope, rel=.01)


@pytest.mark.parametrize('n', range(4))
def test_no_phantom(n):
    ct = scene(phantom=False, noise=(0, 10, 25, 50)[n], key=f'none {n}')[0]
    assert find_rods(ct) is None
    line, report = calibrate(ct, replace(LINE, protocol=dict(model='painted')))
    assert line.source.startswith('phantom-less: ') and report['protocol_checked'] == ['model']
    with pytest.raises(InputError, match='no phantom'): calibrate(ct)
    with pytest.raises(InputError, match='another protocol'): calibrate(ct, replace(LINE, protocol=dict(model='other')))
    with pytest.warns(match='unchecked'): calibrate(ct, LINE)


def test_two_bright_cylinders_are_no_phantom():
    assert find_rods(scene(rods=HU[3:])[0]) is None


def test_network_inserts(plain):
    ct, centres = plain
    mask = np.stack([np.logical_or.reduce([near(ct, c, 9) for c in centres])]*len(ct.array))
    ragged = mask & (rng_for('ragged').random(mask.shape) < .9)
    for m in (mask, ragged, np.where(np.arange(mask.shape[0])[:, None, None] == 30, False, mask)):
        rods = find_rods(ct, m)
        assert rods.source == 'network' and rods.network_mm < .5
    four = mask & ~near(ct, centres[0], 12) # the rod without HA is hard to see
    assert find_rods(ct, four).network_mm < .5
    thick = mask | near(ct, centres[0] + [3, 0, 0], 9) # one rod drawn too wide on one side: nearer than the network's voxel
    assert 1 < find_rods(ct, thick).network_mm < 2
    with pytest.raises(InputError, match='mm apart'): find_rods(ct, mask & ~near(ct, centres[3] - [5, 0, 0], 7))
    with pytest.raises(InputError, match='no row of rods'): find_rods(scene(phantom=False)[0], mask)
    with pytest.raises(InputError, match='away from'): find_rods(ct, mask | near(ct, (0, 0), 9))
    with pytest.raises(InputError, match='that of the CT'): find_rods(ct, mask[1:])


def test_tissues_of_known_density():
    ct = scene(phantom=False, noise=10)[0]
    line, report = internal_calibration(ct)
    assert report['peaks_hu'] == pytest.approx(dict(air=-1000, fat=-100, muscle=52), abs=2)
    assert 65 < report['kev'] < 70 and line.see > 5
    moved = internal_calibration(ct.like(np.clip(ct.array + 8, -1024, 3071)))[0] # an offset of the scanner is taken out in part
    for hu in (0, 200): assert abs(moved.slope*(hu + 8) + moved.intercept - line.slope*hu - line.intercept) < 8*line.slope
    with pytest.raises(InputError, match='80'): internal_calibration(replace(ct, provenance=dict(kvp=80.)))


REAL = Path(os.environ.get('BMDX_REAL') or Path(__file__).resolve().parents[2]/'shared'/'real')


@pytest.mark.skipif(not REAL.is_dir(), reason='no real scans here: BMDX_REAL names their folder')
@pytest.mark.parametrize('scan', ['ts_pelvis_ct/example_ct.nii.gz', 'ts_dicom_t12l1/example_ct_dicom', 'tptbox_l3/sub-ct_label-22_ct.nii.gz'])
def test_real_scans_have_no_phantom(scan):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        ct = read_volume(REAL/scan)
    for turned in (ct, ct.like(np.flip(ct.array, 1)), ct.like(np.flip(ct.array, 2))): assert find_rods(turned) is None
    if 'ts_' in scan: # whole sections of a body: fat and muscle are where everybody's are
        line, report = internal_calibration(ct, kvp=120)
        assert -120 < report['peaks_hu']['fat'] < -70 and 20 < report['peaks_hu']['muscle'] < 80 and .65 < line.slope < .82
    else:
        with pytest.raises(InputError, match='peak'): internal_calibration(ct, kvp=120)
