"""README and docs say what works: examples run, commands exist, formulas are the benchmarks', names stand for files."""

import functools
import importlib
import inspect
import math
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from small_models import teacher

from avadclip_fast import AVadCLIP, AVadCLIPStudent
from avadclip_fast.data import XD_VIOLENCE, with_motion
from avadclip_fast.engine.export import export_model
from bench import harness, report

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
KERNEL_PAGES = sorted(set((ROOT / "docs/kernels").glob("*.md")) - {ROOT / "docs/kernels/index.md"})
FENCE = re.compile(r"(?P<needs><!-- needs: [^>]+ -->\n)?^```(?P<language>\w*)\n(?P<code>.*?)^```$", re.S | re.M)
INLINE = re.compile(r"(?<!`)`([^`]+)`(?!`)")


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


# Python


def examples(page: Path) -> list[tuple[int, str, bool]]:
    """(line, code, whether it can be run) of every Python block."""
    text, found = page.read_text(), []
    for block in FENCE.finditer(text):
        if block["language"] == "python":
            line = text[: block.start("code")].count("\n") + 1
            found.append((line, block["code"], not block["needs"]))
    return found


def run_examples(blocks: list[tuple[int, str, bool]], page: str) -> None:
    """The blocks of a page one after the other, in one namespace; tracebacks tell the line of the page."""
    namespace: dict = {"__name__": "example"}
    for line, code, runs in blocks:
        compiled = compile("\n" * (line - 1) + code, page, "exec")
        if runs:
            exec(compiled, namespace)  # noqa: S102


@pytest.fixture(scope="module")
def official(tmp_path_factory) -> list[Path]:
    """Files as the authors' are: a teacher and a student."""
    folder = tmp_path_factory.mktemp("official")
    paths = [folder / "teacher.pth", folder / "student.pth"]
    for kind, path in zip((AVadCLIP, AVadCLIPStudent), paths, strict=True):
        kind(list(XD_VIOLENCE.values()), text_weights="random", text_layers=1).to_official(path)
        state = torch.load(path, weights_only=True)
        torch.save(state | {"clipmodel.visual.proj": torch.zeros(2, 2)}, path)
    return paths


@pytest.fixture
def users_folder(official, tmp_path, monkeypatch) -> None:
    """A working folder with official checkpoints in it."""
    monkeypatch.chdir(tmp_path)
    for path in official:
        os.link(path, path.name)  # of hundreds of megabytes, which no example changes


@pytest.mark.parametrize("page", [page for page in PAGES if examples(page)], ids=name_of)
def test_examples_run(page, users_folder):
    if "teacher.onnx" in page.read_text():
        pytest.importorskip("onnxscript", reason="the onnx extra is absent")
        pytest.importorskip("onnxruntime", reason="the onnx extra is absent")
        export_model(teacher(layers=1), "teacher.onnx")
    run_examples(examples(page), name_of(page))


def test_motion_without_the_library_is_the_librarys():
    (code,) = [code for _, code, _ in examples(ROOT / "docs/videos.md") if "def with_motion" in code]
    namespace: dict = {"np": np}
    exec(code, namespace)  # noqa: S102
    for n in (1, 2, 3, 30):
        x = np.random.default_rng(0).standard_normal((n, 4)).astype(np.float32)
        found = namespace["with_motion"](x)
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, with_motion(x), rtol=1e-6)


def test_an_example_that_fails_is_noticed():
    with pytest.raises(NameError):
        run_examples([(1, "missing\n", True)], "page")
    with pytest.raises(SyntaxError):
        run_examples([(1, "for\n", False)], "page")
    run_examples([(1, "missing\n", False)], "page")


def test_few_examples_are_left_out():
    left_out = [name_of(page) for page in PAGES for *_, runs in examples(page) if not runs]
    # those of videos run in test_detect and test_online, by stand-ins for what they need
    assert sorted(left_out) == ["docs/training.md", "docs/videos.md", "docs/videos.md"]


# Commands


