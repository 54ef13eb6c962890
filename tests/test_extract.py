"""`avadclip-fast extract`, as a user would call it, with small stand-in encoders."""

import errno
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from deadly import Grey
from long_video import make_long_video
from standins import NAMED
from test_cli import call, mistake
from videos import BAD, bad_videos, damage, forbid, make_video

from avadclip_fast.data import DataError, load_features, read_list
from avadclip_fast.data.packed import open_packed

av = pytest.importorskip("av")

from avadclip_fast.media import extract  # noqa: E402


class Fragile(Grey):
    def __call__(self, images):
        if images.float().mean() > 200:
            raise RuntimeError("too\nbright")
        return super().__call__(images)


class Interrupting(Grey):
    """Once, at white, does what Ctrl-C does."""

    left = 1

    def __call__(self, images):
        if images.float().mean() > 240 and Interrupting.left:
            Interrupting.left -= 1
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.2)  # until it has arrived
        return super().__call__(images)


class Large(Grey):
    def __call__(self, images):
        return super().__call__(images) * 0 + 1e5


QUICK = ["--visual-encoder", "deadly:Grey", "--audio-encoder", "deadly:Loudness", "-q"]


@pytest.fixture
def folder(tmp_path):
    films = tmp_path / "films"
    (films / "more").mkdir(parents=True)
    make_video(films / "a_label_B1-0-0.mkv", frames=40, audio=2, tone=(0.64, 1.6))
    make_video(films / "more" / "b.mp4", frames=70)
    return films


def test_folder_to_features(folder, tmp_path):
    out = tmp_path / "out"
    assert call("extract", folder, "-o", out, "--crops", "10", "--label", "A", "--float32", *QUICK) == 0
    rows = read_list(out / "list.csv", audio=False)
    assert [row.visual.relative_to(out / "visual").as_posix() for row in rows] == [
        *(f"a_label_B1-0-0__{k}.npy" for k in range(10)),
        *(f"more/b__{k}.npy" for k in range(10)),
    ]
    assert {row.audio for row in rows[:10]} == {out / "audio" / "a_label_B1-0-0.npy"} and rows[10].audio is None
    assert [rows[0].label, rows[10].label] == ["B1-0-0", "A"]  # --label is of those that nothing else tells of
    seen, heard = np.load(rows[0].visual), np.load(rows[0].audio)
    assert seen.dtype == heard.dtype == np.float32
    # frames 0 and 16 are greys of 0 and 64; 8 frames are no snippet; 6: what compression takes
    assert seen.shape == heard.shape == (2, 512)
    np.testing.assert_allclose(seen[:, 0], [0, 64], atol=6)
    # the tone begins with the second snippet: half of full scale, at 0.707 of its peak
    np.testing.assert_allclose(heard[:, 0], [0, 0.5 * 0.707], atol=0.03)
    record = json.loads((out / "done" / "more" / "b.json").read_text())
    assert record["times"] == [0, 0.64, 1.28, 1.92] and record["audio"] is False


def test_names_tell_labels(folder, tmp_path):
    assert call("extract", folder / "a_label_B1-0-0.mkv", "-o", tmp_path / "out", *QUICK) == 0
    assert [row.label for row in read_list(tmp_path / "out" / "list.csv")] == ["B1-0-0"]
    stored = np.load(tmp_path / "out" / "visual" / "a_label_B1-0-0__0.npy")
    assert stored.dtype == np.float16 and len(stored) == 2  # --float32 keeps float32


def test_a_silent_sound_track_is_listed(tmp_path):
    make_video(tmp_path / "a.mkv", frames=20, audio=1)
    assert call("extract", tmp_path / "a.mkv", "-o", tmp_path / "out", "--label", "A", *QUICK) == 0
    (row,) = read_list(tmp_path / "out" / "list.csv")
    assert not load_features(row.audio, 512).any()


def test_it_goes_on_where_it_was(folder, tmp_path, capsys):
    out = tmp_path / "out"

    def told(*options):
        assert call("extract", folder, "-o", out, *options, *QUICK) == 0
        return capsys.readouterr().out.splitlines()[0]

    assert told() == "2 extracted, 0 were there, 0 failed"
    assert told() == "0 extracted, 2 were there, 0 failed"
    for gone in ("visual/more/b__0.npy", "audio/a_label_B1-0-0.npy"):
        (out / gone).unlink()
        assert told() == "1 extracted, 1 were there, 0 failed"
    make_video(folder / "more" / "b.mp4", frames=20)
    assert told() == "1 extracted, 1 were there, 0 failed"
    os.utime(folder / "more" / "b.mp4", (0, 0))  # another file of as many bytes
    assert told() == "1 extracted, 1 were there, 0 failed"
    assert told("--every", "4", "--overwrite") == "2 extracted, 0 were there, 0 failed"


