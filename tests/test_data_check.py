import numpy as np
import pytest

from avadclip_fast.data import XD_VIOLENCE, check_list, make_synthetic, read_list, write_list


@pytest.fixture
def made(tmp_path):
    make_synthetic(tmp_path, videos=6, test_videos=4, width=64, min_snippets=16, max_snippets=20)
    return tmp_path


def check(made, name="test.csv", **options):
    return check_list(made / name, XD_VIOLENCE, width=64, **options)


def test_a_good_list(made):
    shown = []
    progress = lambda items: (shown.append(item) or item for item in items)  # noqa: E731
    assert check(made, "train.csv", progress=progress) == [] and len(shown) == 6
    assert check(made, frame_gt=made / "gt.npy") == []


def test_every_problem_is_told_at_once(made):
    rows = read_list(made / "train.csv")
    rows[0].visual.unlink()
    np.save(rows[1].audio, np.ones((99, 64), np.float32))
    features = np.load(rows[2].visual)
    features[7] = np.nan
    np.save(rows[2].visual, features)
    np.save(rows[3].audio, np.ones((3, 32), np.float32))
    listed = (made / "train.csv").read_text().splitlines()
    listed[5] = listed[5].rsplit(",", 1)[0] + ",B7-0-0"
    listed += [listed[6], "x.npy,y.npy,", "x.npy,y.npy,B1,B2"]
    (made / "train.csv").write_text("\n".join(listed))
    problems = check(made, "train.csv")
    expected = [
        ["line 10", "B2 is beyond the 3 columns"],
        ["line 8", "line 7 already"],
        ["line 9", "label empty"],
        ["line 2", rows[0].visual.name, "no such file"],
        ["line 3", rows[1].audio.name, "99"],
        ["line 4", rows[2].visual.name, "row 7"],
        ["line 5", rows[3].audio.name, "width 32, expected 64"],
        ["line 6", "B7"],
    ]
    assert len(problems) == len(expected)
    for problem, words in zip(problems, expected, strict=True):
        assert "\n" not in problem and str(made / "train.csv") in problem
        assert all(word in problem for word in words), problem
    # what the sound is like is seen only where it matters
    assert not any("__a.npy" in problem for problem in check(made, "train.csv", audio=False))


def test_a_list_that_is_none(made):
    (problem,) = check(made, "absent.csv")
    assert "absent.csv: no such list" in problem
    (problem,) = check(made, frame_gt=made / "absent.npy")
    assert "absent.npy" in problem


def test_truth_of_another_snippet_length(made):
    (problem,) = check(made, frame_gt=made / "gt.npy", frames_per_snippet=4)
    assert "--frames-per-snippet 16" in problem and str(made / "gt.npy") in problem


def test_a_normal_label_may_be_filled_up(made):
    text = (made / "test.csv").read_text()
    assert ",A\n" in text
    (made / "filled.csv").write_text(text.replace(",A\n", ",A-0-0\n"))
    assert check(made, "filled.csv", frame_gt=made / "gt.npy") == []


def test_truth_of_other_videos(made):
    truth = np.load(made / "gt.npy")
    np.save(made / "gt.npy", truth[:-1])
    (problem,) = check(made, frame_gt=made / "gt.npy")
    assert str(len(truth)) in problem and str(len(truth) - 1) in problem


def test_truth_of_one_crop_for_a_list_of_ten(made):
    row = read_list(made / "test.csv")[0]
    crops = []
    for crop in range(10):
        path = made / f"x__{crop}.npy"
        path.write_bytes(row.visual.read_bytes())
        crops.append(type(row)(path, row.audio, row.label, crop + 2))
    write_list(made / "crops.csv", crops)
    np.save(made / "gt.npy", np.zeros(16 * len(np.load(row.visual))))
    (problem,) = check(made, "crops.csv", frame_gt=made / "gt.npy")
    assert "one crop" in problem


def test_truth_in_another_order(made):
    rows = read_list(made / "test.csv")
    write_list(made / "other.csv", rows[::-1])
    problems = check(made, "other.csv", frame_gt=made / "gt.npy")
    assert problems and all("order" in problem for problem in problems)


@pytest.mark.parametrize(("label", "positive"), [("A", 3), ("B1", 0)])
def test_a_label_that_the_truth_contradicts(tmp_path, label, positive):
    """Either way round: an anomaly in a normal video, and none in another."""
    np.save(tmp_path / "x.npy", np.ones((2, 64), np.float32))
    np.save(tmp_path / "gt.npy", np.arange(32) < positive)
    (tmp_path / "l.csv").write_text(f"path,label\nx.npy,{label}\n")
    (problem,) = check(tmp_path, "l.csv", audio=False, frame_gt=tmp_path / "gt.npy")
    assert f"line 2: labelled {label}, but {positive} frames are anomalous" in problem


def test_a_row_that_is_refused_does_not_count_against_the_truth(made):
    text = (made / "test.csv").read_text()
    (made / "twice.csv").write_text(text + text.splitlines()[1] + "\n")
    np.save(made / "gt.npy", np.append(np.load(made / "gt.npy"), np.zeros(16)))
    (problem,) = check(made, "twice.csv", frame_gt=made / "gt.npy")
    assert "line 6" in problem and "line 2 already" in problem
