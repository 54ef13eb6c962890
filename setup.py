"""Packages are listed by hand: `kernels/` stands at the top level and installs as `avadclip_fast.kernels`.

`_C` (operators for the CPU) is built where there is a C++ compiler, `_C_cuda` where there is nvcc as well, of the CUDA
that torch was built with. What is missing is said in a line, and left out. CXX, CUDA_HOME ("none": no CUDA part) and
TORCH_CUDA_ARCH_LIST are honoured.
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
OPS = ["topk_mean", "mil_loss", "distance_graph", "uniform_pool", "pack_rows"]
CPU_SOURCES = [f"csrc/{op}_cpu.cpp" for op in [*OPS, "similarity_graph", "linear_act"]]
CUDA_SOURCES = [f"csrc/{op}.cu" for op in OPS]

# The oldest torch the shared objects run with, as in pyproject.toml; newer ones keep this ABI.
OLDEST = (2, 11)
TORCH_TARGET = "0x020b000000000000"
COMMON_FLAGS = ["-std=c++20", "-O3", f"-DTORCH_TARGET_VERSION={TORCH_TARGET}"]
CPU_FLAGS = [*COMMON_FLAGS, "-fPIC", "-fvisibility=hidden", "-fopenmp-simd", "-Wall", "-Wno-unknown-pragmas"]
CUDA_FLAGS = [
    "-DUSE_CUDA",
    "--expt-relaxed-constexpr",
    "-Xcompiler=-fPIC,-fvisibility=hidden,-Wno-unknown-pragmas",
]
BLACKWELL = (12, 8)  # the first nvcc that knows 10.0


def find_torch() -> Path | None:
    """The folder of the torch that is installed here: under build isolation it is not importable, but it is there.

    One that is too old is none: it lacks headers, and pip is to replace it.
    """
    spec = find_spec("torch")
    found = [Path(spec.origin).parent] if spec else []
    for root in [*found, Path(sysconfig.get_path("platlib")) / "torch"]:
        if (root / "include/torch/csrc/stable").is_dir():
            version = torch_version(root, "__version__").split(".")
            if tuple(map(int, version[:2])) >= OLDEST:
                return root
    return None


def torch_version(torch: Path, name: str) -> str:
    """`__version__` or `cuda` of torch/version.py; "" for None."""
    found = re.search(rf"^{name}\b.*= '([^']*)'", (torch / "version.py").read_text(), re.MULTILINE)
    return found[1] if found else ""


def find_cuda() -> Path | None:
    """The CUDA toolkit: CUDA_HOME if set, else nvcc's on the path, or NVIDIA's packages (the extra `cuda-build`).

    Of several the first of torch's CUDA, else the first.
    """
    on_path = shutil.which("nvcc")
    candidates = [
        on_path and Path(on_path).resolve().parents[1],
        "/usr/local/cuda",
        *(Path(folder) / "nvidia/cu13" for folder in [*sys.path, sysconfig.get_path("purelib")]),
    ]
    if os.environ.get("CUDA_HOME"):
        candidates = [os.environ["CUDA_HOME"]]
    roots = [Path(root) for root in candidates if root]
    # nvvm tells a toolkit from a folder whose bin/nvcc is a script or a link
    toolkits = [root for root in roots if (root / "nvvm").is_dir() and (root / "bin/nvcc").exists()]
    torch = find_torch()
    fitting = [root for root in toolkits if torch and fits(release(root), torch)]
    return next(iter(fitting or toolkits), None)


def release(toolkit: Path) -> tuple[int, int]:
    """nvcc's."""
    major, minor = re.findall(r"\d+", version_of([f"{toolkit}/bin/nvcc", "--version"], r"release \d+\.\d+"))
    return int(major), int(minor)


def fits(nvcc: tuple[int, int], torch: Path) -> bool:
    """Whether the CUDA runtime that it links is torch's: one library for all releases of a major version."""
    return torch_version(torch, "cuda").split(".")[0] == str(nvcc[0])


