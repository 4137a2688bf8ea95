// Matrix products of few rows: y[n, m] = sum over k of x[n, k] w[m, k], reading every weight once.
//
// A step of a small batch is bound by reading the weights, so weights are the wide operand of the tensor cores' products
// (64 rows of w by ROWS rows of x) and stream through shared memory by TMA, STAGES boxes of 64 columns deep. The first
// boxes are asked for before the kernel waits for the one before it: weights depend on nothing, so memory stays busy
// across kernels. Roof: bytes of w over the memory's rate.
//
// Rows of w are dealt out in groups of 16, as evenly as they go: `parts` shares of rows by `splits` ranges of columns, one
// block of threads each. A block walks its columns once per pass of at most GROUPS groups.
//
// A row's bits do not depend on how many rows there are: one product adds 16 columns, in rising order, over ranges of
// columns that follow from the matrix and the GPU alone. Sums of several ranges are added by the kernel that reads them.
//
// Compile-time: ROWS (rows of x, padded to 8), GROUPS, TEAMS (warpgroups that share the rows of x; with two a thread may
// hold 192 sums, and takes the registers for them from the warpgroup that loads), STAGES, and what becomes of the sums: PARTIAL writes [splits, rows, M] float32; GATED silu(gate) * up as 16 bits [rows, M / 2], a
// group being 8 gate rows and the 8 up rows of the same places; LOGITS 16 bits [rows, M] and, per block, the largest of
// each row (NaN counts as infinite, so that it is noticed).
#include "common.cuh"
#include "wgmma.cuh"

#define TILES ((GROUPS + 3) / 4)
#define GROUP_BYTES 2048
#define WEIGHT_BYTES (GROUPS * GROUP_BYTES)
#define INPUT_BYTES (ROWS * 128)
#define STAGE_BYTES ((WEIGHT_BYTES + INPUT_BYTES + 1023) / 1024 * 1024)
#define CONSUMERS (TEAMS * 128)
#define THREADS (CONSUMERS + (TEAMS > 1 ? 128 : 32))
#define TEAM_ROWS (ROWS / TEAMS)

struct Work {
    int groups, parts, k_tiles, splits, passes, rows, width;  // width: M
};

// A block's share, unit by unit: a unit is 64 columns of a pass's rows.
struct Walk {
    int begin, count, first, last;  // groups of the block; column tiles
    int pass, k, group, size;       // size: groups of this pass
    __device__ __forceinline__ void start(const Work& work) {
        const int part = blockIdx.x / work.splits, split = blockIdx.x % work.splits;
        begin = (int)((long long)part * work.groups / work.parts);
        count = (int)((long long)(part + 1) * work.groups / work.parts) - begin;
        first = split * work.k_tiles / work.splits;
        last = (split + 1) * work.k_tiles / work.splits;
        pass = 0;
        open(work);
    }
    __device__ __forceinline__ void open(const Work& work) {
        k = first;
        group = begin + pass * count / work.passes;
        size = begin + (pass + 1) * count / work.passes - group;
    }
    __device__ __forceinline__ bool done(const Work& work) const { return pass >= work.passes; }
    __device__ __forceinline__ void next(const Work& work) {
        if (++k == last) {
            pass++;
            open(work);
        }
    }
};

