import gc
import os
import pickle
import stat
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from malice import Call

from avadclip_fast import use_backend
from avadclip_fast.data import (
    DataError,
    atomic_write,
    chunk,
    load_features,
    pool,
    snippet_count,
    with_motion,
    write_features,
)
from avadclip_fast.data.atomic import read_record, remove_left


def plain_pool(features, length):
    """The definition, range by range."""
    n = len(features)
    out = np.zeros((length, features.shape[1]), np.float32)
    if n <= length:
        out[:n] = features
        return out, n
    bounds = np.linspace(0, n, length + 1, dtype=int)
    for i, (start, end) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
        out[i] = features[start] if start == end else np.mean(features[start:end], axis=0)
    return out, length


def plain_motion(features):
    """The definition, row by row."""
    last = len(features) - 1
    change = np.array([np.abs(features[max(t, 1)] - features[max(t, 1) - 1]) if last else 0 * features[0]
                       for t in range(last + 1)])  # fmt: skip

    def at(x, t):
        return x[min(max(t, 0), last)]

    steady = np.array([np.median([at(change, t + k) for k in (-1, 0, 1)], axis=0) for t in range(last + 1)])
    return np.array([np.mean([at(steady, t + k) for k in range(-4, 5)], axis=0) for t in range(last + 1)])


def rows(n, width=8, seed=0):
    return np.random.default_rng(seed).standard_normal((n, width)).astype(np.float32)


@given(n=st.integers(1, 400), length=st.integers(1, 64), seed=st.integers(0, 5))
@settings(max_examples=200, deadline=None)
def test_pool_is_the_plain_loop(n, length, seed):
    features = rows(n, seed=seed)
    pooled, valid = pool(features, length)
    expected, expected_valid = plain_pool(features, length)
    assert valid == expected_valid and pooled.dtype == np.float32
    np.testing.assert_allclose(pooled, expected, rtol=0, atol=1e-6)  # means of up to 400 numbers, about 1 each


@pytest.mark.parametrize("n", [1, 255, 256, 257, 258, 511, 512, 513, 20 * 256])
def test_pool_at_full_length(n):
    features = rows(n, width=16)
    pooled, valid = pool(features, 256)
    np.testing.assert_allclose(pooled, plain_pool(features, 256)[0], rtol=0, atol=1e-6)
    assert valid == min(n, 256) and not pooled[valid:].any()


def test_pool_is_on_the_host_whatever_is_forced_for_a_gpu():
    features = np.random.default_rng(0).standard_normal((40, 3), np.float32)
    with use_backend("cuda"):
        pooled, _ = pool(features, 7)
    np.testing.assert_allclose(pooled, pool(features, 7)[0], rtol=0, atol=1e-6)


def test_pool_leaves_its_input_alone():
    features = rows(50)
    before = features.copy()
    pool(features, 7)[0][:] = 0
    pool(features, 60)[0][:] = 0
    np.testing.assert_array_equal(features, before)


