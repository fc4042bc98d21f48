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

from PIL import Image

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
CONTACT_SHEET = DEMO_OUTPUTS / "contact_sheet.png"
# Relative error of the attributions: a smaller one is not visible in a heatmap. Hard photographs take over 50 steps.
TOLERANCE = "0.05"
MOST_STEPS = "200"
SAMPLES = ("heart", "star", "ring", "cross", "crescent", "arrow", "triangle", "hexagon")
FORMATS = ("jpg", "png", "webp")


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
                *("--contact-sheet", str(CONTACT_SHEET)),
            ]
            code = subprocess.run([*command, *map(str, images)], check=False).returncode
            if code:
                sys.exit(code)
    except (ServerError, ExportError) as error:
        sys.exit(f"demo: {error}")


if __name__ == "__main__":
    main()
