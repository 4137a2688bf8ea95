// The token of each row's largest logit: the largest of what the blocks of the head's product found, the lowest of equals.
#include "common.cuh"

// value, index: [blocks, R]; best: [R]. One warp per row. A row whose maximum is not finite gets -1.
extern "C" __global__ void __launch_bounds__(32)
    best_token(const float* __restrict__ value, const int* __restrict__ index, const int blocks, const int rows,
               long long* __restrict__ best) {
    const int row = blockIdx.x;
    launch_next();
    wait_for_previous();
    float most = __int_as_float(0xff800000);
    int where = 0x7fffffff;
    for (int b = threadIdx.x; b < blocks; b += 32) {
        const float other = value[(u64)b * rows + row];
        const int at = index[(u64)b * rows + row];
        if (other > most || (other == most && at < where)) most = other, where = at;
    }
#pragma unroll
    for (int step = 16; step; step >>= 1) {
        const float other = __shfl_xor_sync(0xffffffffu, most, step);
        const int at = __shfl_xor_sync(0xffffffffu, where, step);
        if (other > most || (other == most && at < where)) most = other, where = at;
    }
    if (threadIdx.x == 0) best[row] = where == 0x7fffffff || most == __int_as_float(0x7f800000) ? -1 : where;
}
