// The kernels for x86-64 processors with AVX2.
#include <cmath>
#include <cstring>
#include <limits>

#include "flush_denormals.h"
#include "intrinsics.h"
#include "kernels.h"

#if defined(__x86_64__) && defined(__GNUC__)

#define ALPHAEXT_SIMD_NAMESPACE simd_avx2
#define ALPHAEXT_SIMD_NAME "avx2"
#define ALPHAEXT_VECTOR_BYTES 32
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif

#include "table.inc.h"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif
