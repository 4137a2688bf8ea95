// The drafter's beam search, all rounds of it, as one kernel: one block per multiprocessor, barriers over the grid.
//
// A search is a chain of products of few rows. What it must read are weights, and weights depend on nothing: a warp of
// every block streams this block's share of all products of all rounds, in order, through a ring in shared memory (TMA),
// and runs ahead of the other warps across barriers and selections, so that memory stays busy while they wait. A block
// owns the same rows of a matrix in every round, which is why sums of the context and of the recurrent product stay in
// its shared memory.
//
// A round, with a barrier after each line:
//     state      s = silu(W e + (U s' + u))         U s' was computed a round earlier, for all beams
//     input      x = P [c ; s] + p                  P's context half is computed once; U s while the barrier is waited for
//     block      x = x + silu(A x + a)              per residual block
//     (factor    x = F x                            heads that are the base model's head times a small matrix)
//     head       keys of all logits, the best of each 16 and of each block's share
// and the selection (`selection.cuh`), by every block for one sequence, else by one block per sequence and a barrier.
// (Values that carry their phase's number, and readers that wait for it, were no faster than these barriers for one
// sequence and half as slow again for eight: every poll is a trip to a cache that the stream of weights keeps busy.)
//
// Rounded to 16 bits where PyTorch's modules round. A row's bits do not depend on the other rows: a product's sums run
// over k in an order that follows from the matrix alone. Roof: bytes of the head once a round, and of what the L2 cache
// cannot keep, over the memory's rate.
#include "search_products.cuh"

struct Grid {
    u32* arrivals;
    u32 target;
    __device__ __forceinline__ void arrive() {
        sync();
        target += BLOCKS;
        if (threadIdx.x == 0) asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(arrivals) : "memory");
    }
    __device__ __forceinline__ void wait() {
        if (threadIdx.x == 0) {
            u32 seen = 0;
            for (u32 spins = 0; seen < target; spins++) {
                asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(seen) : "l"(arrivals) : "memory");
                if (spins > SPIN_LIMIT) asm volatile("trap;");
            }
        }
        sync();
    }
    __device__ __forceinline__ void barrier() {
        arrive();
        wait();
    }
    // The last block out leaves the counters as the next launch needs them.
    __device__ __forceinline__ void leave() {
        if (threadIdx.x == 0) {
            u32 before;
            asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], 1;" : "=r"(before) : "l"(arrivals + 1) : "memory");
            if (before == BLOCKS - 1) arrivals[0] = 0, arrivals[1] = 0;
        }
    }
};

