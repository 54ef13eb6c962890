"""The compiled extension: device code run on the CPU, what nvcc made of it, loading, and corners of its operators."""

import importlib.util
import json
import re
import shutil
import subprocess
import sysconfig
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from cases import CASES, LARGE
from hypothesis import given, settings
from hypothesis import strategies as st

from avadclip_fast import _build, ops
from avadclip_fast.ops import _dispatch, _triton
from bench import aot_cuda

ROOT = Path(__file__).parents[1]
# -O0: four times as fast to compile as -O1, and nothing is optimised away that a sanitizer could see
SANITIZED = ["-O0", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
compiled = pytest.mark.skipif(_build.CPP_MISSING is not None, reason=str(_build.CPP_MISSING))


def constant(name: str, file: str) -> int:
    """The first factor of a constant in the sources."""
    return int(re.search(rf"\b{name} = (\d+)", (ROOT / "csrc" / file).read_text())[1])


def shared_bytes() -> int:
    return constant("SHARED_BYTES", "stable_cuda.h") << 10


@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
@pytest.mark.parametrize("flags", [["-O2"], SANITIZED], ids=["plain", "sanitized"])
def test_device_code_on_the_host(flags, tmp_path):
    program = str(tmp_path / "csrc_host")
    command = ["c++", "-std=c++20", *flags, "-Wall", "-Wno-unknown-pragmas", "-Icsrc", "tests/csrc_host.cpp"]
    subprocess.run([*command, "-o", program], cwd=ROOT, check=True)
    done = subprocess.run([program], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


class TestAheadOfTime:
    report = json.loads(aot_cuda.REPORT.read_text())["cuda"]

    def test_is_of_these_sources(self):
        assert self.report["sources"] == aot_cuda.source_hash(), "run `python -m bench.aot_cuda`"

    def test_covers_every_kernel_and_architecture(self):
        sources = "".join(path.read_text() for path in ROOT.glob("csrc/*.cu"))
        named = {name.split("<")[0] for name in self.report["kernels"]}
        written = {part.split("(")[0] for part in sources.replace("\n", " ").split() if "_kernel(" in part}
        assert written and written == named
        assert all(set(archs) == {f"sm_{a}" for a in aot_cuda.ARCHS} for archs in self.report["kernels"].values())

    def test_cases_are_on_both_sides_of_what_a_block_holds(self):
        """Else kernels would be compiled and never run: tiles that are joined, keys that are made anew at each look."""
        tile = constant("SEGMENT", "distance_graph.cuh") * constant("SEGMENTS", "distance_graph.cuh")
        keys = shared_bytes() // 4
        limits = {
            ("distance_graph", "values"): (tile, lambda x: x.shape[1]),
            ("topk_mean", "scores"): (keys, lambda x: x.shape[1]),
            ("mil_loss", "logits"): (keys, lambda x: x.shape[1]),
            ("mil_align_loss", "logits"): (keys, lambda x: x[0].numel()),
        }
        for (op, name), (limit, size) in limits.items():
            sizes = [size(case.make(torch.float32, "cpu", 0)[name]) for case in CASES[op] + LARGE[op]]
            assert {held <= limit for held in sizes} == {False, True}, op

    def test_cases_are_moved_in_vectors_and_in_elements(self):
        """Odd widths, and rows that start between two vectors of 16 bytes."""
        for op, name in (("distance_graph", "values"), ("uniform_pool", "features"), ("pack_rows", "padded")):
            given = [case.make(torch.float16, "cpu", 0)[name] for case in CASES[op]]
            even = [x for x in given if x.shape[-1] % 8 == 0]
            assert 0 < len(even) < len(given), op
            assert {x.data_ptr() % 16 == 0 for x in even if x.is_contiguous()} == {False, True}, op

    def test_no_stack_and_no_spills(self):
        assert aot_cuda.worse({}, self.report["kernels"]) == []

    @pytest.mark.skipif(_build.CUDA_MISSING is not None, reason=str(_build.CUDA_MISSING))
    def test_memory_is_touched_16_bytes_at_a_time(self):
        """Where the layout allows, read from the machine code of the installed extension."""
        cuobjdump = pytest.importorskip("triton").knobs.nvidia.cuobjdump.path
        library = Path(_build.__file__).with_name("_C_cuda.so")
        sass = subprocess.run([cuobjdump, "-sass", library], capture_output=True, text=True, check=True).stdout
        functions = [(body.split("\n")[0], body) for body in sass.split("Function : ")[1:]]
        read_and_write = "scale_kernelILi4E", "mil_loss_kernel", "mil_align_loss_kernel", "pack_kernelI5uint4"
        vectors = (
            r"distance_graph_kernelI\w+Li[48]E",
            r"uniform_pool_kernelI\w+Li[48]E",
            r"pool_backward_kernelI\w+Li[48]E",
        )
        expected = {name: ("LDG", "STG") for name in (*read_and_write, *vectors)}
        for pattern, instructions in {
            **expected,
            "topk_mean_kernel": ("LDG",),
            r"totals_kernelI\w+Li[48]E": ("LDG",),
        }.items():
            matched = [(name, body) for name, body in functions if re.search(pattern, name)]
            assert matched
            for name, body in matched:
                assert all(re.search(rf"\b{one}\.[\w.]*128", body) for one in instructions), name


class TestWhatIsBuilt:
    """setup.py's choice, from a torch and toolkits that are folders with little in them."""

    @pytest.fixture
    def build(self, tmp_path, monkeypatch):
        spec = importlib.util.spec_from_file_location("avadclip_fast_setup", ROOT / "setup.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        torch = SimpleNamespace(origin=tmp_path / "torch/__init__.py")
        monkeypatch.setattr(module, "find_spec", lambda name: torch)
        monkeypatch.setattr(module, "version_of", self.said(module.version_of))
        monkeypatch.setenv("CXX", "sh -c")  # there, and never run
        monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
        self.folder = tmp_path
        self.torch("13.0")
        return module

    def said(self, version_of):
        return lambda command, pattern: version_of(command, pattern) if "nvcc" in command[0] else "a compiler"

    def torch(self, cuda: str | None, version: str = "2.11.0") -> None:
        for name in ("lib", "include/torch/csrc/stable"):
            (self.folder / "torch" / name).mkdir(parents=True, exist_ok=True)
        (self.folder / "torch/lib/libtorch_cuda.so").touch()
        text = f"__version__ = {version!r}\ncuda: Optional[str] = {cuda!r}\nhip: Optional[str] = None\n"
        (self.folder / "torch/version.py").write_text(text)

    def toolkit(self, release: str, runtime: bool = True) -> Path:
        root = self.folder / f"site-{release}/nvidia/cu13"
        for name in ("nvvm", "bin", "lib"):
            (root / name).mkdir(parents=True)
        (root / "bin/nvcc").write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {release}, V{release}.99'\n")
        (root / "bin/nvcc").chmod(0o755)
        if runtime:
            (root / "lib/libcudart.so.9").touch()
        return root

    def cuda_part(self, build) -> list[str] | None:
        """The compiler's command of _C_cuda, if it is built."""
        return {ext.name: ext.compile for ext in build.extensions()}.get("avadclip_fast._C_cuda")

    @pytest.mark.parametrize("first, second", [("12.6", "13.1"), ("13.1", "12.6")])
    def test_a_toolkit_of_torchs_cuda_goes_first(self, build, monkeypatch, first, second):
        """One is on the path, one is NVIDIA's packages; there may be a third, of either version, in /usr/local."""
        monkeypatch.delenv("CUDA_HOME", raising=False)
        monkeypatch.setenv("PATH", f"{self.toolkit(first)}/bin:/usr/bin:/bin")
        monkeypatch.syspath_prepend(str(self.toolkit(second).parents[1]))
        assert build.release(build.find_cuda())[0] == 13

    def test_a_toolkit_of_another_cuda_is_left_out(self, build, monkeypatch, capsys):
        monkeypatch.setenv("CUDA_HOME", str(self.toolkit("12.8")))
        assert self.cuda_part(build) is None
        assert "CUDA operators are left out: torch is built with CUDA 13.0, and /" in (said := capsys.readouterr().err)
        assert "site-12.8/nvidia/cu13 is 12.8" in said

    def test_an_old_nvcc_is_not_asked_for_blackwell(self, build, monkeypatch):
        self.torch("12.9")
        for release, known in (("12.6", False), ("12.8", True)):
            monkeypatch.setenv("CUDA_HOME", str(self.toolkit(release)))
            flags = " ".join(self.cuda_part(build))
            assert "sm_90" in flags and ("sm_100" in flags) == known
            newest = "100" if known else "90"
            assert f"arch=compute_{newest},code=compute_{newest}" in flags  # for what comes after

    @pytest.mark.parametrize(
        "cuda, runtime, words", [("13.0", False, "no libcudart.so in /"), (None, True, "without CUDA")]
    )
    def test_what_else_is_missing_is_said(self, build, monkeypatch, capsys, cuda, runtime, words):
        self.torch(cuda)
        monkeypatch.setenv("CUDA_HOME", str(self.toolkit("13.0", runtime)))
        assert self.cuda_part(build) is None
        assert words in capsys.readouterr().err

    @pytest.mark.parametrize("version, serves", [("2.9.1+cu128", False), ("2.11.0a0+git1f", True), ("3.0.0", True)])
    def test_an_old_torch_is_none(self, build, monkeypatch, capsys, version, serves):
        """Its headers would fail to compile, before pip replaces it."""
        self.torch("13.0", version)
        monkeypatch.setenv("CUDA_HOME", "none")
        monkeypatch.setattr(sysconfig, "get_path", lambda name: str(self.folder))
        assert [ext.name for ext in build.extensions()] == ["avadclip_fast._C"] * serves
        assert ("left out: no torch 2.11 or newer is installed here" in capsys.readouterr().err) != serves

    def test_an_empty_variable_chooses_no_compiler(self, build, monkeypatch):
        """As where a workflow sets it for some of its runs alone."""
        for name in ("CXX", "CUDA_HOME", "TORCH_CUDA_ARCH_LIST"):
            monkeypatch.setenv(name, "")
        monkeypatch.setattr(build.shutil, "which", lambda name: "/usr/bin/c++" if name == "c++" else None)
        operators, *_ = build.extensions()
        assert operators.compile[0] == "c++"

    def test_operators_need_no_python_headers(self, build, monkeypatch, capsys):
        monkeypatch.setenv("CUDA_HOME", "none")
        monkeypatch.setattr(sysconfig, "get_path", lambda name: str(self.folder))
        assert [ext.name for ext in build.extensions()] == ["avadclip_fast._C"]
        assert "facts of the build are left out: no Python.h in /" in capsys.readouterr().err


class TestLoading:
    def test_an_absent_extension_gives_a_reason(self):
        assert "_nothing is not built: it needs a friend" in _build._load("_nothing", "a friend")

    def test_a_broken_extension_raises(self, tmp_path, monkeypatch):
        (tmp_path / "_C.so").write_bytes(b"not a shared object")
        monkeypatch.setattr(_build, "_HERE", tmp_path)
        with pytest.raises(ImportError, match="_C.so is there but does not load"):
            _build._load("_C", "a compiler")

    def test_reasons_name_device_and_dtype(self, monkeypatch):
        monkeypatch.setattr(_build, "CPP_MISSING", None)
        monkeypatch.setattr(_build, "CUDA_MISSING", None)
        x = torch.zeros(1)
        assert _build.cpp_reason(x) is None
        assert "float16" in _build.cpp_reason(x.half())
        assert "one dtype" in _build.cpp_reason(x, x.double())
        assert "a tensor is on cpu" in _build.cuda_reason(x)
        monkeypatch.setattr(_build, "CPP_MISSING", "why")
        with pytest.raises(ops.BackendError, match="why"):
            ops.topk_mean(torch.zeros(1, 2, 3), torch.tensor([1]), backend="cpp")

    @pytest.mark.parametrize(
        ("arch", "runs", "not_runs"),
        [
            ("8.0", [(8, 0), (8, 6), (8, 9)], [(7, 5), (9, 0), (12, 0)]),
            ("10.0+PTX", [(10, 0), (10, 3), (12, 1)], [(9, 0)]),
            ("9.0a", [(9, 0)], [(9, 1), (8, 0)]),
            ("12.0f", [(12, 0), (12, 1)], [(10, 0)]),
        ],
    )
    def test_what_an_architecture_runs_on(self, arch, runs, not_runs):
        assert all(_build.runs_on(arch, capability) for capability in runs)
        assert not any(_build.runs_on(arch, capability) for capability in not_runs)

    def test_a_gpu_that_is_too_old_is_told(self, monkeypatch):
        """Else the automatic choice would take kernels that cannot be loaded there."""
        monkeypatch.setattr(_build, "CUDA_MISSING", None)
        monkeypatch.setattr(_build, "facts", lambda: {"cuda_archs": "8.0;9.0+PTX"})
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7 + device.index % 2, 5))
        old, new = (SimpleNamespace(device=torch.device("cuda", i), dtype=torch.float32) for i in (90, 91))
        assert "cuda:90 has compute capability 7.5, and the CUDA operators" in _build.cuda_reason(old)
        assert _build.cuda_reason(new) is None
        monkeypatch.setattr(_triton, "_DEVICE", "cuda")
        monkeypatch.setattr(_triton, "_MISSING", False)
        monkeypatch.setattr(_triton, "INTERPRETED", False)
        assert "needs compute capability 8.0, and cuda:90 has 7.5" in _triton.triton_reason(old)
        assert _triton.triton_reason(new) is None

    def test_more_classes_than_a_block_holds_are_for_another_backend(self):
        """The automatic choice must know what the operator refuses."""
        most = (shared_bytes() - 8) // (constant("TABLE", "mil_loss.cu") * 4)
        for classes, told in ((most, False), (most + 1, True)):
            logits, labels = torch.zeros(1, 1, classes), torch.zeros(1, classes)
            reason = _dispatch.why_not("mil_align_loss", "cuda", logits, labels, None, None, 16)
            assert (f"{most} classes" in reason) == told

    @pytest.mark.skipif(_build.CUDA_MISSING is not None, reason=str(_build.CUDA_MISSING))
    @pytest.mark.parametrize("op", ["topk_mean", "mil_loss", "mil_align_loss", "uniform_pool"])
    @pytest.mark.parametrize("suffix", ["", "_backward"])
    def test_cuda_operators_are_registered(self, op, suffix):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"avadclip_fast::{op}{suffix}", "CUDA")

    @compiled
    def test_build_facts(self):
        facts = _build.facts()
        if "built" in facts:
            pytest.skip(facts["built"])
        assert "-O3" in facts["flags"] and facts["torch"] and facts["compiler"]


