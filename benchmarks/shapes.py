"""A small data set that is drawn, for tests of the tools: no download, the same every time.

Five kinds of shapes, each filled with a pattern of its own, lie on a noisy ground among plain distractors and partly
cover one another. Colours, noise, size, place and direction are random, so that neither colour nor brightness tells a
class, and all of it is faint: little here looks like the photographs that backbones are pre-trained on. Written as COCO
instances and as semantic PNGs.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import cv2
import numpy as np

CLASSES = ('circle', 'square', 'triangle', 'cross', 'star')
SPLITS = {'train': 240, 'val': 80}
CONTRAST = 0.2  # of the colours that are drawn
_DRAWING = 1  # Raised when the drawing changes, so that data sets written before are replaced.


def write_shapes(root: str | Path, image_size: int = 96, splits: dict[str, int] = SPLITS, seed: int = 0) -> None:
    """Writes the data set, unless it is there already.

    Args:
        root: folder; gets ``images/SPLIT/*.png`` (RGB), ``masks/SPLIT/*.png`` (0 is ground, then the classes) and
            ``annotations/instances_SPLIT.json``.
        image_size: height and width in pixels.
        splits: number of images by split.
        seed: every image is drawn from (seed, split, index) alone.
    """
    root = Path(root)
    recipe = {'image_size': image_size, 'splits': splits, 'seed': seed, 'drawing': _DRAWING}
    stamp = root / 'recipe.json'
    if stamp.is_file() and json.loads(stamp.read_text()) == recipe:
        return
    for number, (split, num_images) in enumerate(splits.items()):
        _write_split(root, split, num_images, image_size, (seed, number))
    stamp.write_text(json.dumps(recipe))


def _write_split(root: Path, split: str, num_images: int, image_size: int, seed: tuple[int, ...]) -> None:
    for folder in ('images', 'masks'):
        (root / folder / split).mkdir(parents=True, exist_ok=True)
    (root / 'annotations').mkdir(exist_ok=True)
    images, annotations = [], []
    for index in range(num_images):
        name = f'{index:04d}.png'
        picture, labels, instances = draw_scene(np.random.default_rng((*seed, index)), image_size)
        cv2.imwrite(str(root / 'images' / split / name), picture[..., ::-1])
        cv2.imwrite(str(root / 'masks' / split / name), labels)
        images.append({'id': index, 'file_name': name, 'height': image_size, 'width': image_size})
        for category, mask in instances:
            annotations.append({'id': len(annotations) + 1, 'image_id': index, **_coco_instance(category, mask)})
    categories = [{'id': number, 'name': name} for number, name in enumerate(CLASSES, 1)]
    content = {'images': images, 'annotations': annotations, 'categories': categories}
    (root / 'annotations' / f'instances_{split}.json').write_text(json.dumps(content))


def draw_scene(rng: np.random.Generator, image_size: int) -> tuple[np.ndarray, np.ndarray, list]:
    """One image: RGB (H, W, 3) uint8, semantic labels (H, W) uint8, and visible ``(category, mask)`` instances."""
    picture = _noise(rng, image_size)
    for _ in range(rng.integers(1, 4)):
        distractor = _outline(rng, image_size)
        picture[distractor] = _noise(rng, image_size)[distractor]
    owner = np.zeros((image_size, image_size), np.int32)
    categories = rng.integers(1, len(CLASSES) + 1, rng.integers(2, 5))
    for number, category in enumerate(categories, 1):
        mask = _outline(rng, image_size, CLASSES[category - 1])
        picture[mask] = _patterned(rng, image_size, CLASSES[category - 1])[mask]
        owner[mask] = number
    picture = np.round(128 + CONTRAST * (picture.astype(np.float32) - 128)).astype(np.uint8)
    labels = np.concatenate([[0], categories]).astype(np.uint8)[owner]
    instances = [(int(category), owner == number) for number, category in enumerate(categories, 1)]
    return picture, labels, [(category, mask) for category, mask in instances if mask.sum() >= 40]


def _noise(rng: np.random.Generator, size: int) -> np.ndarray:
    """Coloured noise of a random grain on a random base colour: ground and distractors."""
    grain = int(rng.integers(2, 8))
    noise = rng.normal(0, 12, (size // grain + 2, size // grain + 2, 3)).astype(np.float32)
    base = rng.uniform(50, 205, 3)
    return np.clip(base + cv2.resize(noise, (size, size), interpolation=cv2.INTER_LINEAR), 0, 255).astype(np.uint8)


def _patterned(rng: np.random.Generator, size: int, name: str) -> np.ndarray:
    """Two noisy colours in the pattern of a class, with random period, phase and direction."""
    period, angle = rng.uniform(6, 12), rng.uniform(0, 2 * np.pi)
    y, x = np.mgrid[:size, :size] * (2 * np.pi / period) + rng.uniform(0, 2 * np.pi, (2, 1, 1))
    u, v = np.cos(angle) * x + np.sin(angle) * y, np.cos(angle) * y - np.sin(angle) * x
    height = {
        'circle': np.sin(u),
        'square': np.sin(u) * np.sin(v),
        'triangle': np.sin(u) + np.sin(v) - 0.9,
        'cross': np.sin(u + 2 * np.sin(v / 2)),
        'star': np.where(np.sin(v) > 0, np.sin(u / 2), np.cos(u / 2)),
    }[name]
    return np.where(height[..., None] > 0, _noise(rng, size), _noise(rng, size))


def _outline(rng: np.random.Generator, size: int, name: str = 'circle') -> np.ndarray:
    """Mask of a shape of random size, place and direction."""
    radius, turn = rng.uniform(0.16, 0.3) * size, rng.uniform(0, 2 * np.pi)
    num_corners = {'triangle': 3, 'square': 4, 'cross': 12, 'star': 10}.get(name, 40)
    angles = turn + 2 * np.pi * np.arange(num_corners) / num_corners
    reach = {'star': [1, 0.45], 'cross': [0.42, 1, 1]}.get(name, [1])
    reach = np.resize(reach, num_corners)
    corners = reach[:, None] * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    centre = rng.uniform(radius, size - radius, 2)
    mask = np.zeros((size, size), np.uint8)
    cv2.fillPoly(mask, [np.round(centre + radius * corners).astype(np.int32)], 1)
    return mask.astype(bool)


def _coco_instance(category: int, mask: np.ndarray) -> dict:
    contours, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    x, y, width, height = cv2.boundingRect(mask.astype(np.uint8))
    return {
        'category_id': category,
        'bbox': [x, y, width, height],
        'area': int(mask.sum()),
        'iscrowd': 0,
        'segmentation': [contour.flatten().tolist() for contour in contours if len(contour) >= 3],
    }


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description='Writes the data set.')
    parser.add_argument('root', nargs='?', default='data/shapes')
    write_shapes(parser.parse_args().root)
