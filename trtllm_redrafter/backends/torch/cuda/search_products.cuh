// The products of a drafter's search: a ring in shared memory through which weights stream, and the sums of a block's tiles.
#pragma once
#include "common.cuh"

#define ROWS (BATCH * BEAMS)
#define GROUPS ((ROWS + 7) / 8)  // of eight rows of x, as the tensor cores take them
#define CONSUMERS (WARPS * 32)
#define THREADS (CONSUMERS + 32)
#define TILES ((WIDTH + 15) / 16)  // of 16 rows of the head
#define PITCH ((TILES + 7) / 8 * 8)
#define STATE_ROWS (STATE_TILES * STATE_HEIGHT)  // rows that a block owns
#define EXIT_ROWS (EXIT_TILES * EXIT_HEIGHT)
#define FACTOR_ROWS (FACTOR_TILES * FACTOR_HEIGHT)
#define LAYER_MAPS (LAYERS ? LAYERS : 1)
#define PART_PITCH 20  // floats from one row of x to the next in partial sums: no two lanes in one bank
#ifndef SPIN_LIMIT
#define SPIN_LIMIT (1u << 26)
#endif

struct Search {
    TensorMap state_w, state_u, input, factor, head, layers[LAYER_MAPS];
    const u16 *embedding, *contexts;
    const long long* roots;
    const int* rows;  // token ids of the head's rows, or null
    const u16 *state_bias, *input_bias, *layer_bias;
    u16 *states, *features, *factored;  // [2, ROWS, HIDDEN], [2, ROWS, EXIT], [ROWS, HEAD_COLUMNS]
    u16 *keys, *tile_best, *block_best;  // [ROWS, 16 PITCH], [ROWS, PITCH], [ROWS, BLOCKS]
    int4* beams;                         // [ROWS] token, row it came from, score
    u32* arrivals;                       // [2] at the barrier, at the end
    long long* tokens;                   // [batch, BEAMS, LENGTH + 1]
    float* path_scores;
    u64 kept, streamed;  // cache policies
    int batch, kept_tiles;
};

__device__ __forceinline__ void sync() { asm volatile("bar.sync 1, %0;" ::"n"(CONSUMERS) : "memory"); }

