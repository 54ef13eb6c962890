// How the extension was built, for `avadclip-fast env` and bug reports. Operators do not go through here.
#include <pybind11/pybind11.h>

PYBIND11_MODULE(_build_facts, m) {
  m.attr("compiler") = AVADCLIP_COMPILER;
  m.attr("flags") = AVADCLIP_FLAGS;
  m.attr("torch") = AVADCLIP_TORCH;        // the version whose headers were used
  m.attr("nvcc") = AVADCLIP_NVCC;          // "" without a CUDA part
  m.attr("cuda_archs") = AVADCLIP_ARCHS;
}
