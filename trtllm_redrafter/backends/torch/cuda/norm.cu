// The residual stream with a block's output added, and its RMS norm: one block of THREADS threads per row.
//
//     x += sum of partial sums (+ bias);  y = weight * (x * rsqrt(mean(x^2) + epsilon))
//
// Rounded where transformers rounds: the block's output, the sum, the scaled row and the product, each to 16 bits. With
// `tokens` the row is looked up in the embedding instead of being added to. Sums run over threads in a fixed order.
#include "common.cuh"

#define PAIRS ((WIDTH + 2 * THREADS - 1) / (2 * THREADS))  // pairs of columns per thread

extern "C" __global__ void __launch_bounds__(THREADS)
    add_norm(u16* __restrict__ residual, const float* __restrict__ partial, const int splits, const u16* __restrict__ bias,
             const u16* __restrict__ weight, u16* __restrict__ normed, const float epsilon,
             const long long* __restrict__ tokens, const u16* __restrict__ embedding) {
    const int row = blockIdx.x, rows = gridDim.x, thread = threadIdx.x;
    __shared__ float sums[THREADS / 32];
    u32 gains[PAIRS];
#pragma unroll
    for (int i = 0; i < PAIRS; i++) {
        const int pair = i * THREADS + thread;
        gains[i] = pair < WIDTH / 2 ? ((const u32*)weight)[pair] : 0;
    }
    launch_next();
    wait_for_previous();
    float2 values[PAIRS];
    float square = 0.0f;
    const u32* source = (const u32*)(tokens ? embedding + (u64)tokens[row] * WIDTH : residual + (u64)row * WIDTH);
#pragma unroll
    for (int i = 0; i < PAIRS; i++) {
        const int pair = i * THREADS + thread;
        values[i] = make_float2(0.0f, 0.0f);
        if (pair >= WIDTH / 2) continue;
        const u32 old = source[pair];
        float x = low_half(old), y = high_half(old);
        if (!tokens) {
            float2 sum = make_float2(0.0f, 0.0f);
#pragma unroll 4
            for (int s = 0; s < splits; s++) {
                const float2 part = ((const float2*)(partial + ((u64)s * rows + row) * WIDTH))[pair];
                sum.x += part.x, sum.y += part.y;
            }
            if (bias) {
                const u32 b = ((const u32*)bias)[pair];
                sum.x += low_half(b), sum.y += high_half(b);
            }
            x = rounded(x + rounded(sum.x)), y = rounded(y + rounded(sum.y));
        }
        values[i] = make_float2(x, y);
        square += x * x + y * y;
        if (residual) ((u32*)(residual + (u64)row * WIDTH))[pair] = pack(x, y);
    }
    square = warp_sum(square);
    if ((thread & 31) == 0) sums[thread >> 5] = square;
    __syncthreads();
    float total = 0.0f;
#pragma unroll
    for (int w = 0; w < THREADS / 32; w++) total += sums[w];
    const float scale = rsqrtf(total / WIDTH + epsilon);
#pragma unroll
    for (int i = 0; i < PAIRS; i++) {
        const int pair = i * THREADS + thread;
        if (pair >= WIDTH / 2) continue;
        const float x = rounded(values[i].x * scale), y = rounded(values[i].y * scale);
        ((u32*)(normed + (u64)row * WIDTH))[pair] = pack(x * low_half(gains[i]), y * high_half(gains[i]));
    }
}
