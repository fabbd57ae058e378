#!/usr/bin/env python
"""Turns a checkpoint into a small safetensors file with its config and base fingerprint, or such a file back."""

import argparse
from functools import partial
from pathlib import Path

from e3va_mm.checkpoints.files import publish, unpublish
from e3va_mm.checks import check_target


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('source', help='a .pth checkpoint, or a .safetensors file to turn back')
    parser.add_argument('target', help='a .safetensors file, or a .pth checkpoint')
    parser.add_argument('--half', action='store_true', help='half the size: matrices in fp16')
    args = parser.parse_args()
    suffixes = (Path(args.source).suffix, Path(args.target).suffix)
    directions = {('.pth', '.safetensors'): partial(publish, half=args.half), ('.safetensors', '.pth'): unpublish}
    if suffixes not in directions:
        raise ValueError(f'{args.source} -> {args.target}: give .pth and .safetensors, or .safetensors and .pth')
    if args.half and suffixes[1] != '.safetensors':
        raise ValueError(f'--half is for a .safetensors target, {args.target} would be as its source is')
    check_target('target', args.target, [args.source])
    directions[suffixes](args.source, args.target)
    print(f'{args.target}: {Path(args.target).stat().st_size / 2**20:.2f} MiB')


if __name__ == '__main__':
    main()
