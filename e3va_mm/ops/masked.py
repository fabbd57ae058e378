"""A convolution at some places only (guided anchoring): the places' patches, and the results back to their places."""

import torch.nn.functional as F


def masked_im2col_forward(features, rows, columns, patches, kernel_h, kernel_w, pad_h, pad_w) -> None:
    """features: (1, C, H, W); writes patches: (C · kernel_h · kernel_w, places)."""
    unfolded = F.unfold(features, (kernel_h, kernel_w), padding=(pad_h, pad_w))[0]
    width = features.shape[3] + 2 * pad_w - kernel_w + 1
    patches.copy_(unfolded[:, rows * width + columns])


def masked_col2im_forward(results, rows, columns, output, height, width, channels) -> None:
    """results: (channels, places); writes them to output: (1, channels, height, width)."""
    output[0, :, rows, columns] = results
