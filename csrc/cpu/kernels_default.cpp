// The kernels for any processor of the architecture the compiler was called for.
#include "kernels.h"

#define ALPHAEXT_SIMD_NAMESPACE simd_default
#define ALPHAEXT_SIMD_NAME "default"
#include "table.inc.h"
