"""Train the shapes network: ``python -m tools.shapes.train``.

It takes about half an hour on 2 CPU cores, because most images have 64 or 96 pixels a side. The later stages also
train *where* the network looks: the share of gradient times input outside the ground-truth mask is a second loss (Ross,
Hughes and Doshi-Velez 2017, "Right for the Right Reasons", arXiv 1703.03717). So a faithful explanation lies on the
shape. Writes the quantised checkpoint and prints its accuracy, after dequantising, on 1,000 test images.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import NamedTuple

import torch
import torchvision
from torch import Tensor
from torch.nn.functional import cross_entropy, max_pool2d
from torch.utils.data import DataLoader
from tqdm import tqdm

from tools.shapes.checkpoint import DEMO_CHECKPOINT, load_dequantized, save_quantized
from tools.shapes.dataset import CLASSES, ShapesDataset, normalise


class Stage(NamedTuple):
    """``images`` images of ``side`` pixels a side; ``localised`` adds the loss on where the network looks."""

    side: int
    images: int
    batch: int
    localised: bool


STAGES = (
    Stage(64, 20_480, 64, localised=False),
    Stage(96, 16_384, 64, localised=False),
    Stage(128, 6_400, 32, localised=False),
    Stage(128, 4_800, 32, localised=True),
    Stage(160, 3_200, 16, localised=True),
    Stage(224, 1_920, 16, localised=True),
)
TEST_IMAGES = 1_000
PEAK_LEARNING_RATE = 1.5e-3
WEIGHT_DECAY = 0.05
# Margin around a shape that still counts as inside, as a share of the side.
EDGE = 6 / 224


def train(seed: int, device: torch.device, workers: int, scale: float = 1.0) -> torch.nn.Module:
    """Train a torchvision ResNet-18 from scratch; ``scale`` multiplies the number of images."""
    torch.manual_seed(seed)
    model = torchvision.models.resnet18(num_classes=len(CLASSES))
    model = model.to(device, memory_format=torch.channels_last).train()
    stages = [stage._replace(images=max(1, int(stage.images * scale) // stage.batch) * stage.batch) for stage in STAGES]
    total_steps = sum(stage.images // stage.batch for stage in stages)
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, PEAK_LEARNING_RATE, total_steps=total_steps, pct_start=0.1
    )
    start = 0
    for stage in stages:
        dataset = ShapesDataset("train", start, stage.images, stage.side)
        start += stage.images
        loader = DataLoader(dataset, batch_size=stage.batch, num_workers=workers)
        progress = tqdm(loader, desc=f"{stage.side} px{' localised' if stage.localised else ''}", mininterval=5)
        for images, labels, masks in progress:
            losses = compute_losses(model, normalise(images.to(device)), labels.to(device), masks.to(device), stage)
            optimizer.zero_grad(set_to_none=True)
            torch.stack(list(losses.values())).sum().backward()
            optimizer.step()
            schedule.step()
            progress.set_postfix({name: f"{loss.item():.3f}" for name, loss in losses.items()}, refresh=False)
    return model.eval()


def compute_losses(
    model: torch.nn.Module, pixels: Tensor, labels: Tensor, masks: Tensor, stage: Stage
) -> dict[str, Tensor]:
    """Cross-entropy, and in localised stages the share of squared gradient times input outside the shape."""
    pixels.requires_grad_(stage.localised)
    logits = model(pixels)
    losses = {"classes": cross_entropy(logits, labels)}
    if stage.localised:
        radius = round(EDGE * stage.side)
        outside = 1 - max_pool2d(masks.float(), 2 * radius + 1, stride=1, padding=radius)
        label_logits = logits.gather(1, labels[:, None]).sum()
        (gradients,) = torch.autograd.grad(label_logits, pixels, create_graph=True)
        relevance = (gradients * pixels.detach()).square()
        losses["outside"] = ((relevance * outside).sum((1, 2, 3)) / relevance.detach().sum((1, 2, 3))).mean()
    return losses


@torch.inference_mode()
def accuracy(model: torch.nn.Module, split: str, images: int, device: torch.device, workers: int) -> float:
    """Top-1 accuracy on the first ``images`` scenes of ``split`` at 224 pixels."""
    loader = DataLoader(ShapesDataset(split, 0, images, 224), batch_size=50, num_workers=workers)
    correct = 0
    for batch, labels, _ in tqdm(loader, desc=f"{split} accuracy", mininterval=5):
        correct += (model(normalise(batch.to(device))).argmax(dim=1).cpu() == labels).sum().item()
    return correct / images


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=DEMO_CHECKPOINT, help="where to write the checkpoint")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=0, help="drawing processes; 0 draws in the training process")
    parser.add_argument("--scale", type=float, default=1.0, help="fraction of the training images, to try the script")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    started = time.monotonic()
    model = train(arguments.seed, device, arguments.workers, arguments.scale)
    facts = {
        "seed": arguments.seed,
        "images": int(sum(stage.images for stage in STAGES) * arguments.scale),
        "device": device.type,
        "minutes": round((time.monotonic() - started) / 60, 1),
    }
    save_quantized(arguments.out, model.state_dict(), CLASSES, facts)
    model.load_state_dict(load_dequantized(arguments.out)[0])
    top1 = accuracy(model, "test", TEST_IMAGES, device, arguments.workers)
    print(
        f"{arguments.out}: {arguments.out.stat().st_size / 1e6:.1f} MB, top-1 {top1:.1%} on {TEST_IMAGES} test images"
    )


if __name__ == "__main__":
    main()