__device__ __forceinline__ void bounded_wait(u32 barrier, u32 parity) {
    u32 done = 0;
    for (u32 spins = 0; !done; spins++) {
        asm volatile(
            "{\n.reg .pred p;\n"
            "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
            "selp.u32 %0, 1, 0, p;\n}\n"
            : "=r"(done)
            : "r"(barrier), "r"(parity)
            : "memory");
        if (spins > SPIN_LIMIT) asm volatile("trap;");
    }
}
__device__ __forceinline__ void arrive_times(u32 barrier, u32 count) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}
__device__ __forceinline__ void tma_load_3d(u32 target, const TensorMap* map, u32 barrier, int x, int y, int z, u64 policy) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint"
        " [%0], [%1, {%3, %4, %5}], [%2], %6;" ::"r"(target),
        "l"((u64)map), "r"(barrier), "r"(x), "r"(y), "r"(z), "l"(policy)
        : "memory");
}
// What other blocks wrote is read past the first-level cache.
__device__ __forceinline__ uint4 load16(const void* p) {
    uint4 v;
    asm volatile("ld.global.cg.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
    return v;
}
__device__ __forceinline__ u16 load2(const u16* p) {
    u16 v;
    asm volatile("ld.global.cg.u16 %0, [%1];" : "=h"(v) : "l"(p));
    return v;
}
// What a product multiplies: rows of `split` steps of 32 columns that were there before the search (row n is that of its
// token, or n / share), then rows made in it.
struct Input {
    const u16 *given, *made;
    int split, width, share;  // width: of a row of `made`; share 0: rows go by token
};

__device__ __forceinline__ uint4 shared16(u32 address) {
    uint4 v;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(address));
    return v;
}
__device__ __forceinline__ void mma(float (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." MMA_TYPE "." MMA_TYPE
                 ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
__device__ __forceinline__ float silu(float x) { return rounded(x / (1.0f + expf(-x))); }

#include "selection.cuh"

struct Shared {
    union {
        float part[WARPS][8 * GROUPS][PART_PITCH];
        uint4 x[HEAD_COLUMNS / 32][GROUPS][32];  // as the tensor cores' registers hold it
        Candidates candidates[SELECTED];
    };
    float recurrent[ROWS][STATE_ROWS];
    float context[BATCH][EXIT_ROWS];
    float residual[ROWS][EXIT_ROWS];
    float state_bias[STATE_ROWS], input_bias[EXIT_ROWS], layer_bias[LAYER_MAPS][EXIT_ROWS];
    u16 warp_best[WARPS][8 * GROUPS];
    Beam now[ROWS], history[LENGTH][ROWS];
    Selection selection;
};
static_assert(sizeof(Shared) <= SHARED_FIXED, "the host reserves too little shared memory");

struct Ring {
    u32 base, full, empty, issued;
    int use;
    __device__ __forceinline__ u32 slot(int n) const { return base + (n % STAGES) * SLOT; }
    __device__ __forceinline__ void wait_full(int n) const { bounded_wait(full + 8 * (n % STAGES), (n / STAGES) & 1); }
    // A barrier tells a fill from the one before it only: who has not waited for all fills asks first whether this one began.
    __device__ __forceinline__ void wait_begun(int n) const {
        int begun = 0;
        for (u32 spins = 0; begun <= n; spins++) {
            asm volatile("ld.acquire.cta.shared.s32 %0, [%1];" : "=r"(begun) : "r"(issued) : "memory");
            if (spins > SPIN_LIMIT) asm volatile("trap;");
        }
    }
    __device__ __forceinline__ void release(int n, u32 count) const {
        __syncwarp();
        if ((threadIdx.x & 31) == 0) arrive_times(empty + 8 * (n % STAGES), count);
    }
    // The producer's side.
    __device__ __forceinline__ void load(const TensorMap* map, u32 bytes, int row, int column_block, u64 policy) {
        if (use >= STAGES) bounded_wait(empty + 8 * (use % STAGES), (use / STAGES - 1) & 1);
        const u32 barrier = full + 8 * (use % STAGES);
        barrier_expect(barrier, bytes);
        tma_load_3d(slot(use), map, barrier, 0, row, column_block, policy);
        use++;
        asm volatile("st.release.cta.shared.s32 [%0], %1;" ::"r"(issued), "r"(use) : "memory");
    }
};

// How many of its tiles this block has: the last blocks may have fewer.
template <int M, int COUNT, int HEIGHT>
__device__ __forceinline__ int own_tiles() {
    const int left = M - (int)blockIdx.x * COUNT * HEIGHT;
    return left <= 0 ? 0 : min(COUNT, (left + HEIGHT - 1) / HEIGHT);
}

template <int M, int COUNT, int HEIGHT, int DEPTH, int COLUMN_BLOCKS>
__device__ __forceinline__ void stream(Ring& ring, const TensorMap* map, int first, u64 policy) {
    const int tiles = own_tiles<M, COUNT, HEIGHT>();
#pragma unroll 1
    for (int tile = 0; tile < tiles; tile++)
#pragma unroll 1
        for (int k = 0; k < COLUMN_BLOCKS; k += DEPTH)
            ring.load(map, HEIGHT * DEPTH * 128, (blockIdx.x * COUNT + tile) * HEIGHT, first + k, policy);
}

// Row of a tile that a lane's first register of w stands for: neighbours lie four rows apart, so that eight lanes read all
// banks whatever the swizzle.
__device__ __forceinline__ int tile_row(int lane) { return (lane >> 3) | ((lane & 4)); }

__device__ __forceinline__ const u16* given_row(const Input& input, const Shared& shared, int n) {
    return input.given + (u64)(input.share ? n / input.share : shared.now[n].token) * HIDDEN;
}

// Sums of one tile: w's rows by all rows of x; the warps share the columns.
template <int STEPS, int DEPTH, int HEIGHT>
__device__ __forceinline__ void tile_sums(const Ring& ring, Shared& shared, const int rows, const Input& input) {
    constexpr int MINE = (STEPS + WARPS - 1) / WARPS, MOST = GROUPS == 1 ? 5 : GROUPS == 2 ? 4 : GROUPS <= 5 ? 2 : 1;
    constexpr int AHEAD = MINE < MOST ? MINE : MOST;
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3, row = tile_row(lane);
    constexpr int CHUNKS = (STEPS + 2 * DEPTH - 1) / (2 * DEPTH);
    const u16 *given[GROUPS], *made[GROUPS];
#pragma unroll
    for (int j = 0; j < GROUPS; j++) {
        const int n = min(8 * j + g, rows - 1);
        given[j] = input.split ? given_row(input, shared, n) + 8 * t : nullptr;
        made[j] = input.made + (u64)n * input.width + 8 * t - 32 * input.split;
    }
    float sums[2][GROUPS][4];
#pragma unroll
    for (int i = 0; i < 8 * GROUPS; i++) (&sums[0][0][0])[i] = 0.0f;
    int chunk = -1;
#pragma unroll 1
    for (int first = warp; first < STEPS; first += AHEAD * WARPS) {
        uint4 x[AHEAD][GROUPS];
#pragma unroll
        for (int i = 0; i < AHEAD; i++) {
            const int step = first + i * WARPS;
#pragma unroll
            for (int j = 0; j < GROUPS; j++)
                if (step < STEPS && 8 * j < rows) x[i][j] = load16((step < input.split ? given[j] : made[j]) + 32 * step);
        }
#pragma unroll
        for (int i = 0; i < AHEAD; i++) {
            const int step = first + i * WARPS;
            if (step >= STEPS) break;
            while (chunk < step / (2 * DEPTH)) {
                if (chunk >= 0) ring.release(ring.use + chunk, 1);
                ring.wait_full(ring.use + ++chunk);
            }
            const int place = ((step >> 1) - chunk * DEPTH) * HEIGHT + row;
            const u32 address = ring.slot(ring.use + chunk) + place * 128 + (((((step & 1) << 2) | t) ^ (place & 7)) << 4);
            const uint4 a = shared16(address), b = HEIGHT > 8 ? shared16(address + 1024) : make_uint4(0, 0, 0, 0);
#pragma unroll
            for (int j = 0; j < GROUPS; j++) {
                if (8 * j >= rows) continue;
                mma(sums[0][j], a.x, b.x, a.y, b.y, x[i][j].x, x[i][j].y);
                mma(sums[1][j], a.z, b.z, a.w, b.w, x[i][j].z, x[i][j].w);
            }
        }
    }
    while (chunk < CHUNKS - 1) {
        if (chunk >= 0) ring.release(ring.use + chunk, 1);
        ring.wait_full(ring.use + ++chunk);
    }
    ring.release(ring.use + chunk, 1);
#pragma unroll
    for (int j = 0; j < GROUPS; j++) {
        if (8 * j >= rows) continue;
        float(*part)[PART_PITCH] = &shared.part[warp][8 * j + 2 * t];
#pragma unroll
        for (int c = 0; c < 2; c++) {
            part[c][row] = sums[0][j][c] + sums[1][j][c];
            if (HEIGHT > 8) part[c][row + 8] = sums[0][j][2 + c] + sums[1][j][2 + c];
        }
    }
    sync();
}

// All tiles of a product; `finish(n, own row, row, sum)` does the rest.
template <int M, int COUNT, int HEIGHT, int DEPTH, int COLUMN_BLOCKS, typename Finish>
__device__ __forceinline__ void product(Ring& ring, Shared& shared, int rows, const Input& input, Finish finish) {
    const int tiles = own_tiles<M, COUNT, HEIGHT>();
#pragma unroll 1
    for (int tile = 0; tile < tiles; tile++) {
        tile_sums<2 * COLUMN_BLOCKS, DEPTH, HEIGHT>(ring, shared, rows, input);
        ring.use += (COLUMN_BLOCKS + DEPTH - 1) / DEPTH;
#pragma unroll 1
        for (int i = threadIdx.x; i < rows * HEIGHT; i += CONSUMERS) {
            const int n = i / HEIGHT, m = i - n * HEIGHT, own = tile * HEIGHT + m;
            const int place = blockIdx.x * COUNT * HEIGHT + own;
            float sum = 0.0f;
#pragma unroll
            for (int w = 0; w < WARPS; w++) sum += shared.part[w][n][m];
            if (place < M) finish(n, own, place, sum);
        }
        sync();
    }
}