def default_archs(nvcc: tuple[int, int]) -> str:
    return "8.0;9.0;10.0+PTX" if nvcc >= BLACKWELL else "8.0;9.0+PTX"


def no_cuda_because(torch: Path, toolkit: Path | None, runtime: Path | None) -> str | None:
    """Why the CUDA operators cannot be built, or None."""
    if toolkit is None:
        return "no nvcc (install a CUDA toolkit, or the extra `cuda-build`)"
    wanted, nvcc = torch_version(torch, "cuda"), release(toolkit)
    if not wanted or not (torch / "lib/libtorch_cuda.so").exists():
        return "this torch is built without CUDA"
    if not fits(nvcc, torch):
        return f"torch is built with CUDA {wanted}, and {toolkit} is {nvcc[0]}.{nvcc[1]} (CUDA_HOME chooses another)"
    if runtime is None:
        return f"no libcudart.so in {toolkit}/lib64 or lib"
    return None


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

    def run(self) -> None:
        for name in ("_C", "_C_cuda"):
            # An earlier editable install's, left out by this one, would still be loaded.
            if self.inplace and not any(ext.name == f"avadclip_fast.{name}" for ext in self.extensions):
                Path(f"avadclip_fast/{name}.so").unlink(missing_ok=True)
        super().run()

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
    cxx = shlex.split(os.environ.get("CXX") or "c++")
    if shutil.which(cxx[0]) is None:
        return missing("C++ operators", f"no C++ compiler ({cxx[0]})")
    torch = find_torch()
    if torch is None:
        return missing("C++ operators", "no torch {}.{} or newer is installed here".format(*OLDEST))
    includes = [f"-I{torch}/include", "-Icsrc"]
    link, libraries = [*cxx, "-shared"], [f"-L{torch}/lib", "-ltorch_cpu"]
    built = [extension("_C", CPU_SOURCES, [*cxx, *CPU_FLAGS, *includes], link, libraries)]

    archs, nvcc = "", find_cuda()
    runtimes = [path for lib in ("lib64", "lib") if nvcc for path in sorted((nvcc / lib).glob("libcudart.so*"))]
    runtime = next(iter(runtimes), None)
    if why := no_cuda_because(torch, nvcc, runtime):
        missing("CUDA operators", why)
    else:
        archs = os.environ.get("TORCH_CUDA_ARCH_LIST") or default_archs(release(nvcc))
        compile = [f"{nvcc}/bin/nvcc", *COMMON_FLAGS, *CUDA_FLAGS, *gencode(archs), *includes]
        built.append(extension("_C_cuda", CUDA_SOURCES, compile, link, [*libraries, "-ltorch_cuda", str(runtime)]))

    python = Path(sysconfig.get_path("include"))
    if not (python / "Python.h").exists():
        missing("facts of the build", f"no Python.h in {python} (Debian has it in python3-dev)")
        return built
    facts = {
        "COMPILER": version_of([*cxx, "--version"], r".*"),
        "FLAGS": shlex.join(CPU_FLAGS),
        "TORCH": torch_version(torch, "__version__"),
        "NVCC": version_of([f"{nvcc}/bin/nvcc", "--version"], r"release [\d.]+, V[\d.]+") if archs else "",
        "ARCHS": archs,
    }
    defines = [f'-DAVADCLIP_{name}="{value}"' for name, value in facts.items()]
    # pybind11's headers come with torch, and are not for the stable ABI: no TORCH_TARGET_VERSION.
    compile = [*cxx, "-std=c++20", "-O1", "-fPIC", "-fvisibility=hidden", *includes, f"-I{python}", *defines]
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
        setup_requires=[] if find_torch() else ["torch>={}.{}".format(*OLDEST)],
        ext_modules=extensions(),
        cmdclass={"build_ext": BuildExt},
    )
