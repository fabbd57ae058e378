"""The demo's picture: a row an image; the truth, and for each model its nuclei and its mistakes."""

from collections.abc import Sequence
from pathlib import Path

import cv2
import matplotlib
import numpy as np
from nuclei_data import SOURCE, count, match

matplotlib.use('Agg')
import matplotlib.pyplot as plt

# The most crowded validation image of four stains; chosen before any model was trained.
IMAGES = ('00ae65c1c6631ae6', 'a7f6194ddbeaefb1', 'f6863b83d75e5927', '9bb6e39d5f4415bc')
SIDE = 256  # The part of an image that is drawn, from its upper left corner.
FOUND, MISSED, WRONG = (70, 160, 90), (235, 40, 40), (255, 165, 0)


def draw(truths: dict, predictions: dict[str, dict], path: Path, images: Sequence[str] = IMAGES) -> None:
    """Args: true numbers by image, predicted ones by model and image (:mod:`nuclei_data`), the file to write, rows."""
    num_columns = 2 + 2 * len(predictions)
    size = (2.15 * num_columns, 2.35 * len(images) + 0.7)
    figure, axes = plt.subplots(len(images), num_columns, figsize=size, layout='constrained')
    for row, name in zip(axes, images):
        truth = truths[name][:SIDE, :SIDE]
        show(row[0], brighten(name), 'image')
        show(row[1], coloured(truth), f'truth: {count(truth)} nuclei')
        for index, model in enumerate(predictions):
            predicted = predictions[model][name][:SIDE, :SIDE]
            found = match(truth, predicted)
            show(row[2 + 2 * index], coloured(predicted), model, weight='bold')
            title = f'{len(found)} found, {count(truth) - len(found)} missed'
            show(row[3 + 2 * index], mistakes(truth, predicted, found), title)
    figure.suptitle('Left of a pair: a colour a nucleus. Right: green found, red missed or merged, orange no nucleus')
    figure.savefig(path, dpi=80)
    plt.close(figure)


def show(axis, picture: np.ndarray, title: str, **style) -> None:
    axis.imshow(picture)
    axis.set_title(title, fontsize=11, **style)
    axis.set_axis_off()


def brighten(name: str) -> np.ndarray:
    """The image in RGB; a dark one stretched to full brightness, for eyes."""
    image = cv2.imread(str(SOURCE / 'images/val' / f'{name}.jpg'))[..., ::-1].astype(np.float32)
    top = np.percentile(image, 99.5) if image.mean() < 100 else 255
    return np.clip(image * (255 / top), 0, 255).astype(np.uint8)[:SIDE, :SIDE]


def coloured(nuclei: np.ndarray) -> np.ndarray:
    palette = (plt.get_cmap('hsv')(np.random.default_rng(0).permutation(256))[:, :3] * 255).astype(np.uint8)
    picture = palette[nuclei % 256]
    picture[nuclei == 0] = 20
    return picture


def mistakes(truth: np.ndarray, predicted: np.ndarray, found: dict[int, int]) -> np.ndarray:
    picture = np.full((*truth.shape, 3), 20, np.uint8)
    picture[predicted > 0] = WRONG
    picture[(truth > 0) & ~np.isin(truth, list(found))] = MISSED
    picture[np.isin(predicted, list(found.values())) & (predicted > 0)] = FOUND
    return picture
