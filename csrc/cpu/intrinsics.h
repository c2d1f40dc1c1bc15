// The instruction sets' own headers, for what vectors.inc.h cannot say with GCC's vectors: to be included before it, outside
// any namespace.
#pragma once

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif
