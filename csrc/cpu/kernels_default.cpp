// The kernels for any processor of the architecture the compiler was called for.
#include <cmath>
#include <cstring>
#include <limits>

#include "flush_denormals.h"
#include "intrinsics.h"
#include "kernels.h"

#define ALPHAEXT_SIMD_NAMESPACE simd_default
#define ALPHAEXT_SIMD_NAME "default"
#define ALPHAEXT_VECTOR_BYTES 16
#include "table.inc.h"
