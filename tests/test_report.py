"""Figures in README and docs come from committed JSON."""

import json
import re

import jsonschema
import numpy as np
import pytest
from PIL import Image

from bench import harness, report


@pytest.mark.parametrize("page", report.PAGES, ids=lambda page: page.name)
def test_figures_are_those_of_the_json(page):
    text = page.read_text()
    assert report.rendered(text) == text, "run python -m bench.report"


def test_a_changed_figure_is_noticed():
    text = report.PAGES[0].read_text()
    block = next(report.BLOCK.finditer(text))
    number = re.search(r"\d+\.\d", block[0][len(block[1]) :])
    at = block.start() + len(block[1]) + number.start()
    changed = text[:at] + str((int(text[at]) + 1) % 10) + text[at + 1 :]
    assert changed != text == report.rendered(changed)


def test_a_figure_without_json_fails():
    with pytest.raises(KeyError):
        report.rendered("<!-- figures: dreamt-up -->\n<!-- end -->")


def test_a_figure_older_than_the_kernels_says_so(monkeypatch):
    record = {"setting": {"gpu": None, "cpu": "A", "threads": 2, "torch": "2", "source": harness.source_hash("cpu")}}
    assert report._where(record) == "\n\nA, 2 threads, torch 2.\n"
    monkeypatch.setattr(harness, "source_hash", lambda device: "another")
    assert "Stale" in report._where(record)


def test_a_kernels_source_is_in_its_hash(tmp_path, monkeypatch):
    for file in ("csrc/x_cpu.cpp", "csrc/x.cu", "kernels/x.py", "kernels/configs/x.json"):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text("1")
    monkeypatch.setattr(harness, "ROOT", tmp_path)
    before = {device: harness.source_hash(device) for device in ("cpu", "cuda")}
    (tmp_path / "kernels/configs/x.json").write_text("2")
    assert harness.source_hash("cpu") == before["cpu"] and harness.source_hash("cuda") != before["cuda"]
    (tmp_path / "csrc/x_cpu.cpp").write_text("2")
    assert harness.source_hash("cpu") != before["cpu"]


def test_plots_are_those_of_the_json(tmp_path):
    """To the pixel, where matplotlib is the version that drew what is committed."""
    report.draw(tmp_path)
    drawn = sorted(tmp_path.glob("*.png"))
    assert drawn
    for path in drawn:
        new, committed = Image.open(path), Image.open(report.ROOT / "docs" / path.name)
        if new.info["Software"] != committed.info["Software"]:
            pytest.skip(f"{path.name} was drawn by {committed.info['Software']}")
        assert new.size == committed.size and np.array_equal(new, committed), f"{path.name}: run python -m bench.report"


@pytest.mark.parametrize("path", sorted(report.RESULTS.glob("bench_*.json")), ids=lambda path: path.stem)
def test_results_keep_to_the_schema(path):
    record, schema = json.loads(path.read_text()), json.loads((report.ROOT / "bench/schema.json").read_text())
    jsonschema.validate(record, schema)
    assert record["bench"] == path.stem and any(row["over_ours"] == 1 for row in record["rows"])
    del record["rows"][0]["median_ms"]
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(record, schema)
