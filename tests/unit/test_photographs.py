"""The photographs of the demo, of the calibration and of its evaluation."""

import pytest
from classifier_files import Preprocessing

from tools.imagenet.photographs import CALIBRATION, DEMO, HELD_OUT, crops, view


def test_every_photograph_is_installed_and_none_both_calibrates_and_judges():
    demo, calibration, held_out = ({each.file for each in photographs} for photographs in (DEMO, CALIBRATION, HELD_OUT))
    assert all(file.is_file() for file in demo | calibration | held_out)
    assert not calibration & held_out
    assert len(demo) >= 8


def test_crops_are_the_same_for_the_same_arguments():
    photographs = HELD_OUT[:2]
    first, second = ([(name, image.tobytes()) for name, image in crops(photographs, 6)] for _ in range(2))
    assert first == second
    assert [name for name, _ in first] == [f"{each.name}_{number}" for number in range(3) for each in photographs]
    assert len({pixels for _, pixels in first}) == 6


@pytest.mark.parametrize(
    "preprocessing",
    [
        Preprocessing(),
        Preprocessing((96, 160), (96, 160), "bicubic"),
        Preprocessing(28, (28, 28), mean=(0.5,), std=(0.5,)),
    ],
    ids=["default", "not square", "grey"],
)
def test_a_view_is_of_the_networks_shape(preprocessing):
    ((_, image),) = crops(HELD_OUT, 1)
    assert view(image, preprocessing).shape == preprocessing.input_shape
