"""The drawn shapes, their checkpoint and its training."""

import numpy as np
import pytest
import torch
from conftest import relative_distance

from tools.shapes.checkpoint import DEMO_CHECKPOINT, load_dequantized, save_quantized
from tools.shapes.dataset import CLASSES, draw_scene, draw_view, view_pixels
from tools.shapes.train import STAGES, accuracy, compute_losses


def test_scenes_depend_on_split_and_index_alone():
    first, again = draw_scene("test", 5), draw_scene("test", 5)
    np.testing.assert_array_equal(first.image, again.image)
    np.testing.assert_array_equal(first.mask, again.mask)
    for second in (draw_scene("test", 6), draw_scene("train", 5)):
        assert not np.array_equal(first.image, second.image)


@pytest.mark.parametrize("name", CLASSES)
def test_every_class_is_drawn_with_its_mask(name):
    for index in range(5):
        scene = draw_scene("demo", index, label=CLASSES.index(name))
        assert scene.image.shape == (224, 224, 3)
        assert CLASSES[scene.label] == name
        assert 0.005 < scene.mask.mean() < 0.45
        # The shape stands out: its mean colour differs from the rest of the image.
        inside, outside = scene.image[scene.mask].mean(axis=0), scene.image[~scene.mask].mean(axis=0)
        assert np.linalg.norm(inside - outside) > 10


def test_view_is_the_centre_of_a_larger_scene():
    scene, view = draw_scene("test", 3, 256), draw_view("test", 3, 224)
    np.testing.assert_array_equal(view.image, scene.image[16:240, 16:240])
    np.testing.assert_array_equal(view.mask, scene.mask[16:240, 16:240])


def test_quantised_weights_come_back_close(tmp_path):
    torch.manual_seed(0)
    state = {
        "conv.weight": torch.randn(8, 3, 3, 3),
        "bn.bias": torch.randn(8),
        "bn.num_batches_tracked": torch.tensor(1),
    }
    save_quantized(tmp_path / "c.safetensors", state, ("a", "b"), {})
    loaded, classes = load_dequantized(tmp_path / "c.safetensors")
    assert classes == ("a", "b")
    assert set(loaded) == {"conv.weight", "bn.bias"}
    torch.testing.assert_close(loaded["bn.bias"], state["bn.bias"])
    # Half a step of 1/127 of the largest weight of a channel.
    assert relative_distance(loaded["conv.weight"], state["conv.weight"]) < 0.01


def test_checkpoint_is_small():
    assert DEMO_CHECKPOINT.stat().st_size <= 12e6


def test_checkpoint_classifies_held_out_images(eager_model):
    # 100 of the 1,000 that the slow test takes: 95 % leaves room for the smaller sample.
    assert accuracy(eager_model, "test", 100, torch.device("cpu"), 0) >= 0.9


@pytest.mark.slow
def test_checkpoint_classifies_95_percent_of_1000_held_out_images(eager_model):
    assert accuracy(eager_model, "test", 1000, torch.device("cpu"), 0) >= 0.95


def test_localised_stages_penalise_relevance_outside_the_shape(eager_model):
    view = draw_view("train", 0)
    pixels = view_pixels("train", [0])
    labels, mask = torch.tensor([view.label]), torch.from_numpy(view.mask.copy())[None, None]
    plain, localised = STAGES[0], STAGES[-1]
    assert set(compute_losses(eager_model, pixels.clone(), labels, mask, plain)) == {"classes"}
    share = compute_losses(eager_model, pixels.clone(), labels, mask, localised)["outside"]
    everywhere = compute_losses(eager_model, pixels.clone(), labels, torch.ones_like(mask), localised)["outside"]
    nowhere = compute_losses(eager_model, pixels.clone(), labels, torch.zeros_like(mask), localised)["outside"]
    assert everywhere == 0
    assert 0 < share < nowhere
    assert nowhere.item() == pytest.approx(1)