// Logits of this block's tiles as keys, a tile per warp.
__device__ __forceinline__ void head_keys(const Search& search, Ring& ring, Shared& shared, int rows, const Input& input) {
    constexpr int BLOCKS_OF_K = HEAD_COLUMNS / 64, CHUNKS = (BLOCKS_OF_K + HEAD_DEPTH - 1) / HEAD_DEPTH;
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3, row = tile_row(lane);
    constexpr int PARTS = HEAD_COLUMNS / 8;
#pragma unroll 2
    for (int i = threadIdx.x; i < rows * PARTS; i += CONSUMERS) {
        const int n = i / PARTS, c = i - n * PARTS, k = 8 * c;
        const u16* from = k < 32 * input.split ? given_row(input, shared, n) : input.made + (u64)n * input.width - 32 * input.split;
        shared.x[c >> 2][n >> 3][((n & 7) << 2) | (c & 3)] = load16(from + k);
    }
    sync();
    const int begin = (int)((u64)TILES * blockIdx.x / BLOCKS), end = (int)((u64)TILES * (blockIdx.x + 1) / BLOCKS);
    u32 best[GROUPS];
#pragma unroll
    for (int j = 0; j < GROUPS; j++) best[j] = 0;
    const u32 x = shared_address(shared.x) + lane * 16;
    const u32 first = row * 128, flip = row & 7;
#pragma unroll 1
    for (int tile = begin + warp; tile < end; tile += WARPS) {
        float sums[2][GROUPS][4];
#pragma unroll
        for (int i = 0; i < 8 * GROUPS; i++) (&sums[0][0][0])[i] = 0.0f;
#pragma unroll 1
        for (int chunk = 0; chunk < CHUNKS; chunk++) {
            const int use = ring.use + (tile - begin) * CHUNKS + chunk;
            ring.wait_begun(use);
            ring.wait_full(use);
            const u32 w = ring.slot(use) + first;
            const int steps = 2 * min(HEAD_DEPTH, BLOCKS_OF_K - chunk * HEAD_DEPTH);
#pragma unroll 4
            for (int step = 0; step < steps; step++) {
                const u32 address = w + (step >> 1) * 2048 + (((((step & 1) << 2) | t) ^ flip) << 4);
                const uint4 a = shared16(address), b = shared16(address + 1024);
#pragma unroll
                for (int j = 0; j < GROUPS; j++) {
                    if (8 * j >= rows) continue;
                    const uint4 v = shared16(x + ((chunk * 2 * HEAD_DEPTH + step) * GROUPS + j) * 512);
                    mma(sums[0][j], a.x, b.x, a.y, b.y, v.x, v.y);
                    mma(sums[1][j], a.z, b.z, a.w, b.w, v.z, v.w);
                }
            }
            ring.release(use, WARPS);
        }
        const int place = tile * 16 + row;
#pragma unroll
        for (int j = 0; j < GROUPS; j++) {
            if (8 * j >= rows) continue;
            const int n = 8 * j + 2 * t;
            u32 key[4];
#pragma unroll
            for (int c = 0; c < 4; c++) {
                const bool real = WIDTH % 16 == 0 || place + (c & 2) * 4 < WIDTH;
                key[c] = real ? key_of(from_float(sums[0][j][c] + sums[1][j][c])) : 0;
                u16* target = search.keys + (u64)(n + (c & 1)) * (16 * PITCH) + place + (c & 2) * 4;
                if (n + (c & 1) < rows) *target = (u16)key[c];
            }
            u32 top = __vmaxu2(key[0] | key[1] << 16, key[2] | key[3] << 16);
            top = __vmaxu2(top, __shfl_xor_sync(0xffffffffu, top, 4));
            top = __vmaxu2(top, __shfl_xor_sync(0xffffffffu, top, 8));
            top = __vmaxu2(top, __shfl_xor_sync(0xffffffffu, top, 16));
            if (g == 0 && n < rows) search.tile_best[(u64)n * PITCH + tile] = (u16)top;
            if (g == 1 && n + 1 < rows) search.tile_best[(u64)(n + 1) * PITCH + tile] = (u16)(top >> 16);
            best[j] = __vmaxu2(best[j], top);
        }
    }
    ring.use += (end - begin) * CHUNKS;
#pragma unroll
    for (int j = 0; j < GROUPS; j++)
        if (g == 0) *(u32*)&shared.warp_best[warp][8 * j + 2 * t] = best[j];
    sync();
#pragma unroll 1
    for (int n = threadIdx.x; n < rows; n += CONSUMERS) {
        u32 top = 0;
#pragma unroll
        for (int w = 0; w < WARPS; w++) top = max(top, (u32)shared.warp_best[w][n]);
        search.block_best[n * BLOCKS + blockIdx.x] = (u16)top;
    }
}

__device__ __forceinline__ void stream_all(const Search& search, Ring& ring) {
    const u64 kept = search.kept, streamed = search.streamed;
    constexpr int H = HIDDEN / 64, E = EXIT / 64;
#ifdef INPUT
    stream<EXIT, EXIT_TILES, EXIT_HEIGHT, INPUT_DEPTH, H>(ring, &search.input, 0, kept);
#endif
#pragma unroll 1
    for (int round = 0; round < LENGTH; round++) {
#ifdef RECURRENT
        stream<HIDDEN, STATE_TILES, STATE_HEIGHT, STATE_DEPTH, H>(ring, &search.state_w, 0, kept);
#endif
#ifdef INPUT
        stream<EXIT, EXIT_TILES, EXIT_HEIGHT, INPUT_DEPTH, H>(ring, &search.input, H, kept);
#endif
#ifdef RECURRENT
        if (round + 1 < LENGTH)
            stream<HIDDEN, STATE_TILES, STATE_HEIGHT, STATE_DEPTH, H>(ring, &search.state_u, 0, kept);
#endif
#pragma unroll 1
        for (int layer = 0; layer < LAYERS; layer++)
            stream<EXIT, EXIT_TILES, EXIT_HEIGHT, EXIT_DEPTH, E>(ring, &search.layers[layer], 0, kept);
#ifdef FACTOR
        stream<HEAD_COLUMNS, FACTOR_TILES, FACTOR_HEIGHT, FACTOR_DEPTH, E>(ring, &search.factor, 0, kept);
#endif
        const int begin = (int)((u64)TILES * blockIdx.x / BLOCKS), end = (int)((u64)TILES * (blockIdx.x + 1) / BLOCKS);
#pragma unroll 1
        for (int tile = begin; tile < end; tile++)
#pragma unroll 1
            for (int k = 0; k < HEAD_COLUMNS / 64; k += HEAD_DEPTH)
                ring.load(&search.head, 2048 * HEAD_DEPTH, tile * 16, k, tile - begin < search.kept_tiles ? EVICT_LAST : streamed);
    }
}

