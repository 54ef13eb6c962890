"""The compiled Triton kernels: the committed report is that of the sources, breaks no rule, and is still true."""

import json

import pytest
import torch

from avadclip_fast.ops._triton import INTERPRETED

if INTERPRETED:
    pytest.skip("under TRITON_INTERPRET=1 nothing is compiled", allow_module_level=True)
triton = pytest.importorskip("triton")

from avadclip_fast.kernels import layer_norm  # noqa: E402
from triton.backends import backends  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.runtime.jit import create_function_from_signature  # noqa: E402

from avadclip_fast.engine import tune  # noqa: E402
from bench import aot_triton, compile_kernels, triton_calls  # noqa: E402

REPORT = json.loads(aot_triton.REPORT.read_text())["triton"]


def test_the_report_is_of_these_sources():
    assert REPORT["sources"] == aot_triton.source_hash(), "run python -m bench.aot_triton, and commit the report"


@pytest.mark.parametrize("chip", aot_triton.CHIPS)
def test_the_report_has_every_kernel_and_breaks_no_rule(chip):
    reported = {name: found[chip] for name, found in REPORT["kernels"].items() if chip in found}
    assert reported.keys() == aot_triton.variants(chip).keys()
    assert not [fault for name, found in reported.items() for fault in aot_triton.faults(chip, name, found)]


@pytest.mark.parametrize(
    "name",
    [
        "bfloat16 mlp 0 gemm_kernel",
        "bfloat16 uncertainty, lengths 0 gemm_kernel",
        "bfloat16 fusion 0 gates_kernel",
        "bfloat16 windows of 64 1 window_grad_kernel",
        "bfloat16 graph 1 weights_kernel",
        "bfloat16 prompts 4 cosine_grad_kernel",
        "bfloat16 distillation 0 distill_kernel",
    ],
)
def test_compiles_no_worse_than_reported(name):
    """One kernel of each kind, for sm_90; `python -m bench.aot_triton --check` does it for all."""
    if triton.__version__ != REPORT["triton"]:
        pytest.skip(f"the report was made with Triton {REPORT['triton']}, this is {triton.__version__}")
    found = aot_triton.resources(*aot_triton.variants("sm_90")[name], "sm_90")
    assert not aot_triton.faults("sm_90", name, found) + aot_triton.worse(
        "sm_90", name, found, REPORT["kernels"][name]["sm_90"]
    )


@pytest.mark.parametrize(("slots", "pendings", "found"), [(1, 1, 1), (2, 1, 0), (1, 0, 0)])
def test_a_copy_into_what_is_still_multiplied_is_found(slots, pendings, found):
    """The right factor is seen through a transposition; the left one has slots enough."""
    ttgir = f"""
      %a = ttg.local_alloc : () -> !ttg.memdesc<2x64x64xbf16, #shared, #smem, mutable>
      %b = ttg.local_alloc : () -> !ttg.memdesc<{slots}x64x64xbf16, #shared, #smem, mutable>
      %a_0 = ttg.memdesc_index %a[%c0_i32] : !ttg.memdesc<2x64x64xbf16> -> !ttg.memdesc<64x64xbf16>
      %b_0 = ttg.memdesc_index %b[%c0_i32] : !ttg.memdesc<{slots}x64x64xbf16> -> !ttg.memdesc<64x64xbf16>
      %a_1 = ttg.memdesc_index %a[%i] : !ttg.memdesc<2x64x64xbf16> -> !ttg.memdesc<64x64xbf16>
      %b_1 = ttg.memdesc_index %b[%i] : !ttg.memdesc<{slots}x64x64xbf16> -> !ttg.memdesc<64x64xbf16>
      %b_2 = ttg.memdesc_trans %b_1 {{order = array<i32: 1, 0>}} : !ttg.memdesc<64x64xbf16> -> !ttg.memdesc<64x64xbf16>
      %acc_1 = ttng.warp_group_dot %a_1, %b_2, %acc {{isAsync = true}} : !ttg.memdesc<64x64xbf16> -> tensor<64x64xf32>
      %acc_2 = ttng.warp_group_dot_wait %acc_1 {{pendings = {pendings} : i32}} : tensor<64x64xf32>
    """
    assert aot_triton.overwritten(ttgir) == found


ALIGNED = {"gemm_kernel", "weights_kernel", "along_kernel", "features_grad_kernel", "product_kernel"}  # by their rows


def compiled(monkeypatch, videos: int, rows: int) -> dict[tuple[str, ...], tuple[str, bool, str]]:
    """What Triton compiles for the calls of a step: (kernel, whether all rows are one matrix, the call)."""
    for module in (tune, triton_calls):
        monkeypatch.setattr(module, "B", videos)
        monkeypatch.setattr(module, "T", rows)
    found = {}
    with aot_triton.recorded("sm_90") as launches, aot_triton.tf32(False):
        for call, run in triton_calls.calls(torch.bfloat16, "meta"):
            start = len(launches)
            run()
            for kernel, arguments, options in launches[start:]:
                known = aot_triton.identity(kernel, arguments, options)
                found.setdefault(known, (kernel.__name__, arguments.get("videos") == 1, call))
    return found


@pytest.mark.parametrize("videos", [84, 85])
@pytest.mark.parametrize("rows", [256, 201])
def test_a_smaller_last_batch_compiles_little(videos, rows, monkeypatch):
    """After batches of 96 videos: one kernel, and of odd videos those products of which all rows are one matrix."""
    before, after = compiled(monkeypatch, 96, rows), compiled(monkeypatch, videos, rows)
    more = [after[known] for known in after.keys() - before.keys()]
    assert all(kernel == "gemm_kernel" and matrix for kernel, matrix, _ in more), more
    assert rows % 16 or {call for *_, call in more} <= {"prompt layer"}


def test_videos_of_another_length_compile_little(monkeypatch):
    before, after = compiled(monkeypatch, 96, 256), compiled(monkeypatch, 96, 201)
    assert {after[known][0] for known in after.keys() - before.keys()} <= ALIGNED


def test_tritons_own_binder_specialises_as_the_report_does():
    """For rows that are a multiple of 16, one that are not, and a single one."""
    target = GPUTarget("cuda", 90, 32)
    backend = backends["nvidia"].compiler(target)
    with aot_triton.recorded("sm_90") as launches:
        for x in (torch.ones(16, 16), torch.ones(15, 16), torch.ones(1, 16), torch.ones(5, 24)):
            layer_norm.forward(x, x[0], x[0], x.dtype)
    assert len(launches) == 4
    for kernel, arguments, _ in launches:
        bind = create_function_from_signature(kernel.signature, kernel.params, backend)
        _, known, _ = bind(**arguments)
        made = aot_triton.source(kernel, arguments)
        assert [kind for kind, _ in known] == list(made.signature.values())
        aligned = {(i,) for i, (kind, what) in enumerate(known) if kind != "constexpr" and what == "D"}
        assert aligned == made.attrs.keys()


def test_a_call_is_compiled_by_its_name_and_its_error_told(monkeypatch):
    with aot_triton.recorded("sm_90") as seen:
        assert compile_kernels.compile_call(torch.bfloat16, "graph convolution", "meta") is None
    assert {kernel.__name__ for kernel, *_ in seen} >= {"gemm_kernel", "weight_grad_kernel"}
    monkeypatch.setattr(triton_calls, "calls", lambda *_: [("broken", lambda: 1 / 0)])
    assert "ZeroDivisionError" in compile_kernels.compile_call(torch.bfloat16, "broken", "meta")
