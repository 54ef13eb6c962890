"""The valid rows of a padded batch, one video after the other, and back."""

from torch import Tensor

from ._numerics import valid_mask


def pack_rows(padded: Tensor, lengths: Tensor, total: int) -> Tensor:
    """out = the rows t < lengths[b] of padded_b, videos in order, [total, D]"""
    return padded[valid_mask(lengths, padded.shape[1])]


def unpack_rows(packed: Tensor, lengths: Tensor, rows: int) -> Tensor:
    """out_bt = row t of video b, 0 for t >= lengths[b]"""
    mask = valid_mask(lengths, rows)
    return packed.new_zeros(*mask.shape, packed.shape[1]).index_put((mask,), packed)