def test_one_that_fails_does_not_stop_the_rest(folder, tmp_path, capsys):
    (folder / "text.mp4").write_text("no video")
    (folder / "empty.mp4").touch()
    os.symlink(folder, folder / "more" / "loop")
    make_video(folder / "bright.mp4", frames=20, grey=lambda i: 255)
    out = tmp_path / "out"
    fragile = [*QUICK[:1], "test_extract:Fragile", *QUICK[2:]]
    assert call("extract", folder, "-o", out, *fragile) == 1
    said = capsys.readouterr()
    assert said.out.startswith("2 extracted, 0 were there, 3 failed")
    failed = json.loads((out / "extract.json").read_text())["failed"]
    reasons = {os.path.basename(f["source"]): f["reason"] for f in failed}
    assert "the file is empty" in reasons["empty.mp4"] and reasons["text.mp4"].endswith("text.mp4: not a video")
    assert "RuntimeError: too bright" in reasons["bright.mp4"]
    assert all(f"failed: {reason}" in said.err.splitlines() for reason in reasons.values())
    assert not list(out.rglob("*.tmp")) and not list(out.rglob("text*"))


def test_bad_input_is_told_and_leaves_nothing(tmp_path, capsys, monkeypatch):
    films, out = bad_videos(tmp_path / "bad"), tmp_path / "out"
    (films / "locked").mkdir()
    make_video(films / "locked" / "unseen.mp4", frames=20)
    make_video(films / "one.mkv", frames=1, width=35, height=51)  # a single frame of odd sizes is a video
    forbid(monkeypatch, films / "locked")
    assert call("extract", films, "-o", out, *QUICK) == 1
    said = capsys.readouterr()
    assert said.out.startswith(f"1 extracted, 0 were there, {len(BAD) + 1} failed")
    lines = {line.removeprefix(f"failed: {films}/").partition(":")[0]: line for line in said.err.splitlines()}
    assert set(lines) == {*BAD, "locked"} and lines["locked"].endswith("Permission denied")
    for name, wrong in BAD.items():
        assert re.search(wrong, lines[name]), lines[name]
    assert sorted(p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file()) == [
        "done/one.json", "extract.json", "list.csv", "visual/one__0.npy",
    ]  # fmt: skip


def test_addresses_are_not_read(tmp_path, capsys, monkeypatch):
    """Of videos and in lists: what looks like one is a path, and nobody is asked."""
    monkeypatch.setattr("socket.socket.connect", None)
    (tmp_path / "films.txt").write_text("http://127.0.0.1/a.mp4\nconcat:a.mp4|b.mp4\n")
    for given, told in ((tmp_path / "films.txt", "o such file"), ("file:///etc/passwd", "file:// is not read")):
        assert call("extract", given, "-o", tmp_path / "out", *QUICK) == 1
        assert told in capsys.readouterr().err


def test_an_address_is_told_what_reads_it(tmp_path, capsys, monkeypatch):
    """Path takes one of its slashes away; a folder of such a name is a folder."""
    out = ["-o", tmp_path / "out", *QUICK]
    assert call("extract", "http://x/y.mp4", *out) == 1
    told = "failed: http://x/y.mp4: http:// is not read (files only; `avadclip-fast stream` takes URLs)\n"
    assert capsys.readouterr().err == told
    sources, (failure,) = extract.find_sources(["rtsp://camera/1"])
    assert not sources and failure["source"] == "rtsp://camera/1"
    _, (failure,) = extract.find_sources(["rtsp://me:secret@camera/1"])
    assert failure["source"] == "rtsp://***@camera/1" and failure["reason"].startswith("rtsp://***@camera/1: rtsp:")
    (tmp_path / "cameras.txt").write_text("rtsp://me:secret@camera/1")
    assert call("extract", tmp_path / "cameras.txt", *out) == 1
    assert "secret" not in "".join(capsys.readouterr()) + (tmp_path / "out" / "extract.json").read_text()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "http:").mkdir()
    make_video(tmp_path / "http:" / "y.mp4", frames=20)
    (source,), failures = extract.find_sources(["http://y.mp4"])
    assert source.name == "y" and not failures


def test_a_list_is_not_replaced_by_that_of_the_features(folder, capsys):
    listed = folder / "list.csv"
    listed.write_text("path,label\nmore/b.mp4,B2\n")
    told = mistake(capsys, "extract", listed, "-o", folder, *QUICK)
    assert f"{listed} would be overwritten" in told and listed.read_text().startswith("path,label\n")