def numbers(corners: bool) -> st.SearchStrategy[float]:
    few = st.sampled_from([0.0, -0.0, 1.0, -1.0, 0.5])  # ties
    ends = st.sampled_from([float("nan"), float("inf"), float("-inf")])
    return st.one_of(few, st.floats(-4, 4, width=32), *([ends] if corners else []))


@compiled
class TestOperators:
    """Corners where an operator's code takes another path than the shared op tests reach."""

    @settings(deadline=None, max_examples=60)
    @given(st.data())
    def test_topk_mean_selects_what_the_reference_selects(self, data):
        rows = data.draw(st.integers(1, 40))
        values = data.draw(st.lists(numbers(True), min_size=2 * rows, max_size=2 * rows))
        scores = torch.tensor(values).reshape(1, rows, 2)
        integer = data.draw(st.sampled_from([torch.int32, torch.int64]))
        lengths = torch.tensor([data.draw(st.integers(1, rows))], dtype=integer)
        divisor = data.draw(st.integers(1, 20))
        results = []
        for backend in ("reference", "cpp"):
            leaf = scores.clone().requires_grad_()
            out = ops.topk_mean(leaf, lengths, divisor, backend=backend)
            results.append((out.detach(), torch.autograd.grad(out.sum(), leaf)[0]))
        torch.testing.assert_close(results[1][0], results[0][0], rtol=1e-6, atol=1e-6, equal_nan=True)
        assert results[1][1].equal(results[0][1])

    @pytest.mark.parametrize("rows", [1, 255, 256, 257, 700])  # tiles of time are 256 rows
    @pytest.mark.parametrize("width", [1, 63, 64, 130])  # tiles of channels are 64 wide
    @pytest.mark.parametrize("scale", [0.3, torch.e, 50.0, 1e6])  # memory: short in float32, long in float64
    def test_distance_graph_tiles(self, rows, width, scale):
        torch.manual_seed(0)
        values, lengths = torch.randn(2, rows, width), torch.tensor([rows, max(1, rows - 7)])
        oracle = ops.distance_graph(values.double(), scale, lengths, backend="reference")
        error = (ops.distance_graph(values, scale, lengths, backend="cpp") - oracle).abs().max()
        # float32 results of float64 sums are within half an eps; short sums in float32 add a few roundings
        assert error <= 4 * torch.finfo(torch.float32).eps * oracle.abs().max()

    def test_long_videos(self):
        torch.manual_seed(0)
        scores, lengths = torch.randn(1, 65536, 2), torch.tensor([65000])
        scores[0, ::3] = 1.5  # ties across the threshold
        results = [ops.topk_mean(scores, lengths, backend=backend) for backend in ("reference", "cpp")]
        torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)

    def test_saturated_losses(self):
        logits = torch.tensor([[200.0, -200.0], [-200.0, -200.0], [89.0, 30.0]], requires_grad=True)
        labels, lengths = torch.tensor([[1.0, 0], [0, 1], [1, 0]]), torch.tensor([2, 1, 2])
        for backend in ("reference", "cpp"):
            loss = ops.mil_loss(logits, labels, lengths, backend=backend)
            assert loss.item() == 100.0
            assert torch.autograd.grad(loss, logits)[0].eq(0).all()

    def test_lengths_outside_are_refused_without_the_check(self):
        out_of_bounds = torch.tensor([5])
        with pytest.raises(RuntimeError, match="lengths must lie in 1..4, got 5"):
            torch.ops.avadclip_fast.topk_mean(torch.zeros(1, 4, 1), out_of_bounds, 16)

    def test_gradients_in_float64(self):
        torch.manual_seed(0)
        lengths = torch.tensor([6, 3])
        x = torch.randn(2, 6, 4, dtype=torch.double) + 1
        v, scores = torch.randn(2, 6, 3, dtype=torch.double), torch.randn(2, 6, 3, dtype=torch.double)
        labels, alpha = torch.tensor([[1.0, 0, 0], [0, 1, 1]]).double(), torch.rand(3).double()

        def graph(x, v):
            out, weights = ops.similarity_graph(x, v, lengths, 0.3, backend="cpp")
            return out, ops.similarity_graph(x, v * v, lengths, 0.3, weights, backend="cpp")[0]

        def losses(scores, alpha):
            mil = ops.mil_loss(scores[..., 0], labels, lengths, 2, backend="cpp")
            return mil, ops.mil_align_loss(scores, labels, lengths, alpha, 2, backend="cpp")

        functions = (
            (graph, (x, v)),
            (losses, (scores, alpha)),
            (lambda s: ops.topk_mean(s, lengths, 2, backend="cpp"), (scores,)),
            (lambda v: ops.distance_graph(v, 3.0, lengths, backend="cpp"), (v,)),
        )
        for function, inputs in functions:
            assert torch.autograd.gradcheck(function, [i.clone().requires_grad_() for i in inputs])
        assert torch.autograd.gradgradcheck(functions[-1][0], [v.clone().requires_grad_()])

    def test_weights_of_one_backend_serve_another(self):
        torch.manual_seed(0)
        x, v, lengths = torch.randn(2, 9, 8) + 1, torch.randn(2, 9, 5), torch.tensor([9, 4])
        weights = [ops.similarity_graph(x, v, lengths, backend=name)[1] for name in ("reference", "cpp")]
        mixed = [ops.similarity_graph(x, v, lengths, weights=w, backend="cpp")[0] for w in weights]
        torch.testing.assert_close(*mixed)

    def test_operators_pass_opcheck(self):
        torch.manual_seed(0)
        op, lengths = torch.ops.avadclip_fast, torch.tensor([6, 3])
        x, v = torch.randn(2, 6, 4, requires_grad=True), torch.randn(2, 6, 3, requires_grad=True)
        labels, alpha = torch.tensor([[1.0, 0, 0], [0, 1, 1]]), torch.rand(3, requires_grad=True)
        weights, packed = torch.rand(2, 6, 6, requires_grad=True), torch.randn(9, 3, requires_grad=True)
        for operator, arguments in (
            (op.similarity_graph, (x, v, lengths, 0.7)),
            (op.similarity_graph, (x.detach().double().requires_grad_(), v.detach().double(), lengths, 0.7)),
            (op.similarity_mix, (weights, v, lengths)),
            (op.topk_mean, (v, lengths, 2)),
            (op.mil_loss, (v.detach()[..., 0].requires_grad_(), labels, lengths, 2)),
            (op.mil_align_loss, (v, labels, lengths, alpha, 2)),
            (op.distance_graph, (v, 2.7, lengths)),
            (op.distance_graph, (v, 9.0, None)),
            (op.uniform_pool, (packed, lengths, 5)),
            (op.pack_rows, (v, lengths, 9)),
            (op.unpack_rows, (packed, lengths, 7)),
        ):
            torch.library.opcheck(operator.default, arguments)


def test_long_columns_are_left_to_torch():
    """Those that do not fit in shared memory: on an H200 torch took a tenth of the time for 65,536 rows."""
    declines, rows = _dispatch.TABLE["topk_mean"]["cuda"].declines, shared_bytes() // 4
    for count in (rows, rows + 1):
        reason = declines(torch.empty(1, count, 2, device="meta"), torch.tensor([1]), 16)
        assert ("torch's sort is faster" in (reason or "")) == (count > rows)
