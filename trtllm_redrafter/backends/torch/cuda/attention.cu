// Attention of token trees over a KV cache, in three kernels: store, attend, combine.
//
// Each row of a pass is a node of a tree. It sees its sequence's committed positions, its ancestors and itself. Its
// sequence of keys is cut into blocks of 32 positions, counted from 0. A block that is committed as a whole is the same
// for all nodes of a tree: it is read once, for 16 rows of queries at a time (the query heads that share a KV head, of
// as many nodes as fit). The last blocks, which hold drafted positions, are gathered node by node. Either way a block
// comes to the same numbers by the same operations, and blocks are added in one order: four make a segment, segments
// follow each other. So a token's bits depend neither on whether it was drafted nor on its neighbours.
//
// Roof: the committed keys and values once per layer (L2 serves further tiles of rows).
//
// Compile-time: D head size (a multiple of 64), HEADS, KV_HEADS, PATH (longest path, root included), CHAIN (a prompt: each node's
// parent is the one before it), HAS_NORM (Qwen3's head norms).
#include "common.cuh"

#define GROUP (HEADS / KV_HEADS)
#define BLOCK 32
#define WARPS 4
#define SEGMENT (BLOCK * WARPS)
#define TAILS (1 + (PATH + BLOCK - 2) / BLOCK)  // blocks that can hold positions of this pass
#ifdef CHAIN
#define ANCESTOR(row, depth) (depth)
#else
#define ANCESTOR(row, depth) pass.paths[(row) * PATH + (depth)]
#endif
#define ROW_BYTES (D * 2)
#define CHUNKS (D / 8)
#define WARP_BYTES (2 * BLOCK * ROW_BYTES)
#define LOWEST __int_as_float(0xff800000)

// The rows of a pass. All arrays lie in one buffer of integers that the host fills; a chain has no paths.
struct Pass {
    const long long *sequence, *depths, *paths;  // [R] (-1: padding), [R], [R, PATH]
    const long long *slots, *bases, *first;      // [B], [B] committed positions, [B + 1] first row
    long long capacity;
};

// Sum the product's partial results, add the bias, norm and rotate heads; queries go to a buffer, keys and values to the cache.
extern "C" __global__ void __launch_bounds__(512)
    store(const float* __restrict__ partial, const int splits, const u16* __restrict__ bias, const u16* __restrict__ q_weight,
          const u16* __restrict__ k_weight, const float epsilon, const u16* __restrict__ cosine, const u16* __restrict__ sine,
          const Pass pass, u16* __restrict__ query, u16* __restrict__ keys, u16* __restrict__ values) {
    const int row = blockIdx.x, rows = gridDim.x, lane = threadIdx.x & 31;
    const int head = blockIdx.y * (blockDim.x >> 5) + (threadIdx.x >> 5);
    launch_next();
    // Everything but the sums is there already.
    const long long sequence = pass.sequence[row];
    if (head >= HEADS + 2 * KV_HEADS || sequence < 0) {
        wait_for_previous();
        return;
    }
    const long long base = pass.bases[sequence], position = base + pass.depths[row];
    const bool turns = head < HEADS + KV_HEADS;
    u16* target = query + ((u64)row * HEADS + head) * D;
    if (head >= HEADS) {
        const int kv = (head - HEADS) % KV_HEADS;
        const long long place = base + row - pass.first[sequence];
        target = (turns ? keys : values) + ((pass.slots[sequence] * KV_HEADS + kv) * pass.capacity + place) * D;
    }
    float low[D / 64], high[D / 64], c[D / 64], s[D / 64], low_bias[D / 64], high_bias[D / 64];
#pragma unroll
    for (int i = 0; i < D / 64; i++) {
        const u64 angle = (u64)position * D + i * 32 + lane;
        const int column = head * D + i * 32 + lane;
        c[i] = turns ? to_float(cosine[angle]) : 1.0f, s[i] = turns ? to_float(sine[angle]) : 0.0f;
        low_bias[i] = bias ? to_float(bias[column]) : 0.0f, high_bias[i] = bias ? to_float(bias[column + D / 2]) : 0.0f;
    }
#ifdef HAS_NORM
    float low_gain[D / 64], high_gain[D / 64];
#pragma unroll
    for (int i = 0; i < D / 64; i++) {
        const u16* weight = (head < HEADS ? q_weight : k_weight) + i * 32 + lane;
        low_gain[i] = to_float(weight[0]), high_gain[i] = to_float(weight[D / 2]);
    }
#endif
    wait_for_previous();
#pragma unroll
    for (int i = 0; i < D / 64; i++) {
        float a = 0.0f, b = 0.0f;
        const float* source = partial + (u64)row * ((HEADS + 2 * KV_HEADS) * D) + head * D + i * 32 + lane;
#pragma unroll 4
        for (int part = 0; part < splits; part++, source += (u64)rows * ((HEADS + 2 * KV_HEADS) * D))
            a += source[0], b += source[D / 2];
        low[i] = rounded(a + low_bias[i]), high[i] = rounded(b + high_bias[i]);
    }
    if (turns) {
#ifdef HAS_NORM
        float square = 0.0f;
#pragma unroll
        for (int i = 0; i < D / 64; i++) square += low[i] * low[i] + high[i] * high[i];
        const float scale = rsqrtf(warp_sum(square) / D + epsilon);
#pragma unroll
        for (int i = 0; i < D / 64; i++) low[i] *= scale * low_gain[i], high[i] *= scale * high_gain[i];
#endif
#pragma unroll
        for (int i = 0; i < D / 64; i++) {
            const float a = low[i], b = high[i];
            low[i] = a * c[i] - b * s[i], high[i] = b * c[i] + a * s[i];
        }
    }
#pragma unroll
    for (int i = 0; i < D / 64; i++) {
        target[i * 32 + lane] = from_float(low[i]);
        target[i * 32 + lane + D / 2] = from_float(high[i]);
    }
}

