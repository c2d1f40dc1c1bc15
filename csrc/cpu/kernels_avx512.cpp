// The kernels for x86-64 processors with AVX512.
#include <cmath>
#include <cstring>
#include <limits>

#include "flush_denormals.h"
#include "intrinsics.h"
#include "kernels.h"

#if defined(__x86_64__) && defined(__GNUC__)

#define ALPHAEXT_SIMD_NAMESPACE simd_avx512
#define ALPHAEXT_SIMD_NAME "avx512"
#define ALPHAEXT_VECTOR_BYTES 64
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")
#endif

#include "table.inc.h"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif
