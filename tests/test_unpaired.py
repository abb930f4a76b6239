"""Muscles from whole films: EOS, after an operation, missing muscles, flips and zooms against the sums; a CycleGAN killed, resumed, fine-tuned, refused."""
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from bmd_xray.batches import Augment
from bmd_xray.cohort import CTScan, sample_cohort
from bmd_xray.core import InputError
from bmd_xray.muscles import MIRROR, SUMMED, MuscleSet, load_muscles, object_amounts, segmentation_failures
from bmd_xray.object_batches import ObjectStream, object_scaling
from bmd_xray.objects import OBJECTS, object_labels
from bmd_xray.unpaired import CONVENTIONAL, UnpairedConfig, amounts_table, load_decomposer, predict_objects, read_amounts, save_decomposer, train_unpaired

SIZE = 32, 24
PLAN = UnpairedConfig(steps=6, batch=2, lr=2e-3, schedule="onecycle", arch="small", options=dict(width=8), judge_width=8, pool=3, record=3)


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as m:
        m.setenv("BMDX_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def plain() -> MuscleSet: return load_muscles(sample_cohort(4), SIZE, 6.)


@pytest.fixture(scope="module")
def trained(plain): return train_unpaired(plain.where([0, 1, 2]), PLAN, valid=plain.where([3]))


def test_eos_and_after_an_operation():
    eos = load_muscles(sample_cohort(2, institution=2), SIZE, 6., occasions=("pre", "post"))
    assert eos.table.when.tolist() == ["pre", "post"]*2 and (eos.table.view == "eos").all()
    assert np.allclose(eos.table.pixel_area_mm2, 100) # 10 mm at the isocentre, whatever the slot magnifies
    for i, row in eos.table.iterrows():
        native = [b for b in ("left", "right") if row.when == "pre" or b != row.operative_side]
        assert eos.registered[i].tolist() == [True, "left" in native, "right" in native]
    # one person's muscles before and after weigh the same, in scans of their own
    before, after = eos.amounts[[0, 2]], eos.amounts[[1, 3]]
    muscles = [OBJECTS.index(n) for n in SUMMED[2:]]
    assert np.abs(after/before - 1)[:, 1:, muscles].mean() < .08


def test_what_the_label_map_lacks_has_no_target(plain):
    patient = sample_cohort(1)[0]
    ct = patient.ct("pre", 6., whole=True)
    names = {k: v for k, v in ct.labels.names.items() if not k.startswith("iliacus")}
    few = CTScan(ct.hu, ct.labels.like(ct.labels.array, names=names), ct.calibration, ct.landmarks)

    class Few:
        def __init__(self): self.patient = patient
        def __getattr__(self, name): return getattr(patient, name)
        def ct(self, *a, **k): return few
        fingerprint = ("few",)
    got = load_muscles([Few()], SIZE, 6.)
    iliacus = [OBJECTS.index(f"iliacus_{s}") for s in ("left", "right")]
    assert got.table.failures.item() == "" and np.isnan(got.targets[0, :, iliacus]).all() and not got.lying[0, :, iliacus].any()
    arrays = ("xray", "aligned", "lying", "amounts", "gains", "boxes", "inside", "true")
    both = MuscleSet(**{f: np.concatenate([getattr(plain, f), getattr(got, f)]) for f in arrays},
                     table=pd.concat([plain.table, got.table.assign(patient="few")], ignore_index=True))
    _, _, y = ObjectStream(both, object_scaling(both.maxima), 5).at(0)
    assert y["summed"].sum().item() == 5*3*len(SUMMED) - 3*2 and torch.isfinite(y["sums"]).all()
    table = amounts_table(both, both.amounts)
    assert len(table[table.structure == "iliacus"]) == 2*4
    assert segmentation_failures(object_amounts(ct, object_labels(few.labels))) == ["iliacus_left: missing", "iliacus_right: missing"]


def test_a_twice_mirrored_batch_is_itself(plain):
    once = ObjectStream(plain, object_scaling(plain.maxima), 4, Augment(0, 0, 0, 0, 0, 0, 1))
    still = ObjectStream(plain, object_scaling(plain.maxima), 4)
    (x, d, y), (x0, d0, y0) = once.at(0), still.at(0)
    assert torch.allclose(x.flip(3), x0, atol=1e-5)
    order = [k*16 + i for k in range(3) for i in MIRROR]
    assert torch.allclose(d.flip(3)[:, order], d0, atol=1e-5) and torch.allclose(y["sums"][:, order], y0["sums"], atol=1e-6)


def test_a_zoom_changes_the_target_by_its_square(plain):
    "All objects stay on the picture, so a picture's scaled mean follows the target at every strength."
    stream = ObjectStream(plain, object_scaling(plain.maxima), 4, Augment(rotation_deg=10, shear_deg=0, shift=.1, zoom=.3, brightness=0, contrast=0))
    areas = []
    for k in range(4):
        _, _, y = stream.at(k)
        pelvis = y["bones"].mean((2, 3)).reshape(4, 3, 3)[:, 1, 0] + 1
        target = y["sums"].reshape(4, 3, 16)[:, 1, 0] + 1
        assert torch.allclose(pelvis, target, rtol=.06)
        areas += (target/(torch.as_tensor(stream.targets[stream.indices(k)][:, 16]).float())).tolist()
    assert max(areas)/min(areas) > 1.2 # and zooms there were


def test_killed_and_resumed(plain, trained, tmp_path, monkeypatch):
    from bmd_xray.unpaired import PooledAdversary
    step = PooledAdversary.after_step
    def stop(self):
        if self.clock.step == 4: raise KeyboardInterrupt
        step(self)
    monkeypatch.setattr(PooledAdversary, "after_step", stop)
    train = lambda plan=PLAN: train_unpaired(plain.where([0, 1, 2]), plan, valid=plain.where([3]), checkpoint=tmp_path/"a.ckpt", checkpoint_every=2)
    with pytest.raises(KeyboardInterrupt): train()
    monkeypatch.setattr(PooledAdversary, "after_step", step)
    on = train()
    for a, b in zip(trained.model.state_dict().values(), on.model.state_dict().values()): assert torch.equal(a, b)
    with pytest.raises(InputError, match="other data or another plan"): train(replace(PLAN, weights=CONVENTIONAL))


def test_a_watched_patient_may_lack_a_muscle(plain):
    inside = plain.inside.copy()
    inside[3, OBJECTS.index(SUMMED[-1])] = .5 # cut by the scan's edge: the last batch of three has fewer sums than the first
    watched = replace(plain, inside=inside).where([1, 2, 3])
    assert np.isnan(watched.targets).any(1).sum() == np.isnan(plain.where([1, 2, 3]).targets).any(1).sum() + 1
    history = train_unpaired(plain.where([0]), PLAN, valid=watched).history
    assert [h["step"] for h in history][-1] == PLAN.steps and all(-1 <= h["valid_pcc"] <= 1 for h in history)


def test_kept_fine_tuned_and_refused(plain, trained, tmp_path):
    again = load_decomposer(save_decomposer(trained, tmp_path/"net"))
    assert np.array_equal(predict_objects(again, plain.xray), predict_objects(trained, plain.xray)) and again.config == trained.config
    tuned = train_unpaired(plain.where([3]), replace(PLAN, steps=2, lr=1e-4), init=again)
    assert tuned.scaling == trained.scaling
    a, b = (read_amounts(t, predict_objects(t, plain.xray), plain.table.pixel_area_mm2) for t in (trained, tuned))
    assert 0 < np.abs(a - b).max() and np.abs(b/a - 1)[:, :, 4:].mean() < .5
    with pytest.raises(InputError, match="training patients"): train_unpaired(plain, PLAN, valid=plain.where([0]))
    (tmp_path/"net/model.json").write_text((tmp_path/"net/model.json").read_text().replace('"mskdex"', '"bmdgan"'))
    with pytest.raises(InputError, match="decomposer"): load_decomposer(tmp_path/"net")