// One step of all sequences: the head's keys, and what the next step adds to its state.
__device__ __forceinline__ void round_keys(const Search& search, Ring& ring, Shared& shared, Grid& grid, const int round) {
    constexpr int H = HIDDEN / 64, E = EXIT / 64;
    const int rows = round ? search.batch * BEAMS : search.batch, share = round ? BEAMS : 1;
    u16* const states = search.states + (u64)(round & 1) * ROWS * HIDDEN;
    const auto features_of = [&](int layer) { return search.features + (u64)(layer & 1) * ROWS * EXIT; };
    const Input state{nullptr, states, 0, HIDDEN, 1};
#ifdef RECURRENT
    product<HIDDEN, STATE_TILES, STATE_HEIGHT, STATE_DEPTH, H>(
        ring, shared, rows, Input{search.embedding, nullptr, 2 * H, 0, 0}, [&](int n, int own, int place, float sum) {
            const float before = round ? shared.recurrent[shared.now[n].source][own] : shared.state_bias[own];
            states[n * HIDDEN + place] = from_float(silu(rounded(rounded(sum) + before)));
        });
#else
#pragma unroll 1
    for (int i = blockIdx.x * CONSUMERS + threadIdx.x; i < rows * HIDDEN; i += BLOCKS * CONSUMERS) {
        const int n = i / HIDDEN, k = i - n * HIDDEN;
        const u16* old = search.states + ((u64)(~round & 1) * ROWS + shared.now[n].source) * HIDDEN + k;
        const u16 embedded = search.embedding[(u64)shared.now[n].token * HIDDEN + k];
        states[i] = from_float(to_float(embedded) + (round ? to_float(load2(old)) : 0.0f));
    }
#endif
    grid.barrier();
#ifdef INPUT
    product<EXIT, EXIT_TILES, EXIT_HEIGHT, INPUT_DEPTH, H>(
        ring, shared, rows, state, [&](int n, int own, int place, float sum) {
            const float x = rounded(shared.context[n / share][own] + sum + shared.input_bias[own]);
            shared.residual[n][own] = x;
            features_of(0)[n * EXIT + place] = from_float(x);
        });
    grid.arrive();
#endif
#ifdef RECURRENT
    if (round + 1 < LENGTH)
        product<HIDDEN, STATE_TILES, STATE_HEIGHT, STATE_DEPTH, H>(
            ring, shared, rows, state, [&](int n, int own, int place, float sum) {
                shared.recurrent[n][own] = rounded(sum + shared.state_bias[own]);
            });
#endif
#ifdef INPUT
    grid.wait();
#endif
    const auto input_of = [&](int layer) {
#ifndef INPUT
        if (layer == 0) return Input{search.contexts, states, 2 * H, HIDDEN, share};
#endif
        return Input{nullptr, features_of(layer), 0, EXIT, 1};
    };
#pragma unroll 1
    for (int layer = 0; layer < LAYERS; layer++) {
        product<EXIT, EXIT_TILES, EXIT_HEIGHT, EXIT_DEPTH, E>(
            ring, shared, rows, input_of(layer), [&](int n, int own, int place, float sum) {
                const float active = silu(rounded(sum + shared.layer_bias[layer][own]));
                float old = shared.residual[n][own];
#ifndef INPUT
                if (layer == 0)
                    old = place < HIDDEN ? to_float(search.contexts[n / share * HIDDEN + place])
                                         : to_float(load2(states + n * HIDDEN + place - HIDDEN));
#endif
                const float x = rounded(old + active);
                shared.residual[n][own] = x;
                features_of(layer + 1)[n * EXIT + place] = from_float(x);
            });
        grid.barrier();
    }
#ifdef FACTOR
    product<HEAD_COLUMNS, FACTOR_TILES, FACTOR_HEIGHT, FACTOR_DEPTH, E>(
        ring, shared, rows, input_of(LAYERS), [&](int n, int own, int place, float sum) {
            search.factored[n * HEAD_COLUMNS + place] = from_float(sum);
        });
    grid.barrier();
    head_keys(search, ring, shared, rows, Input{nullptr, search.factored, 0, HEAD_COLUMNS, 1});
#else
    head_keys(search, ring, shared, rows, input_of(LAYERS));
#endif
    grid.barrier();
}

