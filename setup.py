"""Packages are listed by hand: `kernels/` stands at the top level and installs as `avadclip_fast.kernels`.

`_C` (operators for the CPU) is built where there is a C++ compiler, `_C_cuda` where there is nvcc as well. What is
missing is said in a line, and left out. CXX, CUDA_HOME ("none": no CUDA part) and TORCH_CUDA_ARCH_LIST are honoured.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

PACKAGES = ["reference", "ops", "modules", "models", "data", "media", "engine", "cli", "kernels"]
OPS = ["topk_mean", "mil_loss", "distance_graph", "uniform_pool"]
CPU_SOURCES = [f"csrc/{op}_cpu.cpp" for op in [*OPS, "similarity_graph", "linear_act"]]
CUDA_SOURCES = [source for op in OPS if Path(source := f"csrc/{op}.cu").exists()]

# The oldest torch the shared objects run with; newer ones keep this ABI.
TORCH_TARGET = "0x020b000000000000"
COMMON_FLAGS = ["-std=c++20", "-O3", f"-DTORCH_TARGET_VERSION={TORCH_TARGET}"]
CPU_FLAGS = [*COMMON_FLAGS, "-fPIC", "-fvisibility=hidden", "-fopenmp-simd", "-Wall", "-Wno-unknown-pragmas"]
CUDA_FLAGS = [
    "-DUSE_CUDA",
    "--expt-relaxed-constexpr",
    "-Xcompiler=-fPIC,-fvisibility=hidden,-Wno-unknown-pragmas",
]
DEFAULT_ARCHS = "8.0;9.0;10.0+PTX"


def find_torch() -> Path | None:
    """The folder of the torch that is installed here: under build isolation it is not importable, but it is there."""
    spec = find_spec("torch")
    found = [Path(spec.origin).parent] if spec else []
    for root in [*found, Path(sysconfig.get_path("platlib")) / "torch"]:
        if (root / "include/torch/csrc/stable").is_dir():
            return root
    return None


def find_cuda() -> Path | None:
    """The CUDA toolkit: CUDA_HOME if set, else nvcc's on the path, or NVIDIA's packages (the extra `cuda-build`)."""
    on_path = shutil.which("nvcc")
    candidates = [
        on_path and Path(on_path).resolve().parents[1],
        "/usr/local/cuda",
        *(Path(folder) / "nvidia/cu13" for folder in [*sys.path, sysconfig.get_path("purelib")]),
    ]
    if os.environ.get("CUDA_HOME"):
        candidates = [os.environ["CUDA_HOME"]]
    # nvvm tells a toolkit from a folder whose bin/nvcc is a script or a link
    return next((Path(root) for root in candidates if root and (Path(root) / "nvvm").is_dir()), None)


def gencode(archs: str) -> list[str]:
    """TORCH_CUDA_ARCH_LIST -> nvcc's flags: "8.0;9.0+PTX" -> sm_80, sm_90, and compute_90 for what comes after."""
    flags = []
    for arch in re.split(r"[;\s,]+", archs.strip()):
        match = re.fullmatch(r"(\d+)\.(\d[af]?)(\+PTX)?", arch)
        if match is None:
            sys.exit(f"TORCH_CUDA_ARCH_LIST: expected numbers such as 8.0;9.0;10.0+PTX, got {arch!r}")
        number = match[1] + match[2]
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if match[3]:
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


def version_of(command: list[str], pattern: str) -> str:
    return re.search(pattern, subprocess.run(command, capture_output=True, text=True, check=True).stdout)[0]


class BuildExt(build_ext):
    """Calls the compilers directly: the flags above are all there are, and nvcc needs no plug-in."""

    def get_ext_filename(self, fullname: str) -> str:
        name = super().get_ext_filename(fullname)
        # The operators use no Python, so that their file names carry no Python version.
        return name if fullname.endswith("_build_facts") else re.sub(r"\.cpython[^.]*", "", name)

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name))
        objects = Path(self.build_temp) / ext.name
        for folder in (target.parent, objects):
            folder.mkdir(parents=True, exist_ok=True)
        jobs = [[*ext.compile, "-c", source, "-o", str(objects / f"{Path(source).stem}.o")] for source in ext.sources]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(self.call, jobs))
        self.call([*ext.link, *(job[-1] for job in jobs), *ext.libraries, "-o", str(target)])

    def call(self, command: list[str]) -> None:
        print(shlex.join(command), flush=True)
        subprocess.run(command, check=True)


