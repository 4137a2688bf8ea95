// Matrix products of few rows: y[n, m] = sum over k of x[n, k] w[m, k], reading every weight once.
//
// A step of a small batch is bound by reading the weights, so weights are the wide operand of the tensor cores' products
// (64 rows of w by ROWS rows of x) and stream through shared memory by TMA, STAGES boxes of 64 columns deep. The first
// boxes are asked for before the kernel waits for the one before it: weights depend on nothing, so memory stays busy
// across kernels. Roof: bytes of w over the memory's rate.
//
// A row's bits do not depend on how many rows there are: one product adds 16 columns, in rising order, over ranges of k
// (`splits`) that follow from the matrix alone. Partial sums of several ranges are written as float32 and added by the
// kernel that reads them.
//
// Compile-time: ROWS (rows of x, padded to 8), GROUPS (tiles of 64 weight rows per block), STAGES, and what is done with
// sums: PARTIAL writes [splits, rows, M] float32; GATED silu(gate) * up of interleaved rows as 16 bits [rows, M / 2];
// LOGITS 16 bits [rows, M] and, per block, the largest of each row.
#include "common.cuh"
#include "wgmma.cuh"

#define TILE (64 * GROUPS)
#define WEIGHT_BYTES (TILE * 128)
#define INPUT_BYTES (ROWS * 128)
#define STAGE_BYTES (WEIGHT_BYTES + INPUT_BYTES)
#define CONSUMERS (GROUPS * 128)
#define THREADS (CONSUMERS + 32)

struct Work {
    int tiles, k_tiles, splits, rows, width;  // width: M
};

// Walks a block's share: items blockIdx.x, + gridDim.x, ...; each a tile of rows of w and a range of its columns.
struct Walk {
    int item, k, end, tile, split;
    __device__ __forceinline__ void start(const Work& work, int first) {
        item = first;
        open(work);
    }
    __device__ __forceinline__ void open(const Work& work) {
        tile = item / work.splits;
        split = item - tile * work.splits;
        k = split * work.k_tiles / work.splits;
        end = (split + 1) * work.k_tiles / work.splits;
    }
    __device__ __forceinline__ bool done(const Work& work) const { return item >= work.tiles * work.splits; }
    __device__ __forceinline__ void next(const Work& work) {
        if (++k == end) {
            item += gridDim.x;
            open(work);
        }
    }
};

