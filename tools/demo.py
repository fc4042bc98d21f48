"""``make demo``: start the server, explain sample photographs or your images, and say where the pictures are.

The samples are photographs from installed packages or, for the network of drawn shapes, drawn shapes.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, ImageOps

from explain_client import ExplainClient, View
from explain_client.images import as_seen
from explain_client.runs import find_sources
from tools.classifiers.source import ExportError
from tools.export import describe_served, ensure_exported, read_manifest
from tools.imagenet.photographs import DEMO
from tools.paths import OUTPUTS
from tools.server import EmbeddedServer, Ports
from tools.shapes.dataset import CLASSES, draw_scene
from tools.triton.process import ServerError

DEMO_OUTPUTS = OUTPUTS / "demo"
REPORT = DEMO_OUTPUTS / "report.html"
# Relative error of the attributions: a smaller one is not visible in a heatmap. Hard photographs take over 50 steps.
TOLERANCE = "0.05"
MOST_STEPS = "200"
SAMPLES = ("heart", "star", "ring", "cross", "crescent", "arrow", "triangle", "hexagon")
FORMATS = ("jpg", "png", "webp")
TILE = 224  # side of a picture, whatever the network's input
CAPTION = 22
COLUMNS = 4


def write_samples(folder: Path, network: str | None) -> list[Path]:
    """Write sample images for a network: photographs with their licences, or drawn shapes."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    if network == "shapes":
        return _draw_shapes(folder)
    (folder / "LICENCES.txt").write_text(
        "".join(f"{photo.file.name}: {photo.licence} (from the package {photo.package})\n" for photo in DEMO)
    )
    return [Path(shutil.copy(photo.file, folder)) for photo in DEMO]


def _draw_shapes(folder: Path) -> list[Path]:
    """Draw an image of each sample shape, in all served formats in turn."""
    paths = []
    for index, name in enumerate(SAMPLES):
        scene = draw_scene("demo", index, size=320, label=CLASSES.index(name))
        paths.append(folder / f"{name}.{FORMATS[index % len(FORMATS)]}")
        Image.fromarray(scene.image).save(paths[-1], quality=92)
    return paths


def contact_sheet(images: list[Path], folder: Path, view: View) -> Path:
    """Write one picture of all images, as the classifier saw them, beside their heatmaps; returns its path."""
    columns = min(COLUMNS, len(images))
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * 2 * TILE, rows * (TILE + CAPTION)), "white")
    draw = ImageDraw.Draw(sheet)
    for index, path in enumerate(images):
        left, top = (index % columns) * 2 * TILE, (index // columns) * (TILE + CAPTION)
        sheet.paste(_tile(as_seen(path.read_bytes(), view)), (left, top + CAPTION))
        with Image.open(folder / f"{path.stem}.heatmap.png") as heatmap:
            sheet.paste(_tile(heatmap), (left + TILE, top + CAPTION))
        draw.text((left + 4, top + 4), path.name, fill="black", font=ImageFont.load_default(14))
    path = folder / "contact_sheet.png"
    sheet.save(path)
    return path


def _tile(picture: Image.Image) -> Image.Image:
    return ImageOps.pad(picture, (TILE, TILE), color="white")


def _images_of(arguments: list[Path]) -> list[Path]:
    """The image files that were named, alone or by their folders; ends the program if one is none."""
    images = [source.path for source in find_sources([str(path) for path in arguments], DEMO_OUTPUTS) if source.path]
    if arguments and not images:
        sys.exit(f"demo: no images in {', '.join(map(str, arguments))}")
    for path in images:
        try:
            with Image.open(path):
                pass
        except OSError as error:
            sys.exit(f"demo: {path} is not an image that can be read: {error.strerror or 'of no known format'}")
    return images


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.demo", description=__doc__.splitlines()[0])
    parser.add_argument(
        "images", nargs="*", type=Path, help="your own images, or folders of them (default: eight photographs)"
    )
    arguments = parser.parse_args()
    own = _images_of(arguments.images)
    print("starting Triton ...", flush=True)
    try:
        ensure_exported(network=os.environ.get("NETWORK"))
        print(f"serves {describe_served()}", flush=True)
        network = (read_manifest() or {}).get("network")
        images = own or write_samples(DEMO_OUTPUTS / "images", network)
        with EmbeddedServer(ports=Ports.free()) as server:
            command = [
                str(Path(sys.executable).with_name("explain")),
                "--url",
                server.grpc_url,
                *("--tolerance", TOLERANCE, "--n-steps", MOST_STEPS),
                *("--out", str(DEMO_OUTPUTS)),
                *("--report", str(REPORT)),
            ]
            code = subprocess.run([*command, *map(str, images)], check=False).returncode
            if code:
                sys.exit(code)
            with ExplainClient(server.grpc_url) as client:
                view = client.view()
    except (ServerError, ExportError) as error:
        sys.exit(f"demo: {error}")
    print(f"all of them in one picture: {contact_sheet(images, DEMO_OUTPUTS, view)}")
    print(f"with a slider and the numbers, for a browser: {REPORT}")


if __name__ == "__main__":
    main()
