import dataclasses

import numpy as np
import pytest

from moevlm.world import vocabulary as v
from moevlm.world.ground_truth import ATTRIBUTES, NUM_CLASSES, patch_labels
from moevlm.world.rendering import render
from moevlm.world.scenes import Scene, iterate_scenes
from moevlm.world.shapes import shape_mask

GRID, PATCH = 6, 16


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return list(iterate_scenes("train", 5, 150))


def test_the_same_scene_gives_the_same_pixels(scenes):
    for scene in scenes[:10]:
        assert render(scene).tobytes() == render(scene).tobytes()


@pytest.mark.parametrize("image_size", [32, 96, 224])
def test_images_are_rgb_of_the_asked_size(scenes, image_size):
    image = render(scenes[0], image_size)
    assert (image.mode, image.size) == ("RGB", (image_size, image_size))


def test_too_small_images_are_refused(scenes):
    with pytest.raises(ValueError, match="image_size must be at least 32, got 8"):
        render(scenes[0], 8)


def test_every_patch_label_agrees_with_the_pixels(scenes):
    """Every patch shows nearly pure pixels of the colour it is labelled with."""
    for scene in scenes:
        pixels = np.asarray(render(scene)).astype(int)
        colours = patch_labels(scene, GRID)["colour"]
        for row, column in zip(*np.nonzero(colours), strict=True):
            value = np.array(v.COLOUR_VALUES[v.COLOURS[colours[row, column] - 1]])
            window = pixels[row * PATCH : (row + 1) * PATCH, column * PATCH : (column + 1) * PATCH]
            assert (np.abs(window - value).max(axis=-1) < 60).sum() >= 6, (scene.scene_id, row, column)


def test_every_object_owns_a_patch(scenes):
    for scene in scenes:
        categories = patch_labels(scene, GRID)["category"]
        found = {v.CATEGORIES[i - 1] for i in categories[categories > 0]}
        assert found == {o.category for o in scene.objects}


def test_large_objects_own_more_patches_than_small_ones(scenes):
    sizes = np.stack([patch_labels(s, GRID)["size"] for s in scenes])
    num_objects = {size: sum(o.size == size for s in scenes for o in s.objects) for size in v.SIZES}
    per_object = {size: (sizes == 1 + i).sum() / num_objects[size] for i, size in enumerate(v.SIZES)}
    assert per_object["large"] > 3
    assert 1 <= per_object["small"] < 2


def test_patch_labels_lie_below_their_number_of_classes(scenes):
    for scene in scenes[:20]:
        labels = patch_labels(scene, 8)
        assert labels.keys() == ATTRIBUTES.keys()
        assert all(ids.min() >= 0 and ids.max() < NUM_CLASSES[a] and ids.shape == (8, 8) for a, ids in labels.items())


def test_a_label_changes_the_image(scenes):
    scene = next(s for s in scenes if any(o.label for o in s.objects))
    bare = dataclasses.replace(scene, objects=tuple(dataclasses.replace(o, label=None) for o in scene.objects))
    assert np.abs(np.asarray(render(scene)).astype(int) - np.asarray(render(bare))).sum() > 5000


def test_textures_change_the_image(scenes):
    item = scenes[0].objects[0]
    images = set()
    for texture in v.TEXTURES:
        first = dataclasses.replace(item, texture=texture)
        images.add(render(dataclasses.replace(scenes[0], objects=(first, *scenes[0].objects[1:]))).tobytes())
    assert len(images) == 3


def test_silhouettes_are_far_apart():
    masks = {c: np.asarray(shape_mask(c, 68)) > 0 for c in v.CATEGORIES}
    for a in v.CATEGORIES:
        for b in v.CATEGORIES:
            if a != b:
                union = (masks[a] | masks[b]).sum()
                assert (masks[a] & masks[b]).sum() / union < 0.9, (a, b)