FORMS = {
    ".mts": "mpegts", ".m2ts": "mpegts", ".vob": "vob", ".mpe": "mpeg", ".asf": "asf", ".3g2": "3g2", ".mxf": "mxf",
}  # fmt: skip


def test_a_folder_is_searched_for_what_cameras_and_discs_write(tmp_path):
    for suffix, form in FORMS.items():
        codec = "mpeg4" if form in ("3g2", "asf", "mpegts") else "mpeg2video"
        make_video(tmp_path / f"{suffix[1:]}{suffix.upper()}", frames=40, form=form, codec=codec)
    make_video(tmp_path / "dav.dav", frames=40, form="mpeg", codec="mpeg2video")  # some recorders wrap this
    make_video(tmp_path / "ogv.ogv", frames=40, form="matroska")  # FFmpeg looks at what is in it
    (tmp_path / "._mp4.mp4").write_bytes(b"\0\5\x16\7 attributes that macOS keeps beside mp4.mp4")
    out = tmp_path / "out"
    assert call("extract", tmp_path, "-o", out, *QUICK) == 0
    assert {path.stem for path in (out / "done").iterdir()} == {*(suffix[1:] for suffix in FORMS), "dav", "ogv"}
    assert {"dhav", "ogg"} <= av.formats_available


def test_a_name_that_is_not_utf_8_fails_alone(folder, tmp_path, capsys):
    make_video(folder / "c.mp4", frames=20).rename(os.fsdecode(os.fsencode(folder) + b"/caf\xe9.mp4"))
    out = tmp_path / "out"
    assert call("extract", folder, "-o", out, *QUICK) == 1
    said = capsys.readouterr()
    assert said.out.startswith("2 extracted, 0 were there, 1 failed")
    assert r"caf\xe9.mp4: its name is not UTF-8" in said.err
    assert len((out / "list.csv").read_text().splitlines()) == 3


def test_names_steer_no_terminal(tmp_path, capsys):
    """Escape sequences and ends of lines in them are told as such, each name in its line."""
    films, out = tmp_path / "films", tmp_path / "out"
    films.mkdir()
    name = "a\x1b]0;title\x07\r\nwrote\x9b2J"
    make_video(films / f"{name}.mp4", frames=20)
    (films / f"{name} too.mp4").write_text("not a video")
    assert call("extract", films, "-o", out, "--label", "\x1b[1m", *QUICK) == 1
    assert call("check", out / "list.csv", "--no-audio", "--width", "4", "-q") == 1
    said = capsys.readouterr()
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", said.out + said.err)
    shown = r"a\x1b]0;title\x07\r\nwrote\x9b2J"
    assert said.err == f"failed: {films}/{shown} too.mp4: not a video\n"
    assert f"1 of 1 videos has no sound ({shown}): " in said.out and r"unknown code \x1b[1m; known" in said.out


def test_a_video_may_be_called_dot(tmp_path, monkeypatch):
    """Of which Python 3.13 takes no suffix."""
    plain = Path.with_suffix

    def strict(path, suffix):
        if path.stem + suffix == ".":
            raise ValueError("Invalid name '.'")
        return plain(path, suffix)

    monkeypatch.setattr(Path, "with_suffix", strict)
    (tmp_path / "films").mkdir()
    make_video(tmp_path / "films" / "..mp4", frames=20)
    (tmp_path / "all.csv").write_text("path\nfilms/..mp4\n")
    for given, name in ((tmp_path / "films", ""), (tmp_path / "all.csv", "films/")):
        for _ in range(2):
            assert call("extract", given, "-o", tmp_path / f"{name}out", "--label", "A", *QUICK) == 0
        (row,) = read_list(tmp_path / f"{name}out" / "list.csv", audio=False)
        assert row.visual == tmp_path / f"{name}out" / "visual" / f"{name}.__0.npy"


def test_another_label_is_taken(folder, tmp_path, capsys):
    out, video = tmp_path / "out", folder / "more" / "b.mp4"
    for label, listed in (((), ""), (("--label", "A"), "A"), (("--label", "B2"), "B2"), ((), "B2")):
        assert call("extract", video, "-o", out, *label, *QUICK) == 0
        (row,) = (out / "list.csv").read_text().splitlines()[1:]
        assert row.split(",")[-1] == listed
    assert "\n0 extracted, 1 were there" in capsys.readouterr().out