__device__ __forceinline__ u32 chunk_address(u32 base, int row, int chunk) {
    return base + row * ROW_BYTES + ((chunk ^ (row & 7)) << 4);
}
__device__ __forceinline__ void copy_chunk(u32 target, const void* source) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(target), "l"(source) : "memory");
}
__device__ __forceinline__ void ldmatrix(u32 (&r)[4], u32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address));
}
__device__ __forceinline__ void ldmatrix_transposed(u32 (&r)[4], u32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address));
}
__device__ __forceinline__ void mma(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." MMA_TYPE "." MMA_TYPE ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
__device__ __forceinline__ float exp2_(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// Sixteen query rows of a KV head, `first` on; a row is a node and one of its GROUP heads.
struct Rows {
    const u16* query;
    int count;  // rows there are
    __device__ __forceinline__ const u16* at(int row) const { return query + ((u64)(row / GROUP) * HEADS + row % GROUP) * D; }
    __device__ __forceinline__ void load(u32 (&q)[D / 16][4], int first) const {
        const int lane = threadIdx.x & 31, r = first + (lane >> 2), c = 2 * (lane & 3);
        const u16 *upper = at(r < count ? r : 0), *lower = at(r + 8 < count ? r + 8 : 0);
#pragma unroll
        for (int k = 0; k < D / 16; k++) {
            q[k][0] = *(const u32*)(upper + 16 * k + c);
            q[k][1] = *(const u32*)(lower + 16 * k + c);
            q[k][2] = *(const u32*)(upper + 16 * k + 8 + c);
            q[k][3] = *(const u32*)(lower + 16 * k + 8 + c);
        }
    }
};

// A warp's block: sixteen query rows over `valid` of 32 keys and values in shared memory. Maxima are in units of log2.
struct State {
    float out[D / 8][4], top[2], sum[2];
    __device__ __forceinline__ void attend(const u32 (&q)[D / 16][4], u32 keys, u32 values, int valid, float scale) {
        const int lane = threadIdx.x & 31;
        float s[4][4];
#pragma unroll
        for (int j = 0; j < 4; j++) s[j][0] = s[j][1] = s[j][2] = s[j][3] = 0.0f;
#pragma unroll
        for (int k = 0; k < D / 16; k++)
#pragma unroll
            for (int pair = 0; pair < 2; pair++) {
                u32 b[4];
                ldmatrix(b, chunk_address(keys, pair * 16 + (lane >> 4) * 8 + (lane & 7), 2 * k + ((lane >> 3) & 1)));
                mma(s[2 * pair], q[k], b[0], b[1]);
                mma(s[2 * pair + 1], q[k], b[2], b[3]);
            }
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float most = LOWEST;
#pragma unroll
            for (int j = 0; j < 4; j++)
#pragma unroll
                for (int c = 0; c < 2; c++) {
                    float& x = s[j][2 * half + c];
                    x = 8 * j + 2 * (lane & 3) + c < valid ? x * scale : LOWEST;
                    most = fmaxf(most, x);
                }
            most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, 1));
            most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, 2));
            float total = 0.0f;
