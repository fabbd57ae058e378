"""The embedded nuclei as semantic labels, and nuclei again out of predicted labels.

Nuclei touch. So that they can be told apart, the outermost pixels of each are a class of their own, as in DCAN
(https://arxiv.org/abs/1604.02677): what is left of the nuclei are islands, one a nucleus.
"""

import json
import shutil
from pathlib import Path

import cv2
import numpy as np

import e3va_mm

SOURCE = Path(e3va_mm.__file__).parent / 'data/nuclei'
NUCLEUS, BORDER = 1, 2
SQUARE = np.ones((3, 3), np.uint8)
SMALLEST = 10  # Pixels; smaller islands are noise.


def write_nuclei(root: Path) -> None:
    """Writes ``images/SPLIT/*.jpg`` and ``labels/SPLIT/*.png`` (0 is ground) for the splits train and val."""
    for split in ('train', 'val'):
        shutil.copytree(SOURCE / 'images' / split, root / 'images' / split, dirs_exist_ok=True)
        (root / 'labels' / split).mkdir(parents=True, exist_ok=True)
        for name, nuclei in true_nuclei(split).items():
            cv2.imwrite(str(root / 'labels' / split / f'{name}.png'), labels_of(nuclei))


def true_nuclei(split: str) -> dict[str, np.ndarray]:
    """By image, without its suffix: the number of the nucleus that a pixel belongs to, (H, W) int32; 0 is ground."""
    content = json.loads((SOURCE / f'annotations/instances_{split}.json').read_text())
    maps = {image['id']: np.zeros((image['height'], image['width']), np.int32) for image in content['images']}
    for number, nucleus in enumerate(content['annotations'], 1):
        for polygon in nucleus['segmentation']:
            corners = np.array(polygon, np.int32).reshape(-1, 2)
            cv2.fillPoly(maps[nucleus['image_id']], [corners], number)
    return {Path(image['file_name']).stem: maps[image['id']] for image in content['images']}


def labels_of(nuclei: np.ndarray) -> np.ndarray:
    """Pixels of a nucleus beside a pixel of another, or of the ground, are its border."""
    numbers = nuclei.astype(np.float32)  # what OpenCV's morphology takes
    labels = np.where(nuclei > 0, NUCLEUS, 0).astype(np.uint8)
    labels[(nuclei > 0) & (cv2.dilate(numbers, SQUARE) != cv2.erode(numbers, SQUARE))] = BORDER
    return labels


def nuclei_of(labels: np.ndarray) -> np.ndarray:
    """Each island of predicted nucleus, grown over the border around it: numbers as of :func:`true_nuclei`."""
    _, islands, stats, _ = cv2.connectedComponentsWithStats((labels == NUCLEUS).astype(np.uint8), connectivity=4)
    islands[stats[islands, cv2.CC_STAT_AREA] < SMALLEST] = 0
    grown = cv2.dilate(islands.astype(np.float32), SQUARE).astype(np.int32)
    return np.where((islands == 0) & (labels == BORDER), grown, islands)


def match(truth: np.ndarray, predicted: np.ndarray) -> dict[int, int]:
    """Predicted number by true number, of the nuclei that overlap by more than half of their union."""
    # A number for each pair, since columns are sorted far more slowly.
    pairs, overlaps = np.unique((truth.astype(np.int64) << 32) + predicted, return_counts=True)
    areas, own_areas = (dict(zip(*np.unique(numbers, return_counts=True))) for numbers in (truth, predicted))
    return {
        int(true): int(own)
        for (true, own), overlap in zip(zip(pairs >> 32, pairs & 0xFFFFFFFF), overlaps)
        if true and own and 2 * overlap > areas[true] + own_areas[own] - overlap
    }


def count(nuclei: np.ndarray) -> int:
    return len(np.unique(nuclei[nuclei > 0]))