def test_a_label_for_those_that_have_none_replaces_no_list_s(folder, tmp_path):
    """In the same call and in later ones, and of what is extracted again."""
    out, listed = tmp_path / "out", folder / "all.csv"
    make_video(folder / "c.mp4", frames=20)
    listed.write_text("path,label\nmore/b.mp4,B2\n")

    def labels(*given):
        assert call("extract", *given, "-o", out, *QUICK) == 0
        return [row.label for row in read_list(out / "list.csv", audio=False)]

    assert labels(listed) == ["B2"]
    for label in "AG":
        assert labels(folder, "--label", label) == ["B1-0-0", label, "B2"]
    assert labels(listed, folder, "--label", "A") == labels(folder, listed, "--label", "A") == ["B1-0-0", "A", "B2"]
    assert labels(folder, "--label", "G", "--every", 4, "--overwrite") == ["B1-0-0", "G", "B2"]
    listed.write_text("path,label\nmore/b.mp4,B6\n")
    assert labels(listed, "--every", 4) == ["B1-0-0", "G", "B6"]


def test_what_training_would_miss_is_told(folder, tmp_path, capsys):
    """A teacher takes no row without sound, and nobody one without a label."""

    def told(*given):
        assert call("extract", *QUICK, "-o", tmp_path / "out", *given) == 0
        return capsys.readouterr().out.splitlines()[2:]  # after what was extracted and written

    unlabelled = "1 video has no label: call again with --label, or give a list"
    needs, alone = "a teacher needs sound for every row; ", "train a student on its own (train --student)"
    some = f"1 of 2 videos has no sound (more/b): {needs}remove these rows, or {alone}"
    assert told(folder) == [some, unlabelled]
    assert told(folder, "--label", "A") == [some]
    assert told(folder, "--audio-encoder", "none", "--overwrite") == []  # the label stays
    (folder / "a_label_B1-0-0.mkv").unlink()
    for name in "cd":
        make_video(folder / f"{name}.mp4", frames=20)
    assert told(folder, "--every", 4, "--overwrite")[1:] == [
        f"3 of 3 videos have no sound (c, d, more/b): {needs}{alone}",
        unlabelled.replace("1 video has", "2 videos have"),
    ]
    make_video(folder / "c.mp4", frames=20, audio=1, tone=(0, 1))
    assert told(folder / "c.mp4", "--every", 5, "--label", "A", "--overwrite")[1:] == []


def test_videos_of_other_settings_are_told(folder, tmp_path, capsys, monkeypatch):
    """How many are left out of the list, and by which options; another spelling of a path is no other setting."""
    out, weights = tmp_path / "out", tmp_path / "W.pt"
    weights.touch()
    monkeypatch.chdir(tmp_path)

    def told(*given):
        assert call("extract", *given, "-o", out, "--label", "A", *QUICK) == 0
        return capsys.readouterr().out

    assert told(folder, "--audio-weights", weights).startswith("2 extracted")
    for same in ("W.pt", "./W.pt", "films/../W.pt"):
        assert told(folder, "--audio-weights", same).startswith("0 extracted, 2 were there")
    some = "were extracted with other settings ("
    given = ["extract", folder, "-o", out, "--every", 4, "--audio-weights", "W.pt", *QUICK]
    features = (out / "visual/more/b__0.npy").read_bytes()
    told_before = f"{out} holds features of 2 of these videos, made with another --every: give another folder, or"
    assert told_before in mistake(capsys, *given)
    assert (out / "visual/more/b__0.npy").read_bytes() == features
    assert some not in told(folder, "--every", 4, "--overwrite")
    make_video(folder / "c.mp4", frames=40)
    assert f"\n2 videos {some}--every) and left out of the list: extract all" in told(folder / "c.mp4")
    options = "--crops", 5, "--float32", "--audio-weights", "W.pt"
    said = told(folder / "c.mp4", *options, "--overwrite")
    assert f"\n2 videos {some}--audio-weights, --crops, --every, --float32) and" in said


def test_features_of_another_video_of_the_same_name_stay(tmp_path, capsys, monkeypatch):
    """And with them a label that was typed; the same file, changed or moved, is done again or known."""
    out = tmp_path / "out"
    for day, frames in (("monday", 40), ("tuesday", 70)):
        (tmp_path / day).mkdir()
        make_video(tmp_path / day / "camera.mp4", frames=frames)
    monkeypatch.chdir(tmp_path / "monday")
    assert call("extract", "camera.mp4", "-o", out, *QUICK) == 0
    listed = (out / "list.csv").read_text().replace("__0.npy,", "__0.npy,B1")
    (out / "list.csv").write_text(listed)
    monkeypatch.chdir(tmp_path / "tuesday")
    for given in ("camera.mp4", tmp_path / "tuesday"):
        told = mistake(capsys, "extract", given, "-o", out, *QUICK)
        assert f"features of another video called camera, {tmp_path / 'monday' / 'camera.mp4'}: rename" in told
        assert (out / "list.csv").read_text() == listed and len(np.load(out / "visual" / "camera__0.npy")) == 2
    (tmp_path / "monday").rename(tmp_path / "moved")
    assert call("extract", tmp_path / "moved", "-o", out, *QUICK) == 0
    assert "0 extracted, 1 were there" in capsys.readouterr().out
    assert call("extract", tmp_path / "tuesday", "-o", out, *QUICK, "--overwrite") == 0
    assert len(np.load(out / "visual" / "camera__0.npy")) == 4