#pragma unroll
            for (int j = 0; j < 4; j++)
#pragma unroll
                for (int c = 0; c < 2; c++) {
                    float& x = s[j][2 * half + c];
                    x = exp2_(x - most);
                    total += x;
                }
            total += __shfl_xor_sync(0xffffffffu, total, 1);
            total += __shfl_xor_sync(0xffffffffu, total, 2);
            top[half] = most, sum[half] = total;
        }
#pragma unroll
        for (int n = 0; n < D / 8; n++) out[n][0] = out[n][1] = out[n][2] = out[n][3] = 0.0f;
#pragma unroll
        for (int k = 0; k < 2; k++) {
            const u32 a[4] = {pack(s[2 * k][0], s[2 * k][1]), pack(s[2 * k][2], s[2 * k][3]),
                              pack(s[2 * k + 1][0], s[2 * k + 1][1]), pack(s[2 * k + 1][2], s[2 * k + 1][3])};
#pragma unroll
            for (int n = 0; n < D / 16; n++) {
                u32 b[4];
                ldmatrix_transposed(b, chunk_address(values, k * 16 + ((lane >> 3) & 1) * 8 + (lane & 7), 2 * n + (lane >> 4)));
                mma(out[2 * n], a, b[0], b[1]);
                mma(out[2 * n + 1], a, b[2], b[3]);
            }
        }
    }
};

// Two parts of one row's attention become one: the order of the arguments is the order of positions.
__device__ __forceinline__ void fold(float& top, float& sum, float& out, float other_top, float other_sum, float other_out) {
    const float most = fmaxf(top, other_top), mine = exp2_(top - most), theirs = exp2_(other_top - most);
    sum = __fmaf_rn(other_sum, theirs, __fmul_rn(sum, mine));
    out = __fmaf_rn(other_out, theirs, __fmul_rn(out, mine));
    top = most;
}