// Weights lie in the order they are read in, swizzled: pass by pass of all blocks, column tile by column tile, group by group.
__device__ __forceinline__ void load_weights(u32 target, const u8* weight, const Work& work, u32 barrier, const Walk& at,
                                             u64 policy) {
    barrier_expect(barrier, at.size * GROUP_BYTES + INPUT_BYTES);
    const u64 place = (u64)at.group * work.k_tiles + (u64)at.k * at.size;
    bulk_load(target, weight + place * GROUP_BYTES, at.size * GROUP_BYTES, barrier, policy);
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    linear(const u8* __restrict__ weight, const __grid_constant__ TensorMap input, const Work work, void* __restrict__ out,
           float* __restrict__ best_value, int* __restrict__ best_index, const u64 policy) {
    extern __shared__ u8 shared_memory[];
    __shared__ alignas(8) u64 full[STAGES], empty[STAGES];
#ifdef LOGITS
    __shared__ float block_value[4][ROWS];  // the largest that each warp has seen
    __shared__ int block_index[4][ROWS];
#endif
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
#if TEAMS > 1
        asm volatile("setmaxnreg.dec.sync.aligned.u32 24;");
#endif
        if (thread != CONSUMERS) return;
        Walk at, behind;
        at.start(work);
        behind = at;
        int issued = 0;
        for (; issued < STAGES && !at.done(work); issued++, at.next(work))
            load_weights(base + issued * STAGE_BYTES, weight, work, shared_address(&full[issued]), at, policy);
        wait_for_previous();
        for (int s = 0; s < issued; s++, behind.next(work))
            tma_load_2d(base + s * STAGE_BYTES + WEIGHT_BYTES, &input, shared_address(&full[s]), behind.k * 64, 0, EVICT_LAST);
        int stage = 0;
        u32 parity = 0;
        for (; !at.done(work); at.next(work)) {
            const u32 barrier = shared_address(&full[stage]), target = base + stage * STAGE_BYTES;
            barrier_wait(shared_address(&empty[stage]), parity);
            load_weights(target, weight, work, barrier, at, policy);
            tma_load_2d(target + WEIGHT_BYTES, &input, barrier, at.k * 64, 0, EVICT_LAST);
            if (++stage == STAGES) stage = 0, parity ^= 1;
        }
        return;
    }

#if TEAMS > 1
    asm volatile("setmaxnreg.inc.sync.aligned.u32 240;");
#endif
    const int first_row = (thread >> 7) * TEAM_ROWS;
    const int warp = (thread >> 5) & 3, lane = thread & 31;
    float sums[TILES][TEAM_ROWS / 2];
#ifdef LOGITS
    for (int i = thread; i < 4 * ROWS; i += CONSUMERS)
        (&block_value[0][0])[i] = __int_as_float(0xff800000), (&block_index[0][0])[i] = 0x7fffffff;
    asm volatile("bar.sync 1, %0;" ::"n"(CONSUMERS) : "memory");
#endif
    Walk at;
    at.start(work);
    int stage = 0;
    u32 parity = 0;
    for (; !at.done(work); at.pass++, at.open(work)) {
#pragma unroll
        for (int t = 0; t < TILES; t++)
#pragma unroll
            for (int i = 0; i < TEAM_ROWS / 2; i++) sums[t][i] = 0.0f;
        for (int k = at.first; k < at.last; k++) {
            barrier_wait(shared_address(&full[stage]), parity);
            const u32 a = base + stage * STAGE_BYTES, b = a + WEIGHT_BYTES + first_row * 128;
            wgmma_fence();
#pragma unroll
            for (int step = 0; step < 4; step++)
#pragma unroll
                for (int t = 0; t < TILES; t++)  // rows beyond the pass's last are what else lies there, and not used
                    wgmma(sums[t], descriptor(a + t * 8192 + 32 * step), descriptor(b + 32 * step));
            wgmma_commit();
            if (k > at.first) {  // this box's products go on while the one before it is given back
                wgmma_wait<1>();
                if (lane == 0) barrier_arrive(shared_address(&empty[stage ? stage - 1 : STAGES - 1]));
            }
            if (++stage == STAGES) stage = 0, parity ^= 1;
        }
        wgmma_wait<0>();
        if (lane == 0) barrier_arrive(shared_address(&empty[stage ? stage - 1 : STAGES - 1]));

        // A warp holds a group; a thread its rows lane / 4 and + 8, and of each 8 rows of x two.
#ifdef LOGITS
        float top_value[TEAM_ROWS / 4];
        int top_index[TEAM_ROWS / 4];
#pragma unroll
        for (int i = 0; i < TEAM_ROWS / 4; i++) top_value[i] = __int_as_float(0xff800000), top_index[i] = 0x7fffffff;
#endif
#pragma unroll
        for (int t = 0; t < TILES; t++) {
            const int own = t * 4 + warp;
            if (own >= at.size) continue;
            const int group = at.group + own, place = group * 16 + (lane >> 2), first = first_row + 2 * (lane & 3);
#if defined(PARTIAL)
            float* target = (float*)out + ((u64)(blockIdx.x % work.splits) * work.rows + first) * work.width + place;
#elif defined(GATED)
            const int width = work.width / 2, i = group * 8 + (lane >> 2);
            u16* target = (u16*)out + (u64)first * width + i;
#elif defined(LOGITS)
            u16* target = (u16*)out + (u64)first * work.width + place;
#endif
#pragma unroll
            for (int j = 0; j < TEAM_ROWS / 8; j++) {
#pragma unroll
                for (int c = 0; c < 2; c++) {
                    if (8 * j + first + c >= work.rows) continue;
                    const float upper = sums[t][4 * j + c], lower = sums[t][4 * j + 2 + c];
#if defined(PARTIAL)
                    if (place < work.width) target[c * work.width] = upper;
                    if (place + 8 < work.width) target[c * work.width + 8] = lower;
#elif defined(GATED)
                    const float gate = rounded(upper), up = rounded(lower);
                    const float active = rounded(gate / (1.0f + __expf(-gate)));
                    if (i < width) target[c * width] = from_float(active * up);
#elif defined(LOGITS)
#pragma unroll
                    for (int half = 0; half < 2; half++) {
                        const int at_place = place + 8 * half;
                        if (at_place >= work.width) continue;
                        const u16 logit = from_float(half ? lower : upper);
                        target[c * work.width + 8 * half] = logit;
                        const float value = to_float(logit), seen = value == value ? value : __int_as_float(0x7f800000);
                        if (seen > top_value[2 * j + c]) top_value[2 * j + c] = seen, top_index[2 * j + c] = at_place;
                    }
#endif
                }
#if defined(GATED)
                target += 8 * width;
#else
                target += 8 * work.width;
#endif
            }
        }
#ifdef LOGITS
#pragma unroll
        for (int i = 0; i < TEAM_ROWS / 4; i++) {  // the lowest place of equals
#pragma unroll
            for (int step = 4; step < 32; step <<= 1) {
                const float other = __shfl_xor_sync(0xffffffffu, top_value[i], step);
                const int where = __shfl_xor_sync(0xffffffffu, top_index[i], step);
                if (other > top_value[i] || (other == top_value[i] && where < top_index[i]))
                    top_value[i] = other, top_index[i] = where;
            }
            const int n = first_row + 8 * (i / 2) + 2 * lane + (i & 1);
            if (lane < 4 && top_value[i] > block_value[warp][n])  // earlier passes have lower places
                block_value[warp][n] = top_value[i], block_index[warp][n] = top_index[i];
        }
#endif
    }
#ifdef LOGITS
    asm volatile("bar.sync 1, %0;" ::"n"(CONSUMERS) : "memory");
    for (int n = thread; n < work.rows; n += CONSUMERS) {
        float value = block_value[0][n];
        int index = block_index[0][n];
        for (int w = 1; w < 4; w++) {
            const float other = block_value[w][n];
            const int where = block_index[w][n];
            if (other > value || (other == value && where < index)) value = other, index = where;
        }
        best_value[(u64)blockIdx.x * work.rows + n] = value;
        best_index[(u64)blockIdx.x * work.rows + n] = index;
    }
#endif
}
