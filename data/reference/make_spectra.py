"""X-ray spectra behind the tube's filtration -> spectra.csv and tubes.csv.

Run:    pip install -c constraints.txt -e ".[physics]" && python data/reference/make_spectra.py
Source: SpekPy 2 (Poludniowski et al. 2021, Med. Phys. 48, 3630), tungsten anode of 12 degrees (CT 8), 0.5 keV steps, gathered
        into the 5 keV bins of attenuation.csv; air between tube and the point at 1 m left out.
Names:  <filtration>_<kVp>. al: 3 mm Al, the plain radiograph; alcu: 3 mm Al + 0.1 mm Cu, the EOS slot scanner;
        ct: 7 mm Al at 120 kVp, with 30 mm of water for the middle of a bow-tie filter.
"""
import csv
from pathlib import Path

import numpy as np
import spekpy
from make_attenuation import KEV

FILTERS = {'al': [('Al', 3)], 'alcu': [('Al', 3), ('Cu', .1)], 'ct': [('Al', 7), ('Water, Liquid', 30)]}
KVP = {'al': range(70, 111, 5), 'alcu': range(70, 111, 5), 'ct': [120]}


def spectrum(filtration, kvp):
    "Fluence share per bin, and what tubes.csv says of the beam."
    s = spekpy.Spek(kvp=kvp, th=8 if filtration == 'ct' else 12, dk=.5, z=100).multi_filter(FILTERS[filtration])
    kev, fluence = s.get_spectrum(edges=False, diff=False)  # photons/cm2/mAs in each .5 keV
    bins = np.clip(((kev - KEV[0] + 2.5)//5).astype(int), 0, len(KEV) - 1)
    share = np.bincount(bins, fluence, len(KEV))
    return share/share.sum(), dict(photons_mm2_mas=fluence.sum()/100, kerma_ugy_mas=s.get_kerma(), hvl_mm_al=s.get_hvl1(), mean_kev=s.get_emean())


if __name__ == '__main__':
    here = Path(__file__).parent
    made = {f'{f}_{k}': spectrum(f, k) for f in KVP for k in KVP[f]}
    with open(here/'spectra.csv', 'w', newline='') as out:
        out.write(f'# share of the photons in each bin of keV +- 2.5; made by make_spectra.py with SpekPy {spekpy.__version__}\n')
        w = csv.writer(out, lineterminator='\n')
        w.writerow(['kev', *made])
        for i, k in enumerate(KEV): w.writerow([k, *(f'{s[i]:.5g}' for s, _ in made.values())])
    with open(here/'tubes.csv', 'w', newline='') as out:
        out.write(f'# the whole beam at 1 m: photons per mm2 and mAs, air kerma uGy/mAs, half-value layer, mean energy; '
                  f'made by make_spectra.py with SpekPy {spekpy.__version__}\n')
        w = csv.writer(out, lineterminator='\n')
        w.writerow(['spectrum', *made['al_70'][1]])
        for n, (_, t) in made.items(): w.writerow([n, *(f'{v:.5g}' for v in t.values())])