@functools.cache
def commands():
    """The program's commands, as the program itself has them."""
    from typer.main import get_command

    from avadclip_fast.cli import export, kernels, media, profile  # noqa: F401  add their commands
    from avadclip_fast.cli.commands import app

    return get_command(app)


def command_lines(page: Path) -> Iterator[tuple[str, bool]]:
    """(line, whether it is whole) of every `avadclip-fast ...` of a page: lines of its blocks, with continuations and
    variables, which are to be copied and must be whole; and inline code, which may leave things out."""
    text = page.read_text()
    for block in FENCE.finditer(text):
        variables = {}
        for line in block["code"].replace("\\\n", " ").splitlines():
            if assigned := re.match(r'(\w+)="(.*)"$', line):
                variables[assigned[1]] = assigned[2]
            if line.startswith(("nsys ", "ncu ")):
                line = "".join(line.partition("avadclip-fast")[1:])  # what is profiled
            if line.startswith("avadclip-fast"):
                yield re.sub(r"\$(\w+)", lambda name, known=variables: known[name[1]], line), True
    for inline in INLINE.finditer(FENCE.sub("", text)):
        if inline[1].startswith("avadclip-fast "):
            yield " ".join(inline[1].split()), False


def check_command(line: str, whole: bool) -> None:
    """Parses a command line as the program would, and runs nothing."""
    _, name, *given = shlex.split(line, comments=True)
    group = commands()
    if name not in group.commands:
        raise AssertionError(f"{line}: no such command")
    command = group.commands[name]
    try:
        command.make_context(name, list(given), resilient_parsing=not whole)
        if not whole:  # what is resilient forgives unknown options
            known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
            unknown = [word for word in given if word.startswith("-") and word not in known]
            assert not unknown, f"{line}: no option {unknown[0]}"
    except Exception as error:
        raise AssertionError(f"{line}: {getattr(error, 'message', error)}") from error


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_exist(page):
    for line, whole in command_lines(page):
        check_command(line, whole)


@pytest.mark.parametrize(
    ("line", "whole"),
    [
        ("avadclip-fast trains x.csv", False),
        ("avadclip-fast train x.csv -o y --epoch-count 3", True),
        ("avadclip-fast train x.csv -o y --epochs three", True),
        ("avadclip-fast train x.csv", True),
        ("avadclip-fast distill x.csv -o y", True),
        ("avadclip-fast train ... --epoch-count 3", False),
    ],
)
def test_a_wrong_command_is_noticed(line, whole):
    with pytest.raises(AssertionError):
        check_command(line, whole)
    check_command("avadclip-fast train x.csv -o y --epochs 3", whole)


def test_commands_are_found():
    found = [line for page in PAGES for line, _ in command_lines(page)]
    assert len(found) > 30
    assert {shlex.split(line)[1] for line in found} >= {
        "train",
        "distill",
        "eval",
        "check",
        "pack",
        "convert",
        "extract",
    }


# Options and make targets that are named in passing

