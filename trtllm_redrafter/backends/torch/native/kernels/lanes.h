// Sixteen float32 lanes, bfloat16 conversion and the elementary functions of all kernels.
//
// `dot_pair` adds a[2i] * x[0] + a[2i + 1] * x[1] to lane i: one vdpbf16ps where the processor has AVX512-BF16, plain C++
// elsewhere. Every product in this folder is a sequence of these, so a result depends on the order of its terms alone.
// Values that are not finite pass through: NaN in, NaN out.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

using bf16 = uint16_t;

namespace {

constexpr int LANES = 16;

inline float to_float(bf16 v) {
  uint32_t u = uint32_t(v) << 16;
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}

inline bf16 to_bf16(float f) {  // round to nearest even; NaN stays NaN
  uint32_t u;
  std::memcpy(&u, &f, 4);
  if ((u & 0x7fffffffu) > 0x7f800000u) return bf16((u >> 16) | 0x40);
  return bf16((u + 0x7fffu + ((u >> 16) & 1)) >> 16);
}

#if defined(__AVX512BF16__) && defined(__AVX512F__) && !defined(REDRAFTER_PORTABLE)
#define REDRAFTER_ISA "avx512-bf16"
struct Vec {
  __m512 v;
};
inline Vec zero() { return {_mm512_setzero_ps()}; }
inline void dot_pair(Vec &acc, const bf16 *pairs, uint32_t x) {
  acc.v = _mm512_dpbf16_ps(acc.v, (__m512bh)_mm512_loadu_si512(pairs), (__m512bh)_mm512_set1_epi32(int(x)));
}
inline void store(float *p, const Vec &a) { _mm512_storeu_ps(p, a.v); }
#else
#define REDRAFTER_ISA "portable"
struct Vec {
  float v[LANES];
};
inline Vec zero() { return Vec{}; }
inline void dot_pair(Vec &acc, const bf16 *pairs, uint32_t x) {
  const float lo = to_float(bf16(x)), hi = to_float(bf16(x >> 16));
  for (int i = 0; i < LANES; ++i) {
    uint32_t both;
    std::memcpy(&both, pairs + 2 * i, 4);
    const uint32_t a = both << 16, b = both & 0xffff0000u;
    float fa, fb;
    std::memcpy(&fa, &a, 4);
    std::memcpy(&fb, &b, 4);
    acc.v[i] += fa * lo + fb * hi;
  }
}
inline void store(float *p, const Vec &a) { std::memcpy(p, a.v, sizeof a.v); }
#endif

// A hint; the address may lie behind the end of an array.
inline void prefetch(const void *p) {
#if defined(__x86_64__)
  _mm_prefetch(static_cast<const char *>(p), _MM_HINT_T1);
#else
  (void)p;
#endif
}

inline float exp_approx(float x) {  // 2 ulp for x <= 0; vectorizes, unlike libm's
  x = std::max(x, -87.0f);          // NaN stays NaN
  const float n = std::nearbyintf(x * 1.44269504f);
  const float r = std::fmaf(n, -0.693145751953125f, x) - n * 1.42860677e-6f;
  float p = 1.9875691e-4f;
  p = std::fmaf(p, r, 1.3981999e-3f);
  p = std::fmaf(p, r, 8.3334519e-3f);
  p = std::fmaf(p, r, 4.1665796e-2f);
  p = std::fmaf(p, r, 1.6666666e-1f);
  p = std::fmaf(p, r, 5.0000000e-1f);
  p = std::fmaf(p, r * r, r) + 1.0f;
  const float whole = std::max(-126.0f, n);  // NaN becomes -126 here: it has no integer, and p carries it on
  const uint32_t bits = uint32_t(int32_t(whole) + 127) << 23;
  float scale;
  std::memcpy(&scale, &bits, 4);
  return p * scale;
}

inline float silu(float x) {  // both branches of the exponential stay in range
  const float e = exp_approx(-std::fabs(x));
  return x >= 0.0f ? x / (1.0f + e) : x * e / (1.0f + e);
}

inline int padded(int n) { return (n + LANES - 1) / LANES * LANES; }

}  // namespace
