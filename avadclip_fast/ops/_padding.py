"""Masks of padded rows, for models and the engine, which do not import the references."""

from ..reference._numerics import valid_mask, zero_padding

__all__ = ["valid_mask", "zero_padding"]