__device__ __forceinline__ void load_weights(u32 target, const TensorMap* map, u32 barrier, const Walk& at, u64 policy) {
#ifdef GATED
    tma_load_4d(target, map, barrier, at.k * 64, 0, 0, at.tile * (TILE / 16), policy);
#else
    tma_load_2d(target, map, barrier, at.k * 64, at.tile * TILE, policy);
#endif
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    linear(const __grid_constant__ TensorMap weight, const __grid_constant__ TensorMap input, const Work work,
           void* __restrict__ out, float* __restrict__ best_value, int* __restrict__ best_index, const u64 policy) {
    extern __shared__ u8 shared_memory[];
    __shared__ alignas(8) u64 full[STAGES], empty[STAGES];
    const u32 base = (shared_address(shared_memory) + 1023u) & ~1023u;
    const int thread = threadIdx.x;
    if (thread == 0) {
        for (int s = 0; s < STAGES; s++) {
            barrier_init(shared_address(&full[s]), 1);
            barrier_init(shared_address(&empty[s]), CONSUMERS / 32);
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();
    launch_next();

    if (thread >= CONSUMERS) {
        if (thread != CONSUMERS) return;
        prefetch_map(&weight);
        prefetch_map(&input);
        Walk at, behind;
        at.start(work, blockIdx.x);
        behind = at;
        int issued = 0;
        for (; issued < STAGES && !at.done(work); issued++, at.next(work)) {
            const u32 barrier = shared_address(&full[issued]);
            barrier_expect(barrier, STAGE_BYTES);
            load_weights(base + issued * STAGE_BYTES, &weight, barrier, at, policy);
        }
        wait_for_previous();
        for (int s = 0; s < issued; s++, behind.next(work))
            tma_load_2d(base + s * STAGE_BYTES + WEIGHT_BYTES, &input, shared_address(&full[s]), behind.k * 64, 0,
                        EVICT_LAST);
        int stage = 0;
        u32 parity = 0;
        for (; !at.done(work); at.next(work)) {
            const u32 barrier = shared_address(&full[stage]), target = base + stage * STAGE_BYTES;
            barrier_wait(shared_address(&empty[stage]), parity);
            barrier_expect(barrier, STAGE_BYTES);
            load_weights(target, &weight, barrier, at, policy);
            tma_load_2d(target + WEIGHT_BYTES, &input, barrier, at.k * 64, 0, EVICT_LAST);
            if (++stage == STAGES) stage = 0, parity ^= 1;
        }
        return;
    }

    const int group = thread >> 7, warp = (thread >> 5) & 3, lane = thread & 31;
    float sums[ROWS / 2];
#ifdef LOGITS
    float top_value[ROWS / 4];
    int top_index[ROWS / 4];
#pragma unroll
    for (int i = 0; i < ROWS / 4; i++) top_value[i] = __int_as_float(0xff800000), top_index[i] = 0x7fffffff;
#endif
    Walk at;
    at.start(work, blockIdx.x);
    int stage = 0;
    u32 parity = 0;
    while (!at.done(work)) {
        const int tile = at.tile, split = at.split, count = at.end - at.k;
#pragma unroll
        for (int i = 0; i < ROWS / 2; i++) sums[i] = 0.0f;
        for (int i = 0; i < count; i++) {
            barrier_wait(shared_address(&full[stage]), parity);
            const u32 a = base + stage * STAGE_BYTES + group * 8192, b = base + stage * STAGE_BYTES + WEIGHT_BYTES;
            wgmma_fence();
#pragma unroll
            for (int k = 0; k < 4; k++) wgmma(sums, descriptor(a + 32 * k), descriptor(b + 32 * k));
            wgmma_commit();
            wgmma_wait();
            if (lane == 0) barrier_arrive(shared_address(&empty[stage]));
            if (++stage == STAGES) stage = 0, parity ^= 1;
        }
        at.item += gridDim.x;
        at.open(work);

        // Thread holds weight rows m and m + 8, and of each 8 rows of x two.
        const int place = tile * TILE + group * 64 + warp * 16 + (lane >> 2), first = 2 * (lane & 3);
#pragma unroll
        for (int j = 0; j < ROWS / 8; j++)
#pragma unroll
            for (int c = 0; c < 2; c++) {
                const int n = 8 * j + first + c;
                if (n >= work.rows) continue;
                const float upper = sums[4 * j + c], lower = sums[4 * j + 2 + c];
#if defined(PARTIAL)
                float* target = (float*)out + ((u64)split * work.rows + n) * work.width;
                if (place < work.width) target[place] = upper;
                if (place + 8 < work.width) target[place + 8] = lower;
#elif defined(GATED)
                const int i = (tile * TILE + group * 64 + warp * 16) / 2 + (lane >> 2);
                const float gate = rounded(upper), up = rounded(lower);
                const float active = rounded(gate / (1.0f + __expf(-gate)));
                if (i < work.width / 2) ((u16*)out)[(u64)n * (work.width / 2) + i] = from_float(active * up);
#elif defined(LOGITS)
                u16* target = (u16*)out + (u64)n * work.width;
                const u16 high = from_float(upper), low = from_float(lower);
                if (place < work.width) {
                    target[place] = high;
                    if (to_float(high) > top_value[2 * j + c]) top_value[2 * j + c] = to_float(high), top_index[2 * j + c] = place;
                }
                if (place + 8 < work.width) {
                    target[place + 8] = low;
                    if (to_float(low) > top_value[2 * j + c]) top_value[2 * j + c] = to_float(low), top_index[2 * j + c] = place + 8;
                }
#endif
            }
    }
#ifdef LOGITS
    // The largest of the block's share, the lowest place of equals.
    __shared__ float block_value[GROUPS * 4][ROWS];
    __shared__ int block_index[GROUPS * 4][ROWS];
#pragma unroll
    for (int i = 0; i < ROWS / 4; i++) {
#pragma unroll
        for (int step = 4; step < 32; step <<= 1) {
            const float other = __shfl_xor_sync(0xffffffffu, top_value[i], step);
            const int where = __shfl_xor_sync(0xffffffffu, top_index[i], step);
            if (other > top_value[i] || (other == top_value[i] && where < top_index[i])) top_value[i] = other, top_index[i] = where;
        }
        if (lane < 4) {
            const int n = 8 * (i / 2) + 2 * lane + (i & 1);
            block_value[group * 4 + warp][n] = top_value[i];
            block_index[group * 4 + warp][n] = top_index[i];
        }
    }
    asm volatile("bar.sync 1, %0;" ::"n"(CONSUMERS) : "memory");
    for (int n = thread; n < work.rows; n += CONSUMERS) {
        float value = block_value[0][n];
        int index = block_index[0][n];
        for (int w = 1; w < GROUPS * 4; w++) {
            const float other = block_value[w][n];
            const int where = block_index[w][n];
            if (other > value || (other == value && where < index)) value = other, index = where;
        }
        best_value[(u64)blockIdx.x * work.rows + n] = value;
        best_index[(u64)blockIdx.x * work.rows + n] = index;
    }
#endif
}