// The next beams: by every block where there is one sequence, else by one block per sequence.
__device__ __forceinline__ void next_beams(const Search& search, Shared& shared, Grid& grid, const int round) {
    const int count = round ? BEAMS : 1;
    const bool more = round + 1 < LENGTH;
    Beam* out = shared.history[round];
#if BATCH == 1
    if (more || blockIdx.x == 0) select(search, shared.candidates, shared.selection, shared.now, 0, count, more, out);
    sync();
#pragma unroll 1
    for (int n = threadIdx.x; n < ROWS; n += CONSUMERS) shared.now[n] = out[n];
    sync();
#else
#pragma unroll 1
    for (int b = blockIdx.x; b < search.batch; b += BLOCKS) {
        select(search, shared.candidates, shared.selection, shared.now, b * count, count, more, out + b * BEAMS);
        sync();
#pragma unroll 1
        for (int i = threadIdx.x; i < BEAMS; i += CONSUMERS) {
            const Beam beam = out[b * BEAMS + i];
            search.beams[b * BEAMS + i] = make_int4(beam.token, beam.source, __float_as_int(beam.score), 0);
        }
    }
    if (!more) {
        sync();
        return;
    }
    grid.barrier();
#pragma unroll 1
    for (int n = threadIdx.x; n < search.batch * BEAMS; n += CONSUMERS) {
        const uint4 beam = load16(search.beams + n);
        shared.now[n].token = beam.x, shared.now[n].source = beam.y, shared.now[n].score = __int_as_float(beam.z);
    }
    sync();
#endif
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) search(const __grid_constant__ Search search) {
    extern __shared__ u8 shared_memory[];
    __shared__ alignas(8) u64 full[STAGES], empty[STAGES];
    __shared__ int issued;
    const u32 start = shared_address(shared_memory), padding = (1024 - (start & 1023)) & 1023;
    Shared& shared = *(Shared*)(shared_memory + padding + STAGES * SLOT);
    const int thread = threadIdx.x;
    if (thread == 0) {
        issued = 0;
        for (int s = 0; s < STAGES; s++) {
            barrier_init(shared_address(&full[s]), 1);
            barrier_init(shared_address(&empty[s]), WARPS);
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();
    Ring ring{start + padding, shared_address(full), shared_address(empty), shared_address(&issued), 0};
    if (thread >= CONSUMERS) {
        if (thread == CONSUMERS) stream_all(search, ring);
        return;
    }
#pragma unroll 1
    for (int i = thread; i < (int)sizeof(Shared) / 4; i += CONSUMERS) ((u32*)&shared)[i] = 0;  // whatever logits hold, indices are some
    sync();
#pragma unroll 1
    for (int i = thread; i < STATE_ROWS; i += CONSUMERS) {
        const int place = blockIdx.x * STATE_ROWS + i;
        shared.state_bias[i] = search.state_bias && place < HIDDEN ? to_float(search.state_bias[place]) : 0.0f;
    }
#pragma unroll 1
    for (int i = thread; i < EXIT_ROWS; i += CONSUMERS) {
        const int place = blockIdx.x * EXIT_ROWS + i;
        shared.input_bias[i] = search.input_bias && place < EXIT ? to_float(search.input_bias[place]) : 0.0f;
        for (int layer = 0; layer < LAYERS; layer++)
            shared.layer_bias[layer][i] = place < EXIT ? to_float(search.layer_bias[layer * EXIT + place]) : 0.0f;
    }
    wait_for_previous();
#pragma unroll 1
    for (int n = thread; n < search.batch; n += CONSUMERS) {
        shared.now[n].token = (int)search.roots[n];
        shared.now[n].source = n, shared.now[n].score = 0.0f;
    }
    sync();
    Grid grid{search.arrivals, 0};
#ifdef INPUT
    product<EXIT, EXIT_TILES, EXIT_HEIGHT, INPUT_DEPTH, HIDDEN / 64>(
        ring, shared, search.batch, Input{search.contexts, nullptr, HIDDEN / 32, 0, 1},
        [&](int n, int own, int place, float sum) { shared.context[n][own] = sum; });
#endif
#pragma unroll 1
    for (int round = 0; round < LENGTH; round++) {
        round_keys(search, ring, shared, grid, round);
        next_beams(search, shared, grid, round);
    }
    // Each beam's path, from its end.
#pragma unroll 1
    for (int b = blockIdx.x; b < search.batch; b += BLOCKS)
#pragma unroll 1
        for (int k = thread; k < BEAMS; k += CONSUMERS) {
            const u64 target = (u64)(b * BEAMS + k) * (LENGTH + 1);
            int n = b * BEAMS + k;
#pragma unroll 1
            for (int round = LENGTH - 1; round >= 0; round--) {
                const Beam beam = shared.history[round][n];
                search.tokens[target + round + 1] = beam.token;
                search.path_scores[target + round + 1] = beam.score;
                n = beam.source;
            }
            search.tokens[target] = search.roots[b];
            search.path_scores[target] = 0.0f;
        }
    grid.leave();
}
