import numpy as np
import pytest

from avadclip_fast.data import CCTV_FIGHTS, PRESETS, XD_VIOLENCE, DataError, LabelError, encode, one_kind


@pytest.mark.parametrize(
    ("label", "hot"),
    [
        ("A", [0]),
        ("A-0-0", [0]),
        ("B1-0-0", [1]),
        ("B2-G-B6", [2, 5, 6]),
        ("B6-G-B2", [2, 5, 6]),
        ("B4-B4-0", [3]),
        (" B5 - G ", [4, 6]),
    ],
)
def test_encode(label, hot):
    expected = np.zeros(7, np.float32)
    expected[hot] = 1
    encoded = encode(label, XD_VIOLENCE)
    assert encoded.dtype == np.float32
    np.testing.assert_array_equal(encoded, expected)


@pytest.mark.parametrize(
    ("label", "words"),
    [
        ("B2-X9-0", ["X9", "B2", "explosion"]),
        ("B3", ["B3"]),
        ("b1", ["b1"]),
        ("", ["zero labels"]),
        ("0-0-0", ["zero labels", "A"]),
        ("A-B1-0", ["normal", "anomalous"]),
    ],
)
def test_encode_refuses(label, words):
    with pytest.raises(LabelError) as caught:
        encode(label, XD_VIOLENCE)
    assert all(word in str(caught.value) for word in words)
    assert isinstance(caught.value, DataError)


def test_classes_follow_the_codes_given():
    codes = {"N": "calm", "X": "storm"}
    np.testing.assert_array_equal(encode("X-0", codes), [0, 1])
    with pytest.raises(LabelError, match="N"):
        encode("N-X", codes)


def test_labels_of_one_kind_are_told():
    codes = {"N": "normal", "B1": "fighting", "G": "explosion"}
    assert one_kind(["N", "B1-0-0"], codes) is one_kind(["N-0-0", "G", "N"], codes) is one_kind([], codes) is None
    assert "labelled normal; " in one_kind(["N", "N-0-0"], codes) and "(N is normal)" in one_kind(["N"], codes)
    assert "labelled abnormal; " in one_kind(["B1", "G-0-0"], codes)


def test_presets():
    xd, cctv = PRESETS["xd-violence"], PRESETS["cctv-fights"]
    assert (list(xd.codes), xd.frames_per_snippet, xd.distill_weight) == (list(XD_VIOLENCE), 16, 1e-8)
    assert (cctv.codes, cctv.frames_per_snippet, cctv.distill_weight) == (CCTV_FIGHTS, 4, 1e-7)
    assert list(XD_VIOLENCE.items())[0] == ("A", "normal") and list(XD_VIOLENCE)[-1] == "G"