// parts: [segments + TAILS, R, HEADS, D] float32; weights: (maximum, sum) of each. Grid: (segments x row groups + tails, KV heads, B).
extern "C" __global__ void __launch_bounds__(32 * WARPS)
    attend(const u16* __restrict__ query, const u16* __restrict__ keys, const u16* __restrict__ values, const Pass pass,
           const int rows, const int segments, const int groups, const int group_tiles, const float scale, float* __restrict__ parts,
           float2* __restrict__ weights) {
    extern __shared__ __align__(128) u8 shared_memory[];
    __shared__ float tops[WARPS][16], sums[WARPS][16];
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, kv = blockIdx.y, sequence = blockIdx.z;
    const u32 own = shared_address(shared_memory) + warp * WARP_BYTES, own_values = own + BLOCK * ROW_BYTES;
    launch_next();
    const long long first = pass.first[sequence], count = pass.first[sequence + 1] - first, base = pass.bases[sequence];
    const long long shared_blocks = base / BLOCK;
    const u64 cache = ((u64)pass.slots[sequence] * KV_HEADS + kv) * pass.capacity * D;
    if (count == 0) return;

    if (blockIdx.x < segments * groups) {
        const int segment = blockIdx.x / groups, group = blockIdx.x % groups;
        const int tiles = ((int)count * GROUP + 15) / 16, block = segment * WARPS + warp;
        if (segment * WARPS >= shared_blocks || group * group_tiles >= tiles) return;
        const bool here = block < shared_blocks;
        if (here) {  // committed in earlier steps: need not wait
            const u64 start = cache + (u64)block * BLOCK * D;
#pragma unroll 4
            for (int i = lane; i < BLOCK * CHUNKS; i += 32) {
                const int row = i / CHUNKS, chunk = i % CHUNKS;
                copy_chunk(chunk_address(own, row, chunk), keys + start + row * D + chunk * 8);
                copy_chunk(chunk_address(own_values, row, chunk), values + start + row * D + chunk * 8);
            }
        }
        asm volatile("cp.async.wait_all;" ::: "memory");
        __syncwarp();
        wait_for_previous();
        const Rows all{query + (first * HEADS + kv * GROUP) * D, (int)count * GROUP};
        // [WARPS][16][D], where the warps' keys were if no further tile needs them
        float* exchange = (float*)(shared_memory + (group_tiles == 1 ? 0 : WARPS * WARP_BYTES));
        const int pitch = group_tiles == 1 ? WARP_BYTES / 4 : 16 * D;
        for (int tile = group * group_tiles; tile < tiles && tile < (group + 1) * group_tiles; tile++) {
            u32 q[D / 16][4];
            State state;
            if (here) {
                all.load(q, tile * 16);
                state.attend(q, own, own_values, BLOCK, scale);
                __syncwarp();
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    const int r = (lane >> 2) + 8 * half;
#pragma unroll
                    for (int n = 0; n < D / 8; n++)
                        *(float2*)(exchange + warp * pitch + r * D + 8 * n + 2 * (lane & 3)) =
                            make_float2(state.out[n][2 * half], state.out[n][2 * half + 1]);
                    if ((lane & 3) == 0) tops[warp][r] = state.top[half], sums[warp][r] = state.sum[half];
                }
            }
            __syncthreads();
            const int used = shared_blocks - segment * WARPS < WARPS ? (int)(shared_blocks - segment * WARPS) : WARPS;
            for (int i = threadIdx.x; i < 16 * D; i += 32 * WARPS) {
                const int r = i / D, column = i % D, flat = tile * 16 + r;
                if (flat >= all.count) break;
                float top = tops[0][r], sum = sums[0][r], out = exchange[r * D + column];
                for (int w = 1; w < used; w++) fold(top, sum, out, tops[w][r], sums[w][r], exchange[w * pitch + r * D + column]);
                const u64 place = ((u64)segment * rows + first + flat / GROUP) * HEADS + kv * GROUP + flat % GROUP;
                parts[place * D + column] = out;
                if (column == 0) weights[place] = make_float2(top, sum);
            }
            __syncthreads();
        }
        return;
    }

    const int task = (blockIdx.x - segments * groups) * WARPS + warp, node = task / TAILS, tail = task % TAILS;
    const long long row = first + node, start = (shared_blocks + tail) * BLOCK;
    const long long last = node < count ? base + pass.depths[row] : -1;
    if (start > last) {
        wait_for_previous();
        return;
    }
    const int valid = last + 1 - start < BLOCK ? (int)(last + 1 - start) : BLOCK;
    const int committed = start >= base ? 0 : base - start < valid ? (int)(base - start) : valid;
