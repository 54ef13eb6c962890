"""The compiled GEMM family: the committed report is that of the sources, breaks no rule, and is still true."""

import json

import pytest

from avadclip_fast.ops._triton import INTERPRETED

if INTERPRETED:
    pytest.skip("under TRITON_INTERPRET=1 nothing is compiled", allow_module_level=True)
triton = pytest.importorskip("triton")

from bench import aot_gemm  # noqa: E402

REPORT = json.loads(aot_gemm.REPORT.read_text())["gemm"]


def test_the_report_is_of_these_sources():
    assert REPORT["sources"] == aot_gemm.source_hash(), "run python -m bench.aot_gemm, and commit the report"


@pytest.mark.parametrize("chip", aot_gemm.CHIPS)
def test_the_report_has_every_kernel_and_breaks_no_rule(chip):
    reported = {name: found[chip] for name, found in REPORT["kernels"].items() if chip in found}
    assert reported.keys() == aot_gemm.variants(chip).keys()
    assert not [fault for name, found in reported.items() for fault in aot_gemm.faults(chip, name, found)]


@pytest.mark.parametrize(
    "name",
    ["bfloat16 mlp 1 gemm_kernel", "bfloat16 uncertainty, lengths 0 gemm_kernel", "bfloat16 fusion 0 gates_kernel"],
)
def test_compiles_no_worse_than_reported(name):
    """One kernel of each kind, for sm_90; `python -m bench.aot_gemm --check` does it for all."""
    if triton.__version__ != REPORT["triton"]:
        pytest.skip(f"the report was made with Triton {REPORT['triton']}, this is {triton.__version__}")
    found = aot_gemm.resources(*aot_gemm.variants("sm_90")[name], "sm_90")
    assert not aot_gemm.faults("sm_90", name, found) + aot_gemm.worse(
        "sm_90", name, found, REPORT["kernels"][name]["sm_90"]
    )
