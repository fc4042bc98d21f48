"""What surrounds the model repository. Its folders' modules are imported as Triton does it: by their own names."""

import sys

from tools.paths import MODEL_REPOSITORY

sys.path[:0] = [
    str(MODEL_REPOSITORY / name / "1") for name in ("preprocess", "integrated_gradients", "heatmap", "explain_stream")
]