@given(n=st.integers(1, 100), length=st.integers(1, 30))
@settings(max_examples=100, deadline=None)
def test_chunks_are_the_video_and_zeros(n, length):
    features = rows(n)
    chunks, lengths = chunk(features, length)
    assert chunks.shape == (-(-n // length), length, 8) and lengths.dtype == np.int64
    assert lengths.min() >= 1 and lengths.sum() == n
    np.testing.assert_array_equal(np.concatenate([c[:m] for c, m in zip(chunks, lengths, strict=True)]), features)
    assert all(not c[m:].any() for c, m in zip(chunks, lengths, strict=True))
    with pytest.raises(ValueError, match="got length=0"):
        chunk(features, 0)


@pytest.mark.parametrize("n", [1, 2, 3, 8, 9, 40])
def test_motion_is_the_plain_loop_whatever_rows_are_asked_for(n):
    features = rows(n)
    whole = with_motion(features)
    assert whole.dtype == np.float32 and whole.shape == (n, 16)
    np.testing.assert_array_equal(whole[:, :8], features)
    np.testing.assert_allclose(whole[:, 8:], plain_motion(features), rtol=1e-6, atol=1e-6)
    for start, end in ((0, n), (n // 2, n), (n - 1, n), (0, 1), (n // 3, 2 * n // 3 + 1)):
        np.testing.assert_allclose(with_motion(features, start, end), whole[start:end], rtol=1e-6)


def test_a_cut_is_no_motion_and_shaking_is():
    still = np.repeat(rows(2), 20, axis=0)  # two scenes of 20 rows
    assert not with_motion(still)[:, 8:].any()
    shaking = still.copy()
    shaking[20:] += rows(20, seed=1)
    motion = with_motion(shaking)[:, 8:].mean(1)
    assert not motion[:14].any() and motion[26:].min() > 0.5


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("order", ["C", "F"])
def test_load(tmp_path, dtype, order):
    path, features = tmp_path / "x.npy", rows(5).astype(dtype, order=order)
    np.save(path, features)
    loaded = load_features(path, 8)
    assert loaded.dtype == np.float32 and loaded.flags.c_contiguous and loaded.flags.writeable
    np.testing.assert_array_equal(loaded, features.astype(np.float32))
    assert snippet_count(path) == 5


def test_a_size_that_is_a_truth_value(tmp_path):
    header(tmp_path / "x.npy", "'descr': '<f2', 'fortran_order': False, 'shape': (True, 8)")
    with open(tmp_path / "x.npy", "ab") as file:
        file.write(b"\0" * 16)
    assert load_features(tmp_path / "x.npy").shape == (1, 8)


def saved(path, array, **options):
    np.save(path, array, **options)


def header(path, text):
    path.write_bytes(b"\x93NUMPY\x01\0" + (len(text) + 3).to_bytes(2, "little") + f"{{{text}}}\n".encode())


BAD = {
    "missing": (lambda p: None, "no such file"),
    "folder": (lambda p: p.mkdir(), "cannot be read"),
    "empty file": (lambda p: p.write_bytes(b""), "not a .npy file"),
    "text": (lambda p: p.write_text("1,2,3\n"), "not a .npy file"),
    "pickle": (lambda p: p.write_bytes(pickle.dumps([1.0])), "not a .npy file"),
    "header cut": (lambda p: (saved(p, rows(9)), os.truncate(p, 40)), "not a .npy file"),
    "header of nothing": (
        lambda p: header(p, "'descr': (), 'fortran_order': False, 'shape': (2, 8)"),
        "not a .npy file",
    ),
    "header too deep": (lambda p: header(p, "-" * 9000 + "1"), "not a .npy file"),  # for which Python has no memory
    "data cut": (lambda p: (saved(p, rows(9)), os.truncate(p, 128 + 100)), "cut short"),
    "objects": (lambda p: saved(p, np.array([[1, "a"]], object), allow_pickle=True), "pickled object array"),
    "integers": (lambda p: saved(p, np.ones((2, 8), int)), "int64"),
    "a vector": (lambda p: saved(p, np.ones(8, np.float32)), "two dimensions"),
    "three dimensions": (
        lambda p: saved(p, np.ones((4, 1, 8), np.float32)),
        "x width; save every crop as a file",
    ),
    "no rows": (lambda p: saved(p, np.ones((0, 8), np.float32)), "empty"),
    "width": (lambda p: saved(p, np.ones((4, 7), np.float32)), "width 7, expected 8"),
}


@pytest.mark.parametrize("case", BAD)
def test_load_refuses(tmp_path, case):
    path = tmp_path / "bad one.npy"
    make, words = BAD[case]
    make(path)
    for read in (load_features, snippet_count):
        with pytest.raises(DataError) as caught:
            read(path, 8)
        assert str(path) in str(caught.value) and words in str(caught.value)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e300])
def test_load_names_the_first_row_that_is_not_finite(tmp_path, value):
    features = rows(9).astype(np.float64)
    features[4, 2] = features[7, 0] = value
    np.save(tmp_path / "x.npy", features)
    with pytest.raises(DataError, match=r"x.npy: row 4.*2 of 9"):
        load_features(tmp_path / "x.npy")


def test_load_never_unpickles(tmp_path):
    path, trace = tmp_path / "x.npy", tmp_path / "executed"
    np.save(path, np.array([[Call(os.mkdir, str(trace))]], object), allow_pickle=True)
    with pytest.raises(DataError):
        load_features(path)
    assert not trace.exists()


@given(where=st.integers(0, 127), byte=st.integers(0, 255))
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_damaged_header_is_an_error_of_ours_or_none(tmp_path, where, byte):
    path = tmp_path / "x.npy"
    np.save(path, rows(3))
    content = bytearray(path.read_bytes())
    content[where] = byte
    path.write_bytes(content)
    try:
        load_features(path)
    except DataError as error:
        assert str(path) in str(error)


def test_threads_read_headers_at_the_same_time(tmp_path):
    """A finalizer that runs while one thread parses a header lets others go on, at other depths."""

    class Garbage:
        def __init__(self):
            self.cycle = self

        def __del__(self):
            sum(range(50))

    def read(depth: int) -> tuple[int, ...]:
        if depth:
            return read(depth - 1)
        for _ in range(20):
            Garbage()
        return load_features(tmp_path / "x.npy", width=4).shape

    np.save(tmp_path / "x.npy", np.ones((3, 4), np.float32))
    before = gc.get_threshold(), sys.getswitchinterval()
    try:
        gc.set_threshold(20)
        sys.setswitchinterval(1e-6)
        with ThreadPoolExecutor(8) as threads:
            assert set(threads.map(read, [i % 7 for i in range(1500)])) == {(3, 4)}
    finally:
        gc.set_threshold(*before[0])
        sys.setswitchinterval(before[1])


def test_write_features(tmp_path):
    path, features = tmp_path / "x.npy", rows(4).astype(np.float16)
    write_features(path, features)
    np.testing.assert_array_equal(np.load(path), features)
    assert [p.name for p in tmp_path.iterdir()] == ["x.npy"]
    for bad in (np.ones(3, np.float32), np.ones((2, 2), int), np.ones((0, 4), np.float32)):
        with pytest.raises(DataError, match="y.npy"):
            write_features(tmp_path / "y.npy", bad)
    assert [p.name for p in tmp_path.iterdir()] == ["x.npy"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_atomic_write_keeps_the_old_file_on_failure(tmp_path, error):
    path = tmp_path / "x"
    path.write_bytes(b"old")
    with pytest.raises(error), atomic_write(path) as file:
        file.write(b"half of the n")
        file.flush()
        raise error
    assert path.read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1


def test_atomic_write_names_the_file_of_an_oserror(tmp_path):
    """Python does not where a disk is full; what names a file, or is no error of the system's, stays."""
    path = tmp_path / "x"
    for error, told in (
        (OSError(28, "No space left"), f"[Errno 28] No space left: '{path}'"),
        (OSError(2, "No such file", "y"), "[Errno 2] No such file: 'y'"),
        (TimeoutError("timed out"), "timed out"),
    ):
        with pytest.raises(OSError) as caught, atomic_write(path):
            raise error
        assert str(caught.value) == told
    for target, told in (
        (tmp_path / "none" / "x", "[Errno 2] No such file or directory: '{}'"),
        (tmp_path, "[Errno 21] Is a directory: '{}'"),
    ):
        with pytest.raises(OSError) as caught, atomic_write(target):
            pass
        assert str(caught.value) == told.format(target)


def test_atomic_write_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    """Else a crash of the machine could leave neither the old file nor the new one."""
    done, sync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: done.append(os.fstat(file).st_size) or sync(file))
    monkeypatch.setattr(os, "replace", lambda *paths: done.append("named") or replace(*paths))
    with atomic_write(tmp_path / "x") as file:
        file.write(b"12345")
    assert done == [5, "named"]


def test_a_record_that_is_none_is_empty(tmp_path):
    path = tmp_path / "a.json"
    assert read_record(path) == {}
    for text in (b"[]", b"{", b"\xff", b"[" * 10**5):
        path.write_bytes(text)
        assert read_record(path) == {}
    path.write_text('{"a": 1}')
    assert read_record(path) == {"a": 1}


def test_temporary_files_that_are_left_are_removed(tmp_path, monkeypatch):
    """Of killed processes: those of an hour ago, by our names; one may be gone by then."""
    left, recent, foreign, gone = (tmp_path / f".{name}.tmp" for name in ("0" * 16, "a" * 16, "0" * 15, "f" * 16))
    for path, ago in ((left, 3700), (recent, 3500), (foreign, 3700)):
        path.touch()
        os.utime(path, (time.time() - ago,) * 2)
    monkeypatch.setattr(Path, "glob", lambda self, how, glob=Path.glob: [gone, *glob(self, how)])
    remove_left(tmp_path)
    assert not left.exists() and recent.exists() and foreign.exists()


def test_atomic_write_is_an_ordinary_file(tmp_path):
    name = "n" * 255  # as long as a name can be
    with atomic_write(tmp_path / name, "w") as file:
        file.write("ä\n")
        assert not (tmp_path / name).exists()
    assert (tmp_path / name).read_bytes() == "ä\n".encode()
    (tmp_path / "plain").touch()
    assert stat.S_IMODE((tmp_path / name).stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)
