"""How much of the heat lies on the shapes: ``make localisation``.

Explains held-out, correctly classified images through the real server with its default parameters. Prints the share of
the top 1 % of `SALIENCY` pixels inside the ground-truth mask, how often the maximum of the smoothed saliency is inside,
and the mask's share of the image. Masks are dilated, because an edge belongs to both sides.
"""

from __future__ import annotations

import argparse
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from PIL import Image
from torchvision.transforms.functional import center_crop, gaussian_blur
from tqdm import tqdm

from explain_client import ExplainClient, Explanation
from tools.evaluation.image_files import encode
from tools.export import repository_with
from tools.paths import OUTPUTS
from tools.server import EmbeddedServer, Ports
from tools.shapes.dataset import Scene, draw_scene

DILATION = 8
SMOOTHING_SIGMA = 4.0
TOP_SHARE = 0.01
CONCURRENCY = 4


def dilate(mask: np.ndarray, radius: int) -> np.ndarray:
    """Grow a bool mask [height, width] by a disc."""
    offsets = torch.arange(-radius, radius + 1)
    disc = (offsets[:, None] ** 2 + offsets[None, :] ** 2 <= radius**2).float()
    grown = torch.nn.functional.conv2d(torch.from_numpy(mask).float()[None, None], disc[None, None], padding=radius)
    return (grown[0, 0] > 0.5).numpy()


def share_inside(saliency: np.ndarray, mask: np.ndarray) -> float:
    """Share of the top 1 % of saliency pixels that lie inside the mask."""
    top = np.argsort(saliency, axis=None)[-round(TOP_SHARE * saliency.size) :]
    return float(mask.ravel()[top].mean())


def peak_inside(saliency: np.ndarray, mask: np.ndarray) -> bool:
    """Whether the maximum of the smoothed saliency lies inside the mask."""
    kernel_size = 2 * round(3 * SMOOTHING_SIGMA) + 1
    smoothed = gaussian_blur(torch.from_numpy(saliency)[None], [kernel_size] * 2, [SMOOTHING_SIGMA] * 2)
    return bool(mask.ravel()[int(smoothed.argmax())])


def explain_scene(client: ExplainClient, index: int) -> tuple[Scene, Explanation]:
    """Scene ``index`` of the test split, and the server's explanation of it."""
    # For this network `preprocess` resizes nothing at 256 pixels and crops the centre: masks stay aligned to the pixel.
    scene = draw_scene("test", index, size=256)
    return scene, client.explain(encode(Image.fromarray(scene.image)))


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tools.evaluation.localisation", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--images", type=int, default=200)
    arguments = parser.parse_args()
    shares: list[float] = []
    peaks: list[bool] = []
    mask_shares: list[float] = []
    seen = 0
    server = EmbeddedServer(repository_with("shapes"), Ports.free(), log_file=OUTPUTS / "localisation.log")
    with server, ExplainClient(server.grpc_url) as client, ThreadPoolExecutor(CONCURRENCY) as pool:
        progress = tqdm(total=arguments.images, desc="explained", mininterval=2)
        while len(shares) < arguments.images:
            indices = range(seen, seen + min(8 * CONCURRENCY, arguments.images - len(shares)))
            seen = indices.stop
            for scene, explanation in pool.map(lambda index: explain_scene(client, index), indices):
                if explanation.predictions[0].index != scene.label:
                    continue
                assert explanation.saliency is not None
                seen_mask = center_crop(torch.from_numpy(scene.mask), list(explanation.saliency.shape))
                mask = dilate(seen_mask.numpy(), DILATION)
                shares.append(share_inside(explanation.saliency, mask))
                peaks.append(peak_inside(explanation.saliency, mask))
                mask_shares.append(mask.mean())
                progress.update()
        progress.close()
    print(f"{len(shares)} correctly classified of {seen} test images; masks dilated by {DILATION} pixels")
    print(f"top 1 % of saliency inside the mask: median {np.median(shares):.1%} of pixels, mean {np.mean(shares):.1%}")
    print(f"maximum of the smoothed saliency inside the mask: {np.mean(peaks):.1%} of images")
    print(
        f"share of the image that the mask covers: median {np.median(mask_shares):.1%}, mean {np.mean(mask_shares):.1%}"
    )


if __name__ == "__main__":
    main()
