"""A small data set that the package draws itself, for the demo and the tests: no download, the same every time.

Five kinds of shapes lie on a cluttered, textured ground. Colour and texture are drawn from the same distribution for
shapes, distractors and ground, so that only the outline tells a class: unlike the photographs that backbones are
pre-trained on. Written as COCO instances and as semantic PNGs.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import cv2
import numpy as np

CLASSES = ('circle', 'square', 'triangle', 'cross', 'star')
SPLITS = {'train': 240, 'val': 80}


def write_shapes(root: str | Path, image_size: int = 128, splits: dict[str, int] = SPLITS, seed: int = 0) -> None:
    """Writes the data set, unless it is there already.

    Args:
        root: folder; gets ``images/SPLIT/*.png`` (RGB), ``masks/SPLIT/*.png`` (0 is ground, then the classes) and
            ``annotations/instances_SPLIT.json``.
        image_size: height and width in pixels.
        splits: number of images by split.
        seed: every image is drawn from (seed, split, index) alone.
    """
    root = Path(root)
    recipe = {'image_size': image_size, 'splits': splits, 'seed': seed}
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
    picture = _texture(rng, image_size)
    for _ in range(rng.integers(1, 4)):
        _paint(rng, picture, _fragment(rng, image_size))
    owner = np.zeros((image_size, image_size), np.int32)
    categories = rng.integers(1, len(CLASSES) + 1, rng.integers(3, 7))
    for number, category in enumerate(categories, 1):
        mask = _shape(rng, image_size, CLASSES[category - 1])
        _paint(rng, picture, mask)
        owner[mask] = number
    labels = np.concatenate([[0], categories]).astype(np.uint8)[owner]
    instances = [(int(category), owner == number) for number, category in enumerate(categories, 1)]
    return picture, labels, [(category, mask) for category, mask in instances if mask.sum() >= 40]


def _texture(rng: np.random.Generator, size: int) -> np.ndarray:
    """Coloured noise of a random grain on a random base colour."""
    grain = int(rng.integers(2, 12))
    noise = rng.normal(0, 10, (size // grain + 2, size // grain + 2, 3)).astype(np.float32)
    base = rng.uniform(40, 215, 3)
    return np.clip(base + cv2.resize(noise, (size, size), interpolation=cv2.INTER_LINEAR), 0, 255).astype(np.uint8)


def _paint(rng: np.random.Generator, picture: np.ndarray, mask: np.ndarray) -> None:
    picture[mask] = _texture(rng, picture.shape[0])[mask]


def _fragment(rng: np.random.Generator, size: int) -> np.ndarray:
    """A distractor of no class: a thick open curve or a thin sliver."""
    points = rng.uniform(0, size, 2) + np.cumsum(rng.normal(0, size / 8, (4, 2)), axis=0)
    mask = np.zeros((size, size), np.uint8)
    cv2.polylines(mask, [points.astype(np.int32)], False, 1, thickness=int(rng.integers(3, 9)))
    return mask.astype(bool)


def _shape(rng: np.random.Generator, size: int, name: str) -> np.ndarray:
    radius = rng.uniform(0.13, 0.24) * size
    centre = rng.uniform(radius, size - radius, 2)
    outline = _outline(name) @ _rotation(rng.uniform(0, 2 * np.pi)).T
    mask = np.zeros((size, size), np.uint8)
    cv2.fillPoly(mask, [np.round(centre + radius * outline).astype(np.int32)], 1)
    return mask.astype(bool)


def _outline(name: str) -> np.ndarray:
    """Corners on or inside the unit circle, (N, 2)."""
    if name == 'cross':
        arm = np.array([[1, 0.3], [0.3, 0.3], [0.3, 1]])
        return np.concatenate([arm @ _rotation(turn * np.pi / 2).T for turn in range(4)])
    num_corners = {'square': 4, 'triangle': 3, 'star': 10}.get(name, 48)
    angles = 2 * np.pi * np.arange(num_corners) / num_corners
    reach = np.where(np.arange(num_corners) % 2, 0.42, 1.0) if name == 'star' else np.ones(num_corners)
    return reach[:, None] * np.stack([np.cos(angles), np.sin(angles)], axis=1)


def _rotation(angle: float) -> np.ndarray:
    return np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])


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
    parser = argparse.ArgumentParser(description='Writes the demo data set.')
    parser.add_argument('root', nargs='?', default='data/shapes')
    write_shapes(parser.parse_args().root)