def test_labels_typed_into_the_list_stay(folder, tmp_path, capsys):
    """Whatever the next calls say; those that nobody typed are replaced as before."""
    out = tmp_path / "out"

    def listed(*options, given=folder):
        assert call("extract", given, "-o", out, *options, *QUICK) == 0
        return [line.rpartition(",")[2] for line in (out / "list.csv").read_text().splitlines()[1:]]

    assert listed() == ["B1-0-0", ""]
    (out / "list.csv").write_text((out / "list.csv").read_text().replace("b__0.npy,,", "b__0.npy,, B6 "))
    assert listed() == ["B1-0-0", "B6"] == listed("--label", "A") == listed("--every", 4, "--overwrite")
    (folder / "all.csv").write_text("path,label\na_label_B1-0-0.mkv,G\nmore/b.mp4,B2\n")
    other = {"given": folder / "all.csv"}
    assert listed("--overwrite", **other) == ["G", "B6"] == listed("--crops", 5, "--overwrite", **other)[::5]
    text = (out / "list.csv").read_text()
    (out / "list.csv").write_text(text.replace(",", ";"))
    told = mistake(capsys, "extract", folder, "-o", out, *QUICK)
    assert told.startswith(f"error: {out / 'list.csv'}: no column path, label") and "semicolons" in told


@pytest.mark.parametrize("header", ["path, label", "\ufeffpath ,label"])
def test_lists_of_videos_may_have_blanks(folder, header):
    """As those of features: around columns and cells."""
    (folder / "films.csv").write_text(f"{header}\n more/b.mp4, B2 \n\na_label_B1-0-0.mkv\t,\n")
    sources, _ = extract.find_sources([folder / "films.csv"], "A")
    assert {source.name: source.label for source in sources} == {"more/b": "B2", "a_label_B1-0-0": "B1-0-0"}


def test_damaged_frames_are_left_out_and_told(folder, tmp_path, capsys):
    damage(make_video(folder / "c.mp4", frames=100, noise=True))
    out = tmp_path / "out"
    assert call("extract", folder, "-o", out, *QUICK) == 0
    assert "\nc: damaged: 4 frames could not be decoded\n" in capsys.readouterr().out
    record = json.loads((out / "done" / "c.json").read_text())
    assert (record["snippets"], record["damaged"]) == (6, 4)


def test_a_broken_record_is_done_again(folder, tmp_path, capsys):
    out = tmp_path / "out"
    assert call("extract", folder, "-o", out, *QUICK) == 0
    record = json.loads((out / "done" / "more" / "b.json").read_text())
    (out / "done" / "gone.json").write_text("[]")
    for wrong in ({"settings": {"visual": 1}}, {"source": 5}, {"source": "a\0b"}, {"crops": "1"}, {"label": []}):
        (out / "done" / "gone.json").write_text(json.dumps(record | wrong))
        assert extract._read_record(out / "done" / "gone.json") is None
    for content in ("[" * 100_000, '{"settings": '):
        (out / "done" / "more" / "b.json").write_text(content)
    capsys.readouterr()
    assert call("extract", folder, "-o", out, *QUICK) == 0
    assert capsys.readouterr().out.startswith("1 extracted, 1 were there, 0 failed")


def test_what_a_killed_call_had_not_finished_is_removed(folder, tmp_path):
    out = tmp_path / "out"
    assert call("extract", folder, "-o", out, *QUICK) == 0
    left = [out / place / ".0123456789abcdef.tmp" for place in (".", "visual", "visual/more", "audio", "done/more")]
    for path in (*left, fresh := out / "visual" / ".fedcba9876543210.tmp"):  # of a call that still runs
        path.touch()
    for path in left:
        os.utime(path, (0, 0))
    assert call("extract", folder, "-o", out, *QUICK) == 0
    assert list(out.rglob("*.tmp")) == [fresh]