def extensions() -> list[Extension]:
    """What can be built here."""
    cxx = shlex.split(os.environ.get("CXX", "c++"))
    if shutil.which(cxx[0]) is None:
        return missing("C++ operators", f"no C++ compiler ({cxx[0]})")
    torch = find_torch()
    if torch is None:
        return missing("C++ operators", "torch is not installed here")
    includes = [f"-I{torch}/include", "-Icsrc"]
    link, libraries = [*cxx, "-shared"], [f"-L{torch}/lib", "-ltorch_cpu"]
    built = [extension("_C", CPU_SOURCES, [*cxx, *CPU_FLAGS, *includes], link, libraries)]

    archs, nvcc = "", find_cuda()
    if nvcc is None:
        missing("CUDA operators", "no nvcc (install a CUDA toolkit, or the extra `cuda-build`)")
    elif not (torch / "lib/libtorch_cuda.so").exists():
        missing("CUDA operators", "this torch is built without CUDA")
    elif CUDA_SOURCES:
        archs = os.environ.get("TORCH_CUDA_ARCH_LIST") or DEFAULT_ARCHS
        compile = [f"{nvcc}/bin/nvcc", *COMMON_FLAGS, *CUDA_FLAGS, *gencode(archs), *includes]
        runtime = next(path for lib in ("lib64", "lib") for path in sorted((nvcc / lib).glob("libcudart.so*")))
        built.append(extension("_C_cuda", CUDA_SOURCES, compile, link, [*libraries, "-ltorch_cuda", str(runtime)]))

    facts = {
        "COMPILER": version_of([*cxx, "--version"], r".*"),
        "FLAGS": shlex.join(CPU_FLAGS),
        "TORCH": re.search(r"__version__ = '([^']*)'", (torch / "version.py").read_text())[1],
        "NVCC": version_of([f"{nvcc}/bin/nvcc", "--version"], r"release [\d.]+, V[\d.]+") if archs else "",
        "ARCHS": archs,
    }
    defines = [f'-DAVADCLIP_{name}="{value}"' for name, value in facts.items()]
    # pybind11's headers come with torch, and are not for the stable ABI: no TORCH_TARGET_VERSION.
    compile = [*cxx, "-std=c++20", "-O1", "-fPIC", "-fvisibility=hidden", *includes, *defines]
    compile.append(f"-I{sysconfig.get_path('include')}")
    built.append(extension("_build_facts", ["csrc/build_facts.cpp"], compile, [*cxx, "-shared"]))
    return built


def extension(name: str, sources: list[str], compile: list[str], link: list[str], libraries: list[str] = ()):
    ext = Extension(f"avadclip_fast.{name}", sources)
    ext.compile, ext.link, ext.libraries = compile, link, [*libraries]
    return ext


def missing(what: str, why: str) -> list:
    print(f"avadclip_fast: {what} are left out: {why}", file=sys.stderr)
    return []


if __name__ == "__main__":
    setup(
        packages=["avadclip_fast", *(f"avadclip_fast.{name}" for name in PACKAGES)],
        package_dir={"avadclip_fast": "avadclip_fast", "avadclip_fast.kernels": "kernels"},
        # These files and no more: else setuptools takes kernels/configs for a package that was forgotten above.
        include_package_data=False,
        package_data={"avadclip_fast": ["py.typed"], "avadclip_fast.kernels": ["configs/*.json"]},
        # Build isolation hides the installed torch, but its headers can be found; where there is none, pip gets it.
        setup_requires=[] if find_torch() else ["torch>=2.11"],
        ext_modules=extensions(),
        cmdclass={"build_ext": BuildExt},
    )
