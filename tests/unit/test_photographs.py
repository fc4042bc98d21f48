"""The photographs of the demo, of the calibration and of its evaluation."""

from tools.imagenet.photographs import CALIBRATION, DEMO, HELD_OUT, crops


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
