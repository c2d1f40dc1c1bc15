// The Python module alphaext._C. Importing it loads the operators, which register themselves (ops.cpp); what it offers
// besides is how it was built. The ALPHAEXT_ macros come from setup.py.
#include <pybind11/pybind11.h>
#include <torch/csrc/stable/c/shim.h>

#include <cstdint>
#include <string>

#include "cpu/kernels.h"
#include "kernels/training_params.h"

namespace py = pybind11;

namespace {

std::string compiler() {
#if defined(__clang__)
  return "clang " __clang_version__;
#elif defined(__GNUC__)
  return "gcc " __VERSION__;
#else
  return "unknown";
#endif
}

py::object cuda_version() {
#if ALPHAEXT_WITH_CUDA
  return py::str(ALPHAEXT_CUDA_VERSION);
#else
  return py::none();
#endif
}

// ["8.0", "9.0+PTX"], from the semicolon-separated list the build was given.
py::object cuda_architectures() {
#if ALPHAEXT_WITH_CUDA
  return py::str(ALPHAEXT_CUDA_ARCHS).attr("split")(";");
#else
  return py::none();
#endif
}

uint32_t threads() {
  uint32_t count = 0;
  if (torch_get_num_threads(&count) != AOTI_TORCH_SUCCESS) throw py::value_error("torch does not tell its number of threads");
  return count;
}

py::dict build_info() {
  py::dict info;
  info["version"] = ALPHAEXT_VERSION;
  info["compiler"] = compiler();
  info["flags"] = ALPHAEXT_FLAGS;
  info["torch"] = ALPHAEXT_TORCH_VERSION;
  info["cuda"] = cuda_version();
  info["cuda_archs"] = cuda_architectures();
  info["simd"] = alphaext::cpu::kernels().name;
  info["threads"] = threads();
  return info;
}

py::dict layout() {
  py::dict sizes;
  sizes["tile_width"] = alphaext::kTileWidth;
  sizes["block_samples"] = alphaext::kBlockSamples;
  sizes["top_classes"] = alphaext::kTopClasses;
  return sizes;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "The compiled kernels of alphaext: importing this module registers the operators torch.ops.alphaext.*";
  m.def("build_info", &build_info,
        "How this library was built and runs: version, compiler, flags, torch (built against), cuda (version or None), "
        "cuda_archs (list or None), simd (instruction set in use), threads (torch's, now).");
  m.def("layout", &layout, "Sizes that the kernels' memory is laid out by: tile_width, block_samples, top_classes.");
}
