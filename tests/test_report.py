"""Figures in README and docs come from committed JSON."""

import json
import re

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


@pytest.mark.parametrize("name", ["bench_topk_mean", "gpu/bench_topk_mean"])
def test_a_record_that_is_no_json_is_named(tmp_path, monkeypatch, name):
    for module in (harness, report):
        monkeypatch.setattr(module, "RESULTS", tmp_path)
    path = tmp_path / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text('{"bench": ')
    with pytest.raises(SystemExit, match=f"^{re.escape(str(path))}: cannot be read: Expecting value.*from git$"):
        report.gpu() if name.startswith("gpu") else report.operations()


def test_a_figure_older_than_the_kernels_says_so(monkeypatch):
    def record(op: str, cpu: str, gpu: str | None = None) -> dict:
        setting = {"gpu": gpu, "cpu": cpu, "threads": 2, "torch": "2"}
        return {"bench": op, "setting": setting | {"source": harness.source_hash("cuda" if gpu else "cpu", op)}}

    one, two = record("topk_mean", "A"), record("mil_loss", "A")
    assert report._where(one, two) == "\n\nA, 2 threads, torch 2.\n"
    told = report._where(one, two, record("linear_act", "B")).split("\n\n")
    assert report._where(record("topk_mean", "A", "H100")) == "\n\nH100, torch 2.\n"
    assert told[1:] == ["`topk_mean`, `mil_loss`: A, 2 threads, torch 2.", "`linear_act`: B, 2 threads, torch 2.\n"]
    monkeypatch.setattr(harness, "source_hash", lambda device, bench: "another")
    assert "Stale" in report._where(one)
    assert "\n\n`linear_act` (AMX): Intel" in report.operations()  # which of its two records is stale


def test_what_was_cut_short_says_so(monkeypatch):
    whole = report.read
    monkeypatch.setattr(report, "read", lambda name: whole(name) | {"cut": True})
    for name in ("operations", "steps", "inference"):
        assert "**Cut short**" in report.FIGURES[name]()


def test_a_gpus_tables(tmp_path, monkeypatch):
    """torch.compile, measured in a run of its own, stands beside the alternatives of the same case."""

    def save(folder: str, bench: str, *rows: tuple) -> None:
        names = "case", "alternative", "median_ms", "over_ours", "of_floor", "kernels", "waits", "memory_bytes"
        setting = {"gpu": "H100", "torch": "2", "source": harness.source_hash("cuda", bench)}
        (tmp_path / "gpu" / folder).mkdir(parents=True, exist_ok=True)
        record = {"bench": bench, "setting": setting, "rows": [dict(zip(names, row, strict=False)) for row in rows]}
        (tmp_path / "gpu" / folder / f"{bench}.json").write_text(json.dumps(record))

    assert ("no GPU has timed them yet" in report.PAGES[0].read_text()) == (not report.gpu_records("gpu"))
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    assert report.gpu() == "No GPU has timed them yet.\n"
    save(".", "bench_topk_mean", ("f", "reference", 0.2, 4.0), ("f", "cuda", 0.05, 1.0, 0.75))
    save("compiled", "bench_topk_mean", ("f", "torch.compile", 0.1, 2.0), ("f", "reference", 0.3, 6.0),
         ("f", "cuda", 0.05, 1.0, 0.7))  # fmt: skip
    save(".", "bench_step", ("teacher", "ours", 9.0, 1.0, 0.5, 120, 0, 2.5e9))
    told = report.gpu()
    assert "| `topk_mean` | f | 0.050 | 75% | reference 4.0; torch.compile 2.0 |" in told
    assert "| teacher | ours | 9.00 | 120 | 0 | 2.5 |" in told and "H100, torch 2.\n" in told
    assert told.index("`step`") < told.index("`topk_mean`")

    # torch.compile's time was up: of its run alone are cases missing.
    path = tmp_path / "gpu/compiled/bench_topk_mean.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"cut": True}))
    told = report.gpu()
    assert "\n`step`, `topk_mean`: H100, torch 2.\n" in told
    assert "\n`topk_mean` (torch.compile): H100, torch 2. **Cut short**" in told


def test_a_kernels_source_is_in_its_hash(tmp_path, monkeypatch):
    """In that of its own bench on its own device, and of a whole step's."""
    sources = "csrc/x_cpu.cpp", "csrc/x.cu", "kernels/x.py", "kernels/configs/x.json"
    for file in (*sources, "avadclip_fast/reference/x.py", "avadclip_fast/reference/y.py"):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text("1")
    monkeypatch.setattr(harness, "ROOT", tmp_path)

    def hashes() -> dict:
        return {
            (device, op): harness.source_hash(device, op) for device in ("cpu", "cuda") for op in ("x", "y", "step")
        }

    def changed(file: str, text: str) -> set:
        before = hashes()
        (tmp_path / file).write_text(text)
        return {key for key, value in hashes().items() if value != before[key]}

    assert changed("kernels/configs/x.json", "2") == {("cuda", "x"), ("cuda", "y"), ("cuda", "step")}
    assert changed("csrc/x_cpu.cpp", "2") == {("cpu", "x"), ("cpu", "step")}
    assert changed("avadclip_fast/reference/y.py", "2") == {(d, op) for d in ("cpu", "cuda") for op in ("y", "step")}
    emulated = "2\n#ifdef AVADCLIP_EMULATED_TILES\n3\n#else\n#endif\n"
    assert changed("csrc/x_cpu.cpp", emulated) and not changed("csrc/x_cpu.cpp", emulated.replace("3", "4"))

    # What those files include or import, through others too, is in theirs.
    (tmp_path / "csrc/inner.cuh").write_text("1")
    (tmp_path / "csrc/outer.cuh").write_text('#include "inner.cuh"\n')
    assert changed("csrc/x_cpu.cpp", '#include <vector>\n#include "outer.cuh"\n') == {("cpu", "x"), ("cpu", "step")}
    assert {key for key in changed("csrc/inner.cuh", "2") if key[0] == "cpu"} == {("cpu", "x"), ("cpu", "step")}
    assert changed("avadclip_fast/reference/y.py", "from .x import x\n")
    assert {op for _, op in changed("avadclip_fast/reference/x.py", "2")} == {"x", "y", "step"}


def test_a_check_rewrites_nothing_and_fails_until_all_is_rewritten(tmp_path, monkeypatch, capsys):
    page, old = tmp_path / "page.md", "<!-- figures: x -->\nold\n<!-- end -->\n"
    page.write_text(old)
    for name, value in {"ROOT": tmp_path, "PAGES": (page,), "FIGURES": {"x": lambda: "new\n"}}.items():
        monkeypatch.setattr(report, name, value)
    monkeypatch.setattr(report, "draw", lambda folder: None)
    monkeypatch.setattr("sys.argv", ["report", "--check"])
    with pytest.raises(SystemExit, match="^page.md: figures differ"):
        report.main()
    assert page.read_text() == old
    monkeypatch.setattr("sys.argv", ["report"])
    report.main()
    assert page.read_text() == old.replace("old", "new")
    monkeypatch.setattr("sys.argv", ["report", "--check"])
    report.main()
    assert capsys.readouterr().out == "rewritten: page.md\nevery figure is what the JSON says\n"


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
    jsonschema = pytest.importorskip("jsonschema")
    record, schema = json.loads(path.read_text()), json.loads((report.ROOT / "bench/schema.json").read_text())
    jsonschema.validate(record, schema)
    assert record["bench"] == path.stem.removesuffix("_amx") and any(row["over_ours"] == 1 for row in record["rows"])
    del record["rows"][0]["median_ms"]
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(record, schema)
