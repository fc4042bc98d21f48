"""Share of the heat on a shape."""

import numpy as np

from tools.evaluation import localisation


def test_localisation_measures():
    mask = np.zeros((224, 224), bool)
    mask[100:120, 100:120] = True
    grown = localisation.dilate(mask, 8)
    assert grown[92, 110]
    assert not grown[91, 110]
    assert not grown[93, 93]  # a disc, not a square
    saliency = np.random.default_rng(0).normal(0, 0.01, (224, 224)).astype(np.float32)
    saliency[95:125, 95:125] += 1
    assert localisation.share_inside(saliency, grown) > 0.9
    assert localisation.peak_inside(saliency, grown)
    assert localisation.share_inside(-saliency, grown) < 0.1
    assert not localisation.peak_inside(-saliency, grown)
