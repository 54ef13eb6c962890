"""What surrounds the kernels on a GPU, without one: torch's allocator, streams and captures on an emulated device.

tests/emulated_gpu has a CUDA runtime whose kernels do nothing, and gives torch's operators and those of csrc their
values on the CPU. Tests of what needs a GPU but no Triton run on it, in a process of their own.
"""

import os
import runpy
import shutil
import subprocess
import sys
import sysconfig
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "tests/emulated_gpu"
FILES = ("test_graph.py", "test_lowering.py", "test_models.py", "test_profile.py")


@pytest.fixture(scope="module")
def emulation(tmp_path_factory) -> dict[str, str]:
    """The environment of a process on the emulated GPU."""
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    if (torch.version.cuda or "").split(".")[0] != "13":
        pytest.skip(f"the runtime is that of CUDA 13, torch's CUDA is {torch.version.cuda}")
    toolkit = runpy.run_path(str(ROOT / "setup.py"))["find_cuda"]()
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if toolkit is None or compiler is None:
        pytest.skip("no CUDA toolkit, or no C++ compiler")
    library = tmp_path_factory.mktemp("emulated") / "libcuda.so.1"  # a name that torch asks the loader for
    includes = f"-I{toolkit}/include", f"-I{sysconfig.get_path('purelib')}/nvidia/cu13/include"
    flags = "-std=c++20", "-O1", "-Wall", "-Werror", "-fPIC", "-shared", f"-Wl,-soname,{library.name}", *includes
    subprocess.run([compiler, *flags, FOLDER / "runtime.cpp", "-o", library], check=True)
    return os.environ | {"LD_PRELOAD": str(library), "PYTHONPATH": f"{FOLDER}:{ROOT}"}


def test_the_tests_of_a_gpu_pass(emulation, tmp_path):
    report = tmp_path / "report.xml"
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider", f"--junitxml={report}"]
    done = subprocess.run(
        [*command, *(ROOT / "tests" / file for file in FILES)], cwd=ROOT, env=emulation, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    suite = ElementTree.parse(report).getroot()[0]
    assert int(suite.attrib["tests"]) > len(FILES) and suite.attrib["skipped"] == "0"


BRANCH = "side.wait_stream(torch.cuda.current_stream())\nwith torch.cuda.stream(side): x + 1\n"
CAPTURES = {  # what is captured -> what is told, "" if it is taken
    "x + 1": "",
    f"{BRANCH}torch.cuda.current_stream().wait_stream(side)": "",
    BRANCH: "a stream was not joined: error 904",
    "x.sum().item()": "cudaStreamSynchronize: error 900",
    "torch.cuda.synchronize()": "cudaDeviceSynchronize: error 900",
    "x.cpu()": "copy_ makes the host wait",
    "x.nonzero()": "nonzero makes the host wait",
}


def test_a_capture_refuses_what_a_gpu_refuses(emulation):
    code = f"""
import sys, torch
x = torch.ones(3, device="cuda")
for call in {list(CAPTURES)}:
    side, told = torch.cuda.Stream(), ""
    try:
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            exec(call)
    except RuntimeError as error:
        told = str(error)
    print(told or "TAKEN", "END", file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", code], env=emulation, capture_output=True, text=True, check=True)
    *found, _ = done.stderr.split("END\n")
    for (call, told), said in zip(CAPTURES.items(), found, strict=True):
        assert ("TAKEN" in said) == (told == "") and told in said, (call, said)
