"""Commands around the model repository. They import the models' modules as Triton does: by their bare names."""

import sys

from tools.paths import MODEL_REPOSITORY

sys.path[:0] = [
    str(MODEL_REPOSITORY / name / "1") for name in ("preprocess", "integrated_gradients", "heatmap", "explain_stream")
]
