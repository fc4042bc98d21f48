"""`preprocess` against torchvision's own transform."""

import contextlib
import io

import numpy as np
import pytest
from classifier_files import INTERPOLATIONS, Preprocessing
from conftest import TORCHVISION_TRANSFORM, encode, scene_image
from image_decoding import MODES, ImageLimits, decode_image, load_pixels, open_image
from image_structure import MOST_JPEG_SCANS, ImageError, check_structure
from malformed_images import jpeg_of_scans, png_of_size
from PIL import Image, ImageCms, ImageOps
from torchvision import transforms

LIMITS, DEFAULT = ImageLimits(), Preprocessing()


def decode(file: bytes, limits: ImageLimits = LIMITS) -> Image.Image:
    return decode_image(open_image(file, DEFAULT, limits), "RGB", limits)


KINDS_OF_JPEG: dict[str, dict] = {
    "baseline": {},
    "progressive": {"progressive": True},
    "restarts": {"restart_marker_blocks": 4},
    "whole colour": {"subsampling": 0, "quality": 95},
}


@pytest.mark.parametrize("options", KINDS_OF_JPEG.values(), ids=KINDS_OF_JPEG)
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_a_jpeg_file_is_decoded_without_its_end_marker_and_refused_without_a_pixel(mode, options):
    file = encode(scene_image(0, 100).convert(mode), "JPEG", **options)
    whole = np.asarray(decode(file))
    for missing in (1, 2):
        np.testing.assert_array_equal(np.asarray(decode(file[:-missing])), whole)
    scan_ends = [at for at in range(len(file)) if file.startswith((b"\xff\xda", b"\xff\xc4"), at)]
    for length in (len(file) // 2, len(file) - 100, len(file) - 20, len(file) - 6, *scan_ends[1:]):
        with pytest.raises(ImageError, match=r"the end of the JPEG file is missing|header of the JPEG file|truncated"):
            decode(file[:length])


def test_every_cut_is_refused_or_changes_nothing():
    for options in KINDS_OF_JPEG.values():
        file = encode(scene_image(1, 40), "JPEG", **options)
        whole = np.asarray(decode(file))
        for missing in range(1, 200):
            with contextlib.suppress(ImageError):
                np.testing.assert_array_equal(np.asarray(decode(file[:-missing])), whole, str((options, missing)))


GRADIENT_16_BIT = np.linspace(0, 65535, 300 * 280).reshape(300, 280).astype(np.uint16)


def with_alpha(image: Image.Image) -> Image.Image:
    image = image.copy()
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    return image


def rotated_by_exif(image: Image.Image) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6  # shown rotated by 90 degrees
    return encode(image, "JPEG", exif=exif)


# Name -> (file, the RGB image to give to torchvision's transform).
SCENE = scene_image(0, 300)
WIDE, TALL, SMALL = SCENE.resize((500, 260)), SCENE.resize((240, 411)), SCENE.resize((37, 53))
LAB_PROFILE = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
SECOND_FRAME = {"save_all": True, "append_images": [TALL.resize(SCENE.size)]}
CASES = {
    "jpeg": (encode(WIDE, "JPEG"), Image.open(io.BytesIO(encode(WIDE, "JPEG")))),
    "png": (encode(TALL), TALL),
    "webp": (encode(SCENE, "WEBP", lossless=True), SCENE),
    "small": (encode(SMALL), SMALL),
    "one pixel": (encode(SCENE.resize((1, 1))), SCENE.resize((1, 1))),
    "grey": (encode(SCENE.convert("L")), SCENE.convert("L").convert("RGB")),
    "grey with alpha": (encode(SCENE.convert("LA")), SCENE.convert("L").convert("RGB")),
    "black and white": (encode(SCENE.convert("1")), SCENE.convert("1").convert("RGB")),
    "palette": (encode(SCENE.convert("P")), SCENE.convert("P").convert("RGB")),
    "alpha": (encode(with_alpha(TALL)), TALL),
    "cmyk": (encode(WIDE.convert("CMYK"), "JPEG"), Image.open(io.BytesIO(encode(WIDE.convert("CMYK"), "JPEG")))),
    "palette with transparency": (
        encode(SCENE.convert("P"), transparency=bytes(range(256))),
        SCENE.convert("P").convert("RGB"),
    ),
    "panorama": (encode(SCENE.resize((4000, 200))), SCENE.resize((4000, 200))),
    "colour profile": (
        encode(SCENE, icc_profile=ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()),
        SCENE,
    ),
    "animated webp": (
        encode(SCENE, "WEBP", lossless=True, save_all=True, append_images=[TALL.resize((300, 300))]),
        SCENE,
    ),
    "animated png": (encode(SCENE, save_all=True, append_images=[TALL.resize((300, 300))]), SCENE),
    "several jpegs in one": (
        encode(WIDE, "MPO", save_all=True, append_images=[TALL]),
        Image.open(io.BytesIO(encode(WIDE, "JPEG"))),
    ),
    "progressive jpeg": (
        encode(WIDE, "JPEG", progressive=True),
        Image.open(io.BytesIO(encode(WIDE, "JPEG", progressive=True))),
    ),
    "16 bit": (
        encode(Image.fromarray(GRADIENT_16_BIT)),
        Image.fromarray((GRADIENT_16_BIT >> 8).astype(np.uint8)).convert("RGB"),
    ),
    "exif": (
        rotated_by_exif(WIDE),
        ImageOps.exif_transpose(Image.open(io.BytesIO(rotated_by_exif(WIDE)))),
    ),
}


@pytest.mark.filterwarnings("ignore:Palette images with Transparency")
@pytest.mark.parametrize("case", CASES)
def test_pixels_equal_torchvision(case):
    file, image = CASES[case]
    expected = TORCHVISION_TRANSFORM(image.convert("RGB"))
    pixels = load_pixels(open_image(file, DEFAULT, LIMITS), DEFAULT, LIMITS)
    assert pixels.shape == (3, 224, 224)
    # Float32 arithmetic in the same order: equal, but for a last bit.
    assert (pixels - expected).abs().max() <= 1e-5


RULES = {
    "128": Preprocessing(resize=146, crop=(128, 128)),
    "299": Preprocessing(resize=342, crop=(299, 299), mean=(0.5,) * 3, std=(0.5,) * 3),
    "384 without a margin": Preprocessing(resize=384, crop=(384, 384)),
    "exact": Preprocessing(resize=(224, 224), crop=(224, 224)),
    "exact, not square": Preprocessing(resize=(100, 180), crop=(96, 160)),
    "not square": Preprocessing(resize=200, crop=(128, 192)),
    "wider than some resized images": Preprocessing(resize=64, crop=(64, 181)),
    **{name: Preprocessing(interpolation=name) for name in INTERPOLATIONS},
    "grey": Preprocessing(mean=(0.5,), std=(0.25,)),
    "grey, exact, bicubic": Preprocessing((28, 32), (28, 32), "bicubic", (0.5,), (0.25,)),
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("case", ["jpeg", "png", "small", "grey with alpha", "cmyk", "16 bit", "exif"])
def test_pixels_of_other_networks_equal_torchvision(rule, case):
    preprocessing = RULES[rule]
    file, image = CASES[case]
    mode = transforms.InterpolationMode(preprocessing.interpolation)
    expected = transforms.Compose(
        [
            transforms.Resize(preprocessing.resize, mode),
            transforms.CenterCrop(preprocessing.crop),
            transforms.ToTensor(),
            transforms.Normalize(preprocessing.mean, preprocessing.std),
        ]
    )(image.convert("L" if preprocessing.channels == 1 else "RGB"))
    pixels = load_pixels(open_image(file, preprocessing, LIMITS), preprocessing, LIMITS)
    assert pixels.shape == preprocessing.input_shape
    assert (pixels - expected).abs().max() <= 1e-5


@pytest.mark.filterwarnings("ignore:Palette images with Transparency")
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("mode", MODES.values())
def test_any_image_decodes_to_the_modes_of_inputs(case, mode):
    file, _ = CASES[case]
    image = decode_image(open_image(file, DEFAULT, LIMITS), mode, LIMITS)
    assert image.mode == mode


def test_exif_orientation_turns_the_image():
    assert decode(rotated_by_exif(WIDE)).size == (WIDE.height, WIDE.width)


def test_what_follows_a_jpeg_is_not_counted_as_scans():
    """Phones append videos and further pictures to photographs."""
    file = encode(WIDE, "JPEG", progressive=True)
    decode(file + b"\xff\xda" * 1000)


def second_scan(file: bytes) -> int:
    return file.index(b"\xff\xda", file.index(b"\xff\xda") + 1)


# Bytes that make a parser skip scans that libjpeg reads.
HIDERS = {
    "nothing": b"",
    "marker without length": b"\xff\x01",
    "reserved marker": b"\xff\x02\xff\xff",
    "long comment": b"\xff\xfe\xff\xff",
    "second start": b"\xff\xd8",
    "restart": b"\xff\xd0",
    "fill bytes": b"\xff\xff\xff",
    "stuffed byte": b"\xff\x00",
}


@pytest.mark.parametrize("hider", HIDERS)
def test_jpegs_of_many_scans_are_refused_before_they_are_decoded(hider):
    file = jpeg_of_scans(MOST_JPEG_SCANS)
    at = second_scan(file)
    with pytest.raises(ImageError, match=f"of over {MOST_JPEG_SCANS} scans|with a marker that none has"):
        check_structure(file[:at] + HIDERS[hider] + file[at:])
    decode(jpeg_of_scans(MOST_JPEG_SCANS - 20))


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        (ImageLimits(max_bytes=999), "has [0-9]+ bytes; at most 999 are allowed"),
        (ImageLimits(max_pixels=300 * 300 - 1), "has 300 x 300 pixels; at most 89999 in all are allowed"),
    ],
    ids=["bytes", "pixels"],
)
def test_limits_are_the_servers(limits, message):
    decode(encode(SCENE), ImageLimits(max_pixels=300 * 300))
    with pytest.raises(ImageError, match=message):
        open_image(encode(SCENE), DEFAULT, limits)


