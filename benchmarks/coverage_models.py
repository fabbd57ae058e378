"""Stock models made small enough to train a step on one core: what is shrunk, and what is left as it is.

Left are types, widths, stages, ``out_indices``, and with them all that necks and heads rely on. Shrunk are:
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from mmengine.config import Config, ConfigDict

from benchmarks.training import ROOT
from e3va_mm.named_configs import configs_of

# Of an image's side; a few models take no image as small as the first.
PIXELS = (64, 512)
MOST_CLASSES = 19


def at_most(limit: int) -> Callable[[Any], Any]:
    """A rule that limits numbers, alone or in a list, and lets all else be."""

    def limited(value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return type(value)(limited(item) for item in value)
        return min(value, limit) if type(value) is int else value

    return limited


def _blocks(value: Any) -> Any:
    return at_most(2)(value) if isinstance(value, (list, tuple)) else value


def _square(pixels: int) -> Callable[[Any], Any]:
    return lambda value: value if value is None else (pixels, pixels)


def _not_pretrained(value: Any) -> Any:
    """An ``init_cfg``, without what would read a file."""
    entries = value if isinstance(value, (list, tuple)) else [value]
    kept = [entry for entry in entries if not (entry and 'checkpoint' in entry)]
    return value if len(kept) == len(entries) else kept or None


# By key, wherever it stands in a model.
RULES: dict[str, Callable[[Any], Any]] = {
    'depth': lambda value: 50 if type(value) is int and value > 53 else value,
    'depths': _blocks,
    'num_layers': _blocks,
    'num_queries': at_most(30),
    'sos_token_num': at_most(30),  # SAN's queries
    'num_proposals': at_most(20),  # no more than max_per_img, which some heads rely on
    'num_points': lambda value: 256 if type(value) is int and value > 1000 else value,
    'fc_out_channels': at_most(128),
    'max_per_img': at_most(20),
    'max_per_image': at_most(20),
    'nms_pre': at_most(100),
    'num': at_most(64),
    'img_size': _square(PIXELS[0]),
    'batch_augments': lambda value: None,
    'init_cfg': _not_pretrained,
    'pretrained': lambda value: False if isinstance(value, bool) else None,
    'teacher_ckpt': lambda value: None,
    'teacher_config': lambda value: str(value).replace('configs/', f'{configs_of("mmdet")}/', 1),
}
RULES_OF_SEGMENTORS: dict[str, Callable[[Any], Any]] = {
    'size': _square(PIXELS[0]),
    'crop_size': _square(PIXELS[0]),
    'stride': lambda value: value if isinstance(value, int) else (PIXELS[0], PIXELS[0]),
}


# A language model of one layer and a few words, in place of one that would be downloaded.
BERT, TINY_BERT = 'bert-base-uncased', ROOT / 'work_dirs/coverage/bert'
WORDS = ('[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]', '.', '?', 'cat', 'dog')


def write_bert(folder: Path) -> None:
    from transformers import BertConfig, BertModel, BertTokenizer

    folder.mkdir(parents=True, exist_ok=True)
    (folder / 'vocab.txt').write_text('\n'.join(WORDS))
    BertTokenizer(str(folder / 'vocab.txt')).save_pretrained(folder)
    size = BertConfig(vocab_size=len(WORDS), num_hidden_layers=1, intermediate_size=64)
    BertModel(size).save_pretrained(folder)


def shrink(config: Config, toolbox: str) -> ConfigDict:
    """The shrunk model of a config, stock or tuned."""
    rules = {**RULES, **(RULES_OF_SEGMENTORS if toolbox == 'mmseg' else {})}
    model = ConfigDict(_shrunk(config.model.to_dict(), rules))
    if toolbox == 'mmseg':
        _limit_classes(model)
    return model


def _shrunk(node: Any, rules: dict[str, Callable]) -> Any:
    if isinstance(node, dict):
        changed = {key: rules[key](value) if key in rules else value for key, value in node.items()}
        return {key: _shrunk(value, rules) for key, value in changed.items()}
    if node == BERT:
        if not TINY_BERT.exists():
            write_bert(TINY_BERT)
        return str(TINY_BERT)
    # Some heads ask for tuples, some for lists.
    return type(node)(_shrunk(item, rules) for item in node) if isinstance(node, (list, tuple)) else node


def _limit_classes(model: ConfigDict) -> None:
    """Heads of as many classes as a data set has differ in nothing else, unless each class has a weight."""
    for head in (model.get('decode_head'), model.get('auxiliary_head')):
        for own in head if isinstance(head, (list, tuple)) else [head]:
            if own and 'class_weight' not in str(own):
                own.update(_shrunk(own.to_dict(), {'num_classes': at_most(MOST_CLASSES)}))


def image_sizes(model: dict) -> tuple[int, ...]:
    """Sides of images (pixels) to try a model with, until one does."""
    anchors = (model.get('bbox_head') or {}).get('anchor_generator') or {}
    return (anchors['input_size'],) if 'input_size' in anchors else PIXELS