def test_replacing_that_is_killed_leaves_nothing_that_counts_as_done(folder, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    given = ["extract", folder / "more" / "b.mp4", "-o", out, "--label", "A", *QUICK]
    assert call(*given) == 0
    features = (out / "visual" / "b__0.npy").read_bytes()

    def killed(*_):
        raise RuntimeError

    written = extract.write_features
    monkeypatch.setattr(extract, "write_features", lambda *given: (written(*given), killed()))
    assert call(*given, "--every", 4, "--overwrite") == 1
    monkeypatch.undo()
    capsys.readouterr()
    del given[given.index("--label") : given.index("--label") + 2]
    assert call(*given) == 0
    assert capsys.readouterr().out.startswith("1 extracted, 0 were there")
    assert (out / "visual" / "b__0.npy").read_bytes() == features
    assert (out / "list.csv").read_text().splitlines()[1].endswith(",A")  # the label is kept


def test_a_video_that_grows_while_it_is_read_is_done_again(folder, tmp_path, capsys, monkeypatch):
    out, path = tmp_path / "out", folder / "more" / "b.mp4"
    given, features = ["extract", path, "-o", out, "--label", "A", *QUICK], extract.video_features

    def meanwhile(*args):
        found = features(*args)
        make_video(path, frames=100)
        return found

    monkeypatch.setattr(extract, "video_features", meanwhile)
    assert call(*given) == 0
    monkeypatch.undo()
    for done in ("1 extracted, 0 were there", "0 extracted, 1 were there"):
        capsys.readouterr()
        assert call(*given) == 0
        assert capsys.readouterr().out.startswith(done)


def test_features_that_half_precision_cannot_hold_are_refused(folder, tmp_path, capsys):
    given = ["extract", folder, "-o", tmp_path / "out", "--label", "A", *QUICK]
    given[given.index("deadly:Grey")] = "test_extract:Large"
    assert call(*given) == 1
    assert "the visual encoder gave 100000, and float16 ends at 65504: give --float32" in capsys.readouterr().err
    assert call(*given, "--float32") == 0


def test_a_full_disk_is_told_with_what_was_to_be_written(folder, tmp_path, capsys, monkeypatch):
    def full(path, rows):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(extract, "write_features", full)
    assert call("extract", folder / "more" / "b.mp4", "-o", tmp_path / "out", *QUICK) == 1
    told = f"b__0.npy: cannot be written: {os.strerror(errno.ENOSPC)}; make room, and call again\n"
    assert capsys.readouterr().err.endswith(told)


def test_weights_of_another_content_are_others(folder, tmp_path, capsys):
    """Under the same name; and under another name the same are the same."""
    weights, moved = tmp_path / "W.pt", tmp_path / "moved.pt"
    for path, content in ((weights, b"1"), (moved, b"1")):
        path.write_bytes(content)
    given = ["extract", folder, "-o", tmp_path / "out", "--label", "A", *QUICK, "--audio-weights"]
    assert call(*given, weights) == call(*given, moved) == 0
    weights.write_bytes(b"2")
    assert "made with another --audio-weights" in mistake(capsys, *given, weights)


def test_an_interrupt_leaves_a_list_of_what_is_done(folder, tmp_path, capsys):
    make_video(folder / "c.mp4", frames=200, grey=lambda i: 255)
    out = tmp_path / "out"
    same = ["extract", folder, "-o", out, "--every", 1, "--workers", 1, *QUICK]
    same[same.index("deadly:Grey")] = "test_extract:Interrupting"
    assert call(*same) == 128 + signal.SIGINT
    said = capsys.readouterr()
    assert said.out.startswith("1 extracted, 0 were there, 0 failed")
    assert (
        "stopped by SIGINT; what is done stays, and the same call goes on from there\n" in said.err
        and "--resume" not in said.err
    )
    assert json.loads((out / "extract.json").read_text())["done"] == ["a_label_B1-0-0"]
    assert len((out / "list.csv").read_text().splitlines()) == 2
    assert call(*same) == 0
    assert capsys.readouterr().out.startswith("2 extracted, 1 were there, 0 failed")


def test_shards_make_the_whole(folder, tmp_path, capsys):
    out = tmp_path / "out"
    for i in (1, 2):
        assert call("extract", folder, "-o", out, "--shard", f"{i}/2", *QUICK) == 0
        assert (out / f"extract-{i}-of-2.json").is_file()
    assert len((out / "list.csv").read_text().splitlines()) == 3  # a header, and both videos
    assert sorted(p.stem for p in (out / "done").rglob("*.json")) == ["a_label_B1-0-0", "b"]
    assert "--shard 3/2" in mistake(capsys, "extract", folder, "-o", out, "--shard", "3/2", *QUICK)


def test_lists_stay_in_their_folder(folder, tmp_path, capsys):
    listed = folder / "films.csv"
    listed.write_text("path,label\nmore/b.mp4,B2\na_label_B1-0-0.mkv,G\n")
    assert call("extract", listed, "-o", tmp_path / "out", "--label", "A", *QUICK) == 0
    named, row = read_list(tmp_path / "out" / "list.csv", audio=False)
    assert (row.label, named.label) == ("B2", "G") and row.visual.parent.name == "more"
    for way_out in ("../films2/x.mp4", "/etc/passwd", "more/../../x.mp4"):
        listed.write_text(f"path\n{way_out}\n")
        assert "leads out of" in mistake(capsys, "extract", listed, "-o", tmp_path / "out", *QUICK)
    listed.write_text("path\na\0.mp4\n")
    assert "films.csv, line 2: a NUL in a path" in mistake(capsys, "extract", listed, "-o", tmp_path / "out", *QUICK)
    (tmp_path / "films.txt").write_text("x" * 10_000)
    said = mistake(capsys, "extract", tmp_path / "films.txt", "-o", tmp_path / "out", *QUICK)
    assert "films.txt, line 1: a name of 10000 characters" in said
    listed.write_text(f"path\n{'x' * 200_000}\n")
    assert "not a CSV file in UTF-8: field larger" in mistake(capsys, "extract", listed, "-o", tmp_path, *QUICK)
    listed.write_text("path,audio_path,label\na.npy,b.npy,A\nc.npy,d.npy,A\n")
    assert f"error: {listed} lists feature files (.npy), not videos\n" == mistake(
        capsys, "extract", listed, "-o", tmp_path, *QUICK
    )
    (folder / "films.txt").write_text(".\n")
    said = mistake(capsys, "extract", folder / "films.txt", "-o", tmp_path, *QUICK)
    assert "films.txt, line 1: . is the list's own folder" in said


def test_mistakes(folder, tmp_path, capsys):
    out = ["-o", tmp_path / "out"]
    assert "--audio-weights" in mistake(capsys, "extract", folder, *out, *QUICK[:2], "-q")
    (tmp_path / "bare").mkdir()
    assert "no videos there" in mistake(capsys, "extract", tmp_path / "bare", *out, *QUICK)
    assert "--crops 3" in mistake(capsys, "extract", folder, *out, "--crops", 3, *QUICK)
    unknown = ["--visual-encoder", "test_extract:None_", "--audio-encoder", "none"]
    assert "test_extract:None_" in mistake(capsys, "extract", folder, *out, *unknown)
    assert "leave one of the two out" in mistake(capsys, "extract", folder, *out, *unknown, "--audio-weights", "W.pt")
    (folder / "b.mp4").write_bytes(b"x")
    told = mistake(capsys, "extract", folder / "b.mp4", folder / "more" / "b.mp4", *out, *QUICK)
    assert told.endswith("would both be called b: rename one, or give their common folder\n")
    (folder / "b.mkv").touch()
    assert mistake(capsys, "extract", folder, *out, *QUICK).endswith("would both be called b: rename one\n")


@pytest.mark.parametrize("command", ["extract", "detect", "stream"])
def test_snippets_have_one_length(folder, tmp_path, capsys, command):
    """--every and --fps are not both heeded; the default of --every is none that is given."""
    given = [command, folder / "more" / "b.mp4", *QUICK]
    given += [] if command == "stream" else ["-o", tmp_path / "out"]
    given += [] if command == "extract" else ["-m", tmp_path / "none"]
    told = mistake(capsys, *given, "--every", 4, "--fps", 2)
    assert told == "error: --every 4 and --fps 2 both say how long a snippet is: give one of them\n"
    if command == "extract":
        assert call(*given, "--fps", 2) == 0


def test_a_video_that_is_given_twice_is_one(folder):
    """By its folder, and by a list that knows its label."""
    listed = folder / "list.csv"
    listed.write_text("path,label\nmore/b.mp4,B1\n")
    for given in ([folder, listed], [listed, folder]):
        sources, failures = extract.find_sources(given, root=folder)
        assert [s.label for s in sources if s.name == "more/b"] == ["B1"] and not failures
    listed.write_text("path,label\nmore/b.mp4,B1\nmore/b.mp4,B2\n")
    with pytest.raises(DataError, match="given twice, labelled B1 and B2"):
        extract.find_sources([listed])
    listed.write_text("path,label\nfilms/more/b.mp4,B1\n")
    for given in ([folder, folder / "more"], [folder / "more" / "b.mp4", folder], [folder, listed]):
        with pytest.raises(DataError, match="b.mp4 is given twice, and would be called .*b and .*b: leave one out"):
            extract.find_sources(given, root=folder.parent if listed in given else None)
    with pytest.raises(DataError, match="--root .* is for the paths of a list, and none is given: leave it out"):
        extract.find_sources([folder], root=folder.parent)


def test_a_video_is_not_listed_by_two_names(folder, tmp_path, capsys):
    """Given by its folder, and later alone, or the other way round."""
    out, video = tmp_path / "out", folder / "more" / "b.mp4"
    assert call("extract", folder, "-o", out, "--label", "A", *QUICK) == 0
    assert "already, called more/b" in mistake(capsys, "extract", video, "-o", out, "--overwrite", *QUICK)
    told = mistake(capsys, "extract", video, "-o", out, *QUICK)
    assert f"holds {video} already, called more/b: give the folder or list that called it so, or remove" in told
    (out / "done" / "more" / "b.json").unlink()
    assert call("extract", video, "-o", out, "--label", "A", *QUICK) == 0
    assert [row.visual.stem for row in read_list(out / "list.csv", audio=False)] == ["a_label_B1-0-0__0", "b__0"]
    assert "called b: give" in mistake(capsys, "extract", folder, "-o", out, *QUICK)


def test_packed(folder, tmp_path):
    packed = tmp_path / "out.safetensors"
    for flags, dtype in ((), torch.float16), (("--float32", "--overwrite"), torch.float32):
        assert call("extract", folder / "more" / "b.mp4", "-o", packed, "--label", "A", *flags, *QUICK) == 0
        assert call("check", packed, "--no-audio", "-q") == 0
        assert open_packed(packed)[0]["visual"].dtype == dtype


def test_sound_is_not_left_out_of_a_packed_file_unsaid(folder, tmp_path, capsys):
    packed, whole = tmp_path / "out.safetensors", tmp_path / "out" / "list.csv"
    assert call("extract", folder, "-o", packed, "--label", "A", *QUICK) == 1
    said = capsys.readouterr().err
    assert "there is none of more/b. Remove" in said and f"`avadclip-fast pack {whole} -o {packed}`" in said
    assert not packed.exists() and len(read_list(whole, audio=False)) == 2
    assert call("pack", whole, "-o", packed, "--no-audio", "-q") == 0


def test_memory_does_not_grow_with_sound(tmp_path, monkeypatch):
    """A window is read when it is asked for: 10 minutes of sound cost no memory of their own."""
    import tracemalloc

    from avadclip_fast.media import decode

    monkeypatch.setattr(decode, "AT_ONCE", 2**18)
    path = make_video(tmp_path / "long.mkv", frames=4, rate=1, audio=1, tone=(0, 600))
    tracemalloc.start()
    sound = decode.read_sound(path)
    heard = sound.windows(np.arange(600.0), 1.0).heard()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert heard.all() and len(sound.samples) == pytest.approx(600 * 16_000, rel=1e-3)
    assert peak < 8e6  # the sound is 19 MB as int16


def test_memory_does_not_grow_with_the_videos_that_are_done(tmp_path):
    """Of whose records one is read at a time: those of 20,000 hours were gigabytes."""
    import tracemalloc

    settings = {"dtype": "float16", "visual": ["clip", "openai"], "audio": ["none", None], "crops": 1}
    sources = [extract.Source(tmp_path / f"{i}.mp4", str(i)) for i in range(20)]
    (tmp_path / "done").mkdir()
    for source in sources:
        record = {"source": str(source.path), "file": {}, "settings": settings, "crops": 1, "audio": False}
        record |= {"label": "A", "listed": "", "times": np.arange(20_000.0).tolist()}
        (tmp_path / "done" / f"{source.name}.json").write_text(json.dumps(record))
    tracemalloc.start()
    extract.check_replaced(sources, tmp_path, settings)
    with pytest.raises(DataError, match="features of 20 of these videos"):
        extract.check_replaced(sources, tmp_path, {**settings, "crops": 5})
    assert len(extract.write_lists(tmp_path, settings).rows) == 20
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4e6  # a record takes 0.8 MB
    assert json.loads((tmp_path / "done" / "7.json").read_text())["listed"] == "A"


PEAK = """
import resource, subprocess, sys
code = subprocess.call([sys.executable, "-m", "avadclip_fast", *sys.argv[1:]])
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
sys.exit(code)
"""


def test_ten_hours_take_less_than_two_gigabytes(tmp_path):
    """Of sound alone there are 1.15 GB, and libraries take up to 1.

    What a process took is asked of a small one that has no other children.
    """
    film = make_long_video(tmp_path / "long.mkv", 36_000)
    command = [sys.executable, "-c", PEAK, "extract", str(film), "-o", str(tmp_path / "out"), *NAMED, "-q"]
    done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    film.unlink()
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.splitlines()[-1]) / (1024 if sys.platform == "darwin" else 1) < 1.5e6  # kilobytes
    record = json.loads((tmp_path / "out" / "done" / "long.json").read_text())
    assert record["snippets"] == 2250 and all(record["heard"])
