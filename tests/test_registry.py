"""One stem per op, everywhere; and every public name says what it takes."""

import ast
import json
import re
from pathlib import Path

import pytest
import torch
from cases import CASES, LARGE, ROWS
from op_tests import DEVICES

import avadclip_fast
from avadclip_fast import BackendError, ops
from avadclip_fast.ops import _dispatch

ROOT = Path(__file__).resolve().parents[1]
# Two ops in one file, each the other's companion.
STEMS = {"mil_align_loss": "mil_loss", "unpack_rows": "pack_rows"}
# One file of kernels for all that moves rows between packed and padded, and one for all that is matrix products.
NATIVE = STEMS | {"pack_rows": "uniform_pool", "unpack_rows": "uniform_pool", "gated_fusion": "linear_act"}
# Steps of data handling, and steps inside other modules: no module is made of them.
NO_MODULE = {"uniform_pool", "pack_rows", "add_act", "prefix_attention"}

every_op = pytest.mark.parametrize("op", _dispatch.TABLE)


@every_op
def test_an_op_has_all_its_files(op):
    stem = STEMS.get(op, op)
    files = [f"avadclip_fast/{folder}/{stem}.py" for folder in ("reference", "ops", "modules")]
    if stem in NO_MODULE:
        files.pop()
    files += [f"tests/test_{stem}.py", f"bench/bench_{stem}.py"]
    files += [f"kernels/{stem}.py"] if "triton" in _dispatch.TABLE[op] else []
    files += [f"csrc/{NATIVE.get(op, op)}_cpu.cpp"] if {"cpp", "amx"} & set(_dispatch.TABLE[op]) else []
    files += [f"csrc/{NATIVE.get(op, op)}.cu"] if "cuda" in _dispatch.TABLE[op] else []
    assert [file for file in files if not (ROOT / file).exists()] == []
    if {"cpp", "amx"} & set(_dispatch.TABLE[op]):
        sanitized = re.search(r"^CPP_TESTS := (.*)$", (ROOT / "Makefile").read_text(), re.M)[1].split()
        assert {stem, NATIVE.get(op, op)} & {*sanitized}


@every_op
def test_an_ops_kernels_are_compiled_ahead(op):
    """bench/aot_report.json knows the registers of each."""
    report = json.loads((ROOT / "bench/aot_report.json").read_text())
    if "triton" in _dispatch.TABLE[op]:
        source = (ROOT / f"kernels/{STEMS.get(op, op)}.py").read_text()
        kernels = re.findall(r"@(?:triton\.)?jit(?:\(.*\))?\ndef (\w+_kernel)\(", source)
        assert kernels and [k for k in kernels if k not in json.dumps(report["triton"])] == []
    if "cuda" in _dispatch.TABLE[op]:
        assert f"{NATIVE.get(op, op)}_kernel" in json.dumps(report["cuda"])


@every_op
def test_an_op_has_cases_and_is_tested(op):
    assert CASES[op] and LARGE[op] and ROWS[op]
    source = (ROOT / "tests" / f"test_{STEMS.get(op, op)}.py").read_text()
    assert "(OpTests)" in source and f'op = "{op}"' in source


@every_op
def test_an_op_is_public_and_has_a_reference(op):
    assert op in ops.__all__
    assert "reference" in _dispatch.TABLE[op]
    assert set(_dispatch.TABLE[op]) <= set(DEVICES)


@pytest.mark.parametrize(("op", "backend"), [(op, name) for op, row in _dispatch.TABLE.items() for name in row])
def test_a_backend_that_is_there_serves(op, backend):
    """A `supports` that always finds a reason would let every test of that backend be skipped."""
    device = DEVICES[backend][0] if torch.cuda.is_available() else DEVICES[backend][-1]
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    arguments = CASES[op][1].make(torch.float32, device, 0)
    try:
        getattr(ops, op)(**arguments, backend=backend)
    except BackendError as error:
        assert re.search("is not built|is not installed|this one has none", str(error))
        pytest.skip(str(error))


def test_no_operator_is_taken_for_a_constant():
    """Torch takes what has no derivative for one: each has its own, or refuses, and so has each backward pass."""
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    operators = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("avadclip_fast::")]
    public = [name for name in operators if has(name, "Meta")]
    assert len(public) > 40 and [name for name in public if not has(name, "Autograd")] == ["avadclip_fast::keep"]


def test_the_file_names_are_ops():
    """No file in ops/ or reference/ that the table does not know."""
    stems = {STEMS.get(op, op) for op in _dispatch.TABLE}
    for folder in ("ops", "reference"):
        found = {p.stem for p in (ROOT / "avadclip_fast" / folder).glob("[!_]*.py")}
        assert found == stems, folder


# What each folder may import of the others; tuning is the one business of the engine with kernels.
IMPORTS = {
    "cli": {"engine", "media", "models", "data", "ops", "device"},
    "engine": {"media", "models", "data", "ops", "device", "profiling", "kernels", "_build"},
    "media": {"models", "data", "device"},
    "models": {"modules", "data", "ops", "streams"},
    "modules": {"ops", "streams"},
    "data": {"ops"},
    "ops": {"reference", "kernels", "_build", "profiling"},
    "reference": set(),
}


@pytest.mark.parametrize("folder", IMPORTS)
def test_imports_go_one_way(folder):
    found = set()
    for path in (ROOT / "avadclip_fast" / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level == 2:
                found |= {node.module.split(".")[0]} if node.module else {name.name for name in node.names}
            elif isinstance(node, ast.ImportFrom | ast.Import):
                names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [name.name for name in node.names]
                assert not any(name.startswith("avadclip_fast") for name in names), f"{path}: relative imports only"
    assert found - {"__version__"} <= IMPORTS[folder]


PUBLIC = [getattr(avadclip_fast, name) for name in avadclip_fast.__all__]
OPS = [getattr(ops, name) for name in ops.__all__ if name in _dispatch.TABLE]


@pytest.mark.parametrize("thing", [*PUBLIC, *OPS], ids=lambda thing: thing.__name__)
def test_a_public_name_says_what_it_takes(thing):
    doc = thing.__doc__
    assert doc and re.match(r"[A-Z0-9].*[.:]", doc.strip()), "begins with a sentence"
    if thing.__name__ not in ("BackendError", "use_backend"):
        assert re.search(r"\((B|N|C)[,)]", doc), "gives shapes, as (B, T, D)"
        assert re.search("Raises|errors", doc), "says what it raises"


@pytest.mark.parametrize("function", OPS, ids=lambda f: f.__name__)
def test_an_ops_doc_names_every_argument(function):
    names = set(function.__code__.co_varnames[: function.__code__.co_argcount]) - {"backend"}
    assert [name for name in names if not re.search(rf"\b{name}\b", function.__doc__)] == []
    for word in ("Returns", "eterministic", "Backends:"):
        assert word in function.__doc__


def test_the_types_of_every_public_name_are_checked():
    """mypy reads tests/typed_user.py, which uses them."""
    _, used = (ROOT / "tests/typed_user.py").read_text().split("\ndef ", 1)  # behind its imports
    assert [thing.__name__ for thing in [*PUBLIC, *OPS] if not re.search(rf"\b{thing.__name__}\b", used)] == []