def test_long_thin_images_are_refused_where_resizing_them_would_take_too_much():
    decode(encode(SCENE.resize((700, 1))))
    with pytest.raises(ImageError, match="1 x 800 pixels; its long side must be at most 762 times its short side"):
        open_image(png_of_size(1, 800), DEFAULT, LIMITS)


@pytest.mark.parametrize(
    ("preprocessing", "ratio"),
    [
        (DEFAULT, 762),
        (Preprocessing(resize=384, crop=(384, 384)), 339),
        (Preprocessing(resize=100, crop=(100, 500)), 1000),  # a tall image gets a border, 500 pixels wide
    ],
    ids=["224", "384", "a border"],
)
def test_the_longest_side_follows_from_the_resizing(preprocessing, ratio):
    open_image(png_of_size(ratio, 1), preprocessing, LIMITS)
    with pytest.raises(ImageError, match=f"its long side must be at most {ratio} times its short side"):
        open_image(png_of_size(1, ratio + 1), preprocessing, LIMITS)


def test_an_exact_size_takes_any_ratio():
    preprocessing = Preprocessing(resize=(224, 224))
    file = encode(SCENE.resize((5000, 1)))
    assert load_pixels(open_image(file, preprocessing, LIMITS), preprocessing, LIMITS).shape == (3, 224, 224)
