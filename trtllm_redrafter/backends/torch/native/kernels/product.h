// Matrix products x W^T of a few rows with packed weights: the bulk of every step.
//
// [M, K] bfloat16 x [N, K] bfloat16 -> [M, N] float32, one accumulator per output, over k in order, whatever M is, so that
// the bits of a row do not depend on the rows beside it. With few rows the time is that of reading W once, 2 N K bytes;
// from about eight rows on, the arithmetic shows (one vdpbf16ps does 32 multiply-adds). benchmarks/profile_step.py
// measures it.
//
// A packed matrix is [ceil(N / 16)][K / 2][16][2], K even, N padded with zero rows.

#pragma once

#include "lanes.h"
#include "team.h"

namespace {

struct Packed {
  const bf16 *data = nullptr;
  int n = 0, k = 0;
  int blocks() const { return (n + LANES - 1) / LANES; }
  const bf16 *block(int b) const { return data + size_t(b) * k * LANES; }
};

// [n, k] row-major -> packed; `to` holds padded(n) * k values.
void pack(const bf16 *from, int n, int k, bf16 *to) {
  for (int b = 0; b < (n + LANES - 1) / LANES; ++b)
    for (int p = 0; p < k / 2; ++p)
      for (int j = 0; j < LANES; ++j) {
        const int row = b * LANES + j;
        uint32_t pair = 0;
        if (row < n) std::memcpy(&pair, from + size_t(row) * k + 2 * p, 4);
        std::memcpy(to + (size_t(b) * (k / 2) + p) * 2 * LANES + 2 * j, &pair, 4);
      }
}

constexpr int AHEAD = 2;  // blocks: with many rows the arithmetic hides the reads only if they are asked for early

// out[m][b][0..15] for M rows and B neighbouring blocks.
template <int M, int B>
inline void tile(const bf16 *x, int x_stride, const bf16 *w, size_t block_stride, int k, float *out, int out_stride) {
  Vec acc[M][B];
  for (int m = 0; m < M; ++m)
    for (int b = 0; b < B; ++b) acc[m][b] = zero();
  for (int p = 0; p < k / 2; ++p) {
    for (int b = 0; b < B; ++b) prefetch(w + (AHEAD + b) * block_stride + size_t(p) * 2 * LANES);
    for (int m = 0; m < M; ++m) {
      uint32_t pair;
      std::memcpy(&pair, x + size_t(m) * x_stride + 2 * p, 4);
      for (int b = 0; b < B; ++b) dot_pair(acc[m][b], w + b * block_stride + size_t(p) * 2 * LANES, pair);
    }
  }
  for (int m = 0; m < M; ++m)
    for (int b = 0; b < B; ++b) store(out + size_t(m) * out_stride + b * LANES, acc[m][b]);
}

template <int B>
inline void tiles(const bf16 *x, int x_stride, int rows, const bf16 *w, size_t block_stride, int k, float *out,
                  int out_stride) {
  int m = 0;
  for (; m + 8 <= rows; m += 8)
    tile<8, B>(x + size_t(m) * x_stride, x_stride, w, block_stride, k, out + size_t(m) * out_stride, out_stride);
  const bf16 *rest = x + size_t(m) * x_stride;
  float *o = out + size_t(m) * out_stride;
  switch (rows - m) {
    case 7: tile<7, B>(rest, x_stride, w, block_stride, k, o, out_stride); break;
    case 6: tile<6, B>(rest, x_stride, w, block_stride, k, o, out_stride); break;
    case 5: tile<5, B>(rest, x_stride, w, block_stride, k, o, out_stride); break;
    case 4: tile<4, B>(rest, x_stride, w, block_stride, k, o, out_stride); break;
    case 3: tile<3, B>(rest, x_stride, w, block_stride, k, o, out_stride); break;
    case 2: tile<2, B>(rest, x_stride, w, block_stride, k, o, out_stride); break;
    case 1: tile<1, B>(rest, x_stride, w, block_stride, k, o, out_stride); break;
    default: break;
  }
}

// out (row-major, out_stride >= 16 * blocks) for the blocks of `range`.
void product(const bf16 *x, int x_stride, int rows, const Packed &w, Range range, float *out, int out_stride) {
  const size_t stride = size_t(w.k) * LANES;
  int b = range.begin;
  for (; b + 2 <= range.end; b += 2)
    tiles<2>(x, x_stride, rows, w.block(b), stride, w.k, out + b * LANES, out_stride);
  if (b < range.end) tiles<1>(x, x_stride, rows, w.block(b), stride, w.k, out + b * LANES, out_stride);
}

}  // namespace