#pragma unroll 4
    for (int i = lane; i < BLOCK * CHUNKS; i += 32) {
        const int key = i / CHUNKS, chunk = i % CHUNKS;
        if (key < committed) {
            copy_chunk(chunk_address(own, key, chunk), keys + cache + (start + key) * D + chunk * 8);
            copy_chunk(chunk_address(own_values, key, chunk), values + cache + (start + key) * D + chunk * 8);
        } else if (key >= valid) {
            asm volatile("st.shared.v4.b32 [%0], {%1, %1, %1, %1};" ::"r"(chunk_address(own, key, chunk)), "r"(0) : "memory");
            asm volatile("st.shared.v4.b32 [%0], {%1, %1, %1, %1};" ::"r"(chunk_address(own_values, key, chunk)), "r"(0) : "memory");
        }
    }
    const long long own_place = lane < committed || lane >= valid ? 0 : base + ANCESTOR(row, start + lane - base);
    wait_for_previous();
    for (int i = committed * CHUNKS; i < valid * CHUNKS; i += 32) {  // whole warps: CHUNKS is at least 8, the rest idles
        const int key = min((i + lane) / CHUNKS, valid - 1), chunk = (i + lane) % CHUNKS;
        const long long place = __shfl_sync(0xffffffffu, own_place, key);
        if (i + lane >= valid * CHUNKS) continue;
        copy_chunk(chunk_address(own, key, chunk), keys + cache + place * D + chunk * 8);
        copy_chunk(chunk_address(own_values, key, chunk), values + cache + place * D + chunk * 8);
    }
    const Rows mine{query + (row * HEADS + kv * GROUP) * D, GROUP};
    for (int tile = 0; tile < GROUP; tile += 16) {
        u32 q[D / 16][4];
        State state;
        mine.load(q, tile);
        asm volatile("cp.async.wait_all;" ::: "memory");
        __syncwarp();
        state.attend(q, own, own_values, valid, scale);
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int r = tile + (lane >> 2) + 8 * half;
            if (r >= GROUP) continue;
            const u64 place = ((u64)(segments + tail) * rows + row) * HEADS + kv * GROUP + r;
#pragma unroll
            for (int n = 0; n < D / 8; n++)
                *(float2*)(parts + place * D + 8 * n + 2 * (lane & 3)) = make_float2(state.out[n][2 * half], state.out[n][2 * half + 1]);
            if ((lane & 3) == 0) weights[place] = make_float2(state.top[half], state.sum[half]);
        }
    }
}

// Add a row's parts in the order of positions and divide by the sum. Grid: (R, KV heads); threads: a multiple of D.
extern "C" __global__ void __launch_bounds__(1024)
    combine(const float* __restrict__ parts, const float2* __restrict__ weights, const Pass pass, const int segments,
            u16* __restrict__ mixed) {
    const int row = blockIdx.x, rows = gridDim.x, kv = blockIdx.y, column = threadIdx.x % D;
    launch_next();
    const long long sequence = pass.sequence[row];
    if (sequence < 0) {
        wait_for_previous();
        return;
    }
    const long long base = pass.bases[sequence], last = base + pass.depths[row];
    const int shared_blocks = (int)(base / BLOCK), blocks = (int)(last / BLOCK) + 1;
    wait_for_previous();
    for (int g = threadIdx.x / D; g < GROUP; g += blockDim.x / D) {
        const int head = kv * GROUP + g;
        float top = LOWEST, sum = 0.0f, out = 0.0f;
        const int whole = shared_blocks / WARPS;  // segments without a gathered block
#pragma unroll 4
        for (int segment = 0; segment < whole; segment++) {
            const u64 place = ((u64)segment * rows + row) * HEADS + head;
            const float2 w = weights[place];
            fold(top, sum, out, w.x, w.y, parts[place * D + column]);
        }
        int block = shared_blocks;
        for (int segment = whole; segment * WARPS < blocks; segment++) {
            float part_top = LOWEST, part_sum = 0.0f, part_out = 0.0f;
            if (segment * WARPS < shared_blocks) {
                const u64 place = ((u64)segment * rows + row) * HEADS + head;
                const float2 w = weights[place];
                part_top = w.x, part_sum = w.y, part_out = parts[place * D + column];
            }
            for (; block < blocks && block / WARPS == segment; block++) {
                const u64 place = ((u64)(segments + block - shared_blocks) * rows + row) * HEADS + head;
                const float2 w = weights[place];
                if (part_top == LOWEST)
                    part_top = w.x, part_sum = w.y, part_out = parts[place * D + column];
                else
                    fold(part_top, part_sum, part_out, w.x, w.y, parts[place * D + column]);
            }
            if (top == LOWEST)
                top = part_top, sum = part_sum, out = part_out;
            else
                fold(top, sum, out, part_top, part_sum, part_out);
        }
        mixed[((u64)row * HEADS + head) * D + column] = from_float(out / sum);
    }
}