OPTION = re.compile(r"(--[a-z][a-z0-9-]+)")


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "contributing.md"], ids=name_of)
def test_options_exist(page):
    known = {
        o for command in commands().commands.values() for p in command.params for o in (*p.opts, *p.secondary_opts)
    }
    known |= {"--plots", "--ablate", "--told", "--check", "--no-build-isolation"}  # of bench.fightsurv and report, pip
    for inline in INLINE.finditer(FENCE.sub("", page.read_text())):
        for option in OPTION.findall(inline[1]):
            assert option in known, f"{name_of(page)}: {inline[0]}"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_make_targets_and_files_exist(page):
    text, makefile = page.read_text(), (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make ([\w-]+)|`make ([\w-]+)", text, re.M):
        name = "".join(target)
        assert re.search(rf"^{name}:", makefile, re.M), f"{name_of(page)}: make {name}"
    for path in re.findall(r"`((?:avadclip_fast|kernels|csrc|bench|tests)/[\w/.*-]+)`", text):
        assert any(ROOT.glob(path)) or path == "bench/results/gpu/", f"{name_of(page)}: {path}"


# Figures and formulas


def test_figures_stand_where_they_are_written():
    """A block of figures outside the pages that `bench.report` writes would never change."""
    for page in set(PAGES) - set(report.PAGES):
        assert not report.BLOCK.search(page.read_text()), name_of(page)


ROW = re.compile(r"^\| (forward|and backward) \| `([^`]+)` \| (?:`([^`]+)`|none) \|$", re.M)
LENGTHS = {"pack_rows": 1, "topk_mean": 1, "similarity_graph": 2, "mil_loss": 3}  # which input they are
MEANINGS = {"B": "BATCH", "T": "ROWS", "D": "DIM", "C": "CLASSES", "E": "WIDTH"}


def formulas(page: Path) -> dict[str, tuple[str, str]]:
    return {way: (size, flops or "0") for way, size, flops in ROW.findall(page.read_text())}


def value(formula: str, symbols: dict[str, float]) -> float:
    python = formula.replace("·", "*").replace("²", "**2").replace("Σn**2", "pairs")
    assert re.fullmatch(r"[\w+*() ]+", python), formula
    return eval(python, {"__builtins__": {}}, symbols)  # noqa: S307  checked in the line above


def symbols_of(op: str, module, case: harness.Bench, dtype: torch.dtype) -> dict[str, float]:
    """What the letters of a page stand for in one case of its bench."""
    found: dict[str, float] = {s: getattr(module, n) for s, n in MEANINGS.items() if hasattr(module, n)}
    inputs = case.make()
    found["s"] = dtype.itemsize
    if op in ("gated_fusion", "linear_act", "topk_mean", "distance_graph"):
        found |= dict(zip("BTD", inputs[0].shape, strict=True))
    if op == "linear_act":
        taps = inputs[1].shape[2:] or (1,)
        found |= {"I": inputs[1].shape[1], "O": inputs[1].shape[0], "K": taps[0], "r": len(inputs) - 3}
    if op == "topk_mean":
        found["C"] = inputs[0].shape[2]
    if op == "add_act":
        found["k"] = 1 if case.case.startswith("relu") else 2
    if op == "distance_graph":
        found["E"] = inputs[0].shape[2]
    if op == "window_attention":
        found["w"] = int(re.search(r"windows of (\d+)", case.case)[1])
    if op == "prefix_attention":
        count, classes, first = len(inputs[0]), int(re.match(r"\d+", case.case)[0]), module.PREFIX
        rows = (count - first) // classes
        found |= {"N": count, "e": first * (first + 1) / 2 + classes * rows * (first + (rows + 1) / 2)}
    if op == "similarity_graph":
        found["pairs"] = int((inputs[2] ** 2).sum())
    if op == "uniform_pool":
        found |= {"N": len(inputs[0]), "B": 1, "R": module.ROWS}
    if op in LENGTHS:
        found["N"] = int(inputs[LENGTHS[op]].sum())
    return found


@pytest.mark.parametrize("page", KERNEL_PAGES, ids=lambda page: page.stem)
def test_formulas_are_those_of_the_benchmarks(page, monkeypatch):
    op, dtype = page.stem, torch.bfloat16
    monkeypatch.setattr(harness, "served", lambda *_: {})  # formulas are wanted, not times
    module = importlib.import_module(f"bench.bench_{op}")
    told, checked = formulas(page), 0
    for case in module.cases(dtype):
        if op == "linear_act" and not re.match(r"projection|graph convolution|uncertainty", case.case):
            continue  # with a norm or a dot other things are read and written
        symbols = symbols_of(op, module, case, dtype)
        for way, work in (("forward", case.forward), ("and backward", case.both)):
            assert (way in told) == (work is not None), f"{op}: {way}"
            if work is not None:
                size, flops = (value(formula, symbols) for formula in told[way])
                assert math.isclose(size, work.bytes), f"{case.case}, {way}: bytes"
                if told[way][1] != "0":
                    assert math.isclose(flops, work.flops), f"{case.case}, {way}: FLOPs"
                checked += 1
    assert checked


def test_a_wrong_formula_is_noticed():
    assert value("(3·N + B·T)·D·s", {"N": 1, "B": 2, "T": 3, "D": 4, "s": 2}) == 72
    assert value("Σn²·(4·D + 5·D²)", {"pairs": 2, "D": 3}) == 2 * (12 + 45)
    with pytest.raises(AssertionError):
        value("__import__('os')", {})


@pytest.mark.parametrize("page", KERNEL_PAGES, ids=lambda page: page.stem)
def test_backends_are_those_of_the_table(page):
    from avadclip_fast.ops import _dispatch

    told = re.search(r"^Backends: (.+)$", page.read_text(), re.M)[1].split(", ")
    assert told == [backend for backend in _dispatch.ORDER if backend in _dispatch.TABLE[page.stem]]


def test_every_op_has_a_page():
    from avadclip_fast.ops import _dispatch

    together = {"mil_align_loss": "mil_loss", "unpack_rows": "pack_rows"}
    assert {together.get(op, op) for op in _dispatch.TABLE} == {page.stem for page in KERNEL_PAGES}
    tables = [(ROOT / page).read_text() for page in ("README.md", "docs/kernels/index.md")]
    for op in _dispatch.TABLE:
        page = together.get(op, op)
        assert all(re.search(rf"^\| [\[`].*\b{op}\b.*\|", table, re.M) for table in tables), f"a row for {op}"
        assert f"\n::: avadclip_fast.ops.{page}.{op}\n" in (ROOT / f"docs/kernels/{page}.md").read_text()


def test_pages_are_in_the_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text()
    for page in sorted((ROOT / "docs").rglob("*.md")):
        assert str(page.relative_to(ROOT / "docs")) in navigation


def test_the_site_is_searched_without_server_or_network(tmp_path):
    pytest.importorskip("mkdocs", reason="the docs extra is absent")
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    subprocess.run(build, cwd=ROOT, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, check=True)
    assert (tmp_path / "search/search_index.js").is_file()  # no page that is a file may fetch the .json
    for page in ("index.html", "kernels/topk_mean.html"):
        html = (tmp_path / page).read_text()
        loaded = re.findall(r'<script[^>]* src="([^"]+)"|<link[^>]* rel="stylesheet" href="([^"]+)"', html)
        assert len(loaded) >= 4 and all((tmp_path / page).parent.joinpath(*both).is_file() for both in loaded)


def shown(page: Path) -> str:
    """The text of a page with the docstrings that it shows, without their code."""
    text = page.read_text()
    for module, name in re.findall(r"^::: ([\w.]+)\.(\w+)$", text, re.M):
        thing = getattr(importlib.import_module(module), name)
        for part in (thing, getattr(thing, "forward", None)):
            text += "\n" + re.sub(r"^    .*", "", inspect.getdoc(part) or "", flags=re.M)
    return INLINE.sub("", FENCE.sub("", text))


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_no_product_is_taken_for_html(page):
    """<x, y> outside of code is a tag to Markdown, and not shown."""
    tags = re.findall(r"<(?!https?:)[A-Za-z][^<\n]*", shown(page))
    assert not tags, f"{name_of(page)}: {tags}"


def test_lines_are_short():
    wide = ("README.md", "performance.md", "training-that-hears.md")  # their tables
    for page in PAGES:
        for number, line in enumerate(page.read_text().splitlines(), 1):
            assert len(line) <= 120 or (page.name in wide and line.startswith("|")), f"{name_of(page)}:{number}"


# Workflows

WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))


def steps(workflow: Path) -> list[dict]:
    yaml = pytest.importorskip("yaml")
    return [step for job in yaml.safe_load(workflow.read_text())["jobs"].values() for step in job["steps"]]


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.name)
def test_workflows_are_what_developers_type(workflow):
    """Their steps are make targets that exist; actions are held to a major version."""
    makefile = (ROOT / "Makefile").read_text()
    for step in steps(workflow):
        if "uses" in step:
            assert re.fullmatch(r"[\w-]+/[\w-]+@v\d+", step["uses"]), step["uses"]
        for target in re.findall(r"^make ([\w-]+)", step.get("run", ""), re.M):
            assert f"\n{target}:" in makefile, f"{workflow.name}: make {target}"
