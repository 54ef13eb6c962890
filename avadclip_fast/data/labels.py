"""Class codes of the datasets, and multi-hot label encoding."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from .errors import LabelError

# Code -> class name, in the models' class order, normal first.
XD_VIOLENCE = {
    "A": "normal",
    "B1": "fighting",
    "B2": "shooting",
    "B4": "riot",
    "B5": "abuse",
    "B6": "car accident",
    "G": "explosion",
}
CCTV_FIGHTS = {"A": "normal", "B1": "fighting"}
FILLER = "0"


@dataclass(frozen=True)
class Preset:
    """Settings of a dataset: class codes, frames per snippet and the weight of L_ukd."""

    codes: dict[str, str]
    frames_per_snippet: int
    distill_weight: float


PRESETS = {
    "xd-violence": Preset(XD_VIOLENCE, frames_per_snippet=16, distill_weight=1e-8),
    "cctv-fights": Preset(CCTV_FIGHTS, frames_per_snippet=4, distill_weight=1e-7),
}


def encode(label: str, codes: dict[str, str]) -> np.ndarray:
    """Encodes a label such as `B2-G-B6` or `B1-0-0` (0 is filler) as a multi-hot vector.

    codes: code -> class name, normal first
    Returns (C,) float32. Raises LabelError if the label has an unknown code, no code, or normal with an anomaly.
    """
    order = list(codes)
    found = codes_in(label)
    unknown = sorted(found - set(order))
    if unknown:
        known = ", ".join(f"{code} ({name})" for code, name in codes.items())
        raise LabelError(
            f"label {label!r} has the unknown code {', '.join(unknown)}; known: {known}; --classes sets others"
        )
    if not found:
        raise LabelError(f"label {label!r} holds zero labels; a normal video is labelled {order[0]}")
    if order[0] in found and len(found) > 1:
        raise LabelError(f"label {label!r} is normal ({order[0]}) and anomalous at once; remove one of the two")
    return np.isin(order, list(found)).astype(np.float32)


def codes_in(label: str) -> set[str]:
    """The codes of a label, known or not, without filler."""
    return {code.strip() for code in label.split("-")} - {FILLER, ""}


def is_normal(label: str, codes: dict[str, str]) -> bool:
    """Whether a label denotes a normal video. Arguments and errors as for `encode`."""
    return bool(encode(label, codes)[0])


def one_kind(labels: Iterable[str], codes: dict[str, str]) -> str | None:
    """A warning, with its remedy, if a list's labels are all normal, or all abnormal; else None.

    codes and errors: as for `encode`
    """
    kinds = {is_normal(label, codes) for label in labels}
    if len(kinds) != 1:
        return None
    found, missing = ("normal", "abnormal") if kinds.pop() else ("abnormal", "normal")
    return (
        f"every video is labelled {found}; to be trained on, a list needs {missing} ones too: add some, or correct "
        f"the labels ({next(iter(codes))} is normal)"
    )
