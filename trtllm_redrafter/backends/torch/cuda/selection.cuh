// One round's choice of beams from the logits of a sequence's rows, exactly as `beam_search` makes it, without a sort.
//
// Logits come as keys: unsigned integers of 16 bits in the logits' order. The 50th largest of the blocks' best is a lower
// bound of the 50th largest logit, and few tiles of 16 hold anything above it: those are looked through, and of the few
// dozen candidates those within the cut are counted out. Where that finds too many (logits that tie in their
// hundreds), the threshold is searched for bit by bit among all logits.
//
// Sums run in falling order of the logits and choices by rank, so the result does not depend on the order of threads.
#pragma once

#define TOP 50
#define MAX_CANDIDATES 256  // per row; with more the slow way is taken
#define SELECTED (BEAMS < 6 ? BEAMS : 6)  // rows looked at together: a warp for each, and one at least beside

struct Beam {
    int token, source;  // source: the row of this round that it continues
    float score;
};

struct Candidates {
    union {
        alignas(16) u32 keys[MAX_CANDIDATES + 4];  // key and, falling, place; zeros behind the last
        u64 order[MAX_CANDIDATES];                 // total and token of each kept candidate, by falling logit
    };
    u32 sorted[MAX_CANDIDATES];
    int tokens[MAX_CANDIDATES];
    u16 tiles[MAX_CANDIDATES];
    __device__ __forceinline__ void put(int place, u32 key, int token) {
        keys[place] = key << 16 | (0xffffu - place), tokens[place] = token;
    }
    __device__ __forceinline__ int token_of(u32 sorted_key) const { return tokens[0xffffu - (sorted_key & 0xffffu)]; }
};

struct Selection {
    alignas(16) u32 best[(BEAMS * BEAMS + 3) / 4 * 4];  // per row, falling: totals; zeros behind the last
    int best_token[BEAMS * BEAMS];
    u32 floor[SELECTED], top[SELECTED], last[SELECTED];  // keys: lower bound, largest; last: of uncounted ties
    int tiles[SELECTED], count[SELECTED], uncounted[SELECTED];
    int sums[WARPS];
};

// A logit as an integer of the same order; both zeros are one.
__device__ __forceinline__ u32 key_of(u16 bits) {
    const u32 b = bits == 0x8000u ? 0u : bits;
    return b ^ ((b & 0x8000u) ? 0xffffu : 0x8000u);
}
__device__ __forceinline__ float logit_of(u32 key) { return to_float((u16)(key ^ ((key & 0x8000u) ? 0x8000u : 0xffffu))); }
__device__ __forceinline__ u32 ordered(float x) {
    const u32 bits = __float_as_uint(x + 0.0f);
    return bits ^ ((bits >> 31) ? 0xffffffffu : 0x80000000u);
}
__device__ __forceinline__ float unordered(u32 x) {
    return __uint_as_float(x ^ ((x >> 31) ? 0x80000000u : 0xffffffffu));
}

__device__ __forceinline__ int block_sum(Selection& s, int value) {
    const int sum = __reduce_add_sync(0xffffffffu, value);
    if ((threadIdx.x & 31) == 0) s.sums[threadIdx.x >> 5] = sum;
    sync();
    int total = 0;
    for (int w = 0; w < WARPS; w++) total += s.sums[w];
    sync();
    return total;
}
__device__ __forceinline__ int block_min(Selection& s, int value) {
    const int least = __reduce_min_sync(0xffffffffu, value);
    if ((threadIdx.x & 31) == 0) s.sums[threadIdx.x >> 5] = least;
    sync();
    int total = s.sums[0];
    for (int w = 1; w < WARPS; w++) total = min(total, s.sums[w]);
    sync();
    return total;
}

// Candidates of one row with any number of ties: those above the 50th largest, and of its equals the first BEAMS.
__device__ __noinline__ void select_slowly(const u16* keys, const int* rows, Candidates& c, Selection& s, int row) {
    const auto count_from = [&](u32 least) {
        int count = 0;
#pragma unroll 1
        for (int i = threadIdx.x; i < WIDTH; i += CONSUMERS) count += load2(keys + i) >= least;
        return block_sum(s, count);
    };
    u32 last = 0;
    int at_least = WIDTH;
    for (int bit = 15; bit >= 0; bit--) {
        const int count = count_from(last | 1u << bit);
        if (count >= TOP) last |= 1u << bit, at_least = count;
    }
    if (threadIdx.x == 0) s.count[row] = 0;
#pragma unroll 1
    for (int i = threadIdx.x; i < MAX_CANDIDATES + 4; i += CONSUMERS) c.keys[i] = 0;
    sync();
#pragma unroll 1
    for (int i = threadIdx.x; i < WIDTH; i += CONSUMERS) {
        const u32 key = load2(keys + i);
        if (key > last) {
            const int place = atomicAdd(&s.count[row], 1);
            c.put(place, key, rows ? rows[i] : i);
        }
    }
    sync();
    const int above = s.count[row];
    int found = -1, equals = 0;
    for (; equals < BEAMS; equals++) {
        int next = 0x7fffffff;
#pragma unroll 1
        for (int i = threadIdx.x; i < WIDTH; i += CONSUMERS)
            if (i > found && load2(keys + i) == last) {
                next = i;
                break;
            }
        next = block_min(s, next);
        if (next == 0x7fffffff) break;
        found = next;
        if (threadIdx.x == 0) c.put(above + equals, last, rows ? rows[next] : next);
    }
    if (threadIdx.x == 0) {
        s.count[row] = above + equals;
        s.last[row] = last, s.uncounted[row] = at_least - above - equals;
    }
    sync();
}

// Finds the candidates of rows `base` .. `base + here`.
__device__ __forceinline__ void find_candidates(const Search& search, Candidates* c, Selection& s, int base, int here) {
    constexpr int CHUNKS = PITCH / 8, EARLY = 3;
    const int thread = threadIdx.x, warp = thread >> 5, lane = thread & 31;
    uint4 early[EARLY];  // asked for before the threshold is known
#pragma unroll
    for (int i = 0; i < EARLY; i++) {
        const int at = thread + i * CONSUMERS, row = at / CHUNKS;
        if (row < here) early[i] = load16(search.tile_best + (u64)(base + row) * PITCH + 8 * (at - row * CHUNKS));
    }
    if (warp < here) {
        constexpr int OWN = (BLOCKS + 31) / 32;
        u32 keys[OWN], top = 0, least = 0;
#pragma unroll
        for (int i = 0; i < OWN; i++) {
            keys[i] = 32 * i + lane < BLOCKS ? load2(search.block_best + (base + warp) * BLOCKS + 32 * i + lane) : 0;
            top = max(top, keys[i]);
        }
#pragma unroll 1
        for (int bit = 15; bit >= 0; bit--) {
            int count = 0;
#pragma unroll
            for (int i = 0; i < OWN; i++) count += __popc(__ballot_sync(0xffffffffu, keys[i] >= (least | 1u << bit)));
            if (count >= TOP) least |= 1u << bit;
        }
        top = __reduce_max_sync(0xffffffffu, top);
        if (lane == 0) {
            s.floor[warp] = least, s.top[warp] = top, s.last[warp] = 0;
            s.tiles[warp] = s.count[warp] = s.uncounted[warp] = 0;
        }
    } else {
#pragma unroll 1
        for (int i = thread - here * 32; i < here * (MAX_CANDIDATES + 4); i += CONSUMERS - here * 32)
            c[i / (MAX_CANDIDATES + 4)].keys[i % (MAX_CANDIDATES + 4)] = 0;
    }
    sync();
    const auto look = [&](int at, uint4 v) {
        const int row = at / CHUNKS;
        const u32 least = s.floor[row], word[4] = {v.x, v.y, v.z, v.w};
        u32 hits = 0;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            hits |= (u32)((word[i] & 0xffffu) >= least) << (2 * i);
            hits |= (u32)((word[i] >> 16) >= least) << (2 * i + 1);
        }
        if (!hits) return;
        const int tile = 8 * (at - row * CHUNKS);
        if (tile + 8 > TILES) hits &= (1u << (TILES - tile)) - 1;
        int place = atomicAdd(&s.tiles[row], __popc(hits));
        for (; hits; hits &= hits - 1, place++)
            if (place < MAX_CANDIDATES) c[row].tiles[place] = (u16)(tile + __ffs(hits) - 1);
    };
#pragma unroll
    for (int i = 0; i < EARLY; i++)
        if ((thread + i * CONSUMERS) / CHUNKS < here) look(thread + i * CONSUMERS, early[i]);
#pragma unroll 1
    for (int at = thread + EARLY * CONSUMERS; at < here * CHUNKS; at += CONSUMERS) {
        const int row = at / CHUNKS;
        look(at, load16(search.tile_best + (u64)(base + row) * PITCH + 8 * (at - row * CHUNKS)));
    }
    sync();
    const int row = thread % here, count = min(s.tiles[row], MAX_CANDIDATES), stride = CONSUMERS / here;
#pragma unroll 1
    for (int i = thread < stride * here ? thread / here : count; i < count; i += stride) {
        const int tile = c[row].tiles[i];
        const u32 least = s.floor[row];
        const u16* keys = search.keys + (u64)(base + row) * (16 * PITCH) + 16 * tile;
        const uint4 low = load16(keys), high = load16(keys + 8);
        int4 ids[4];  // their tokens, asked for at the same time; the table is padded
#pragma unroll
        for (int j = 0; j < 4; j++)
            ids[j] = search.rows ? ((const int4*)(search.rows + 16 * tile))[j]
                                 : make_int4(16 * tile + 4 * j, 16 * tile + 4 * j + 1, 16 * tile + 4 * j + 2, 16 * tile + 4 * j + 3);
        const u32 word[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
        u32 hits = 0;
#pragma unroll
        for (int j = 0; j < 8; j++) {
            hits |= (u32)((word[j] & 0xffffu) >= least) << (2 * j);
            hits |= (u32)((word[j] >> 16) >= least) << (2 * j + 1);
        }
        if (16 * tile + 16 > WIDTH) hits &= (1u << (WIDTH - 16 * tile)) - 1;
        int place = atomicAdd(&s.count[row], __popc(hits));
#pragma unroll 1
        for (; hits; hits &= hits - 1, place++) {
            if (place >= MAX_CANDIDATES) break;
            const int j = __ffs(hits) - 1;
            const uint4 half = j & 8 ? high : low;
            const uint2 quarter = j & 4 ? make_uint2(half.z, half.w) : make_uint2(half.x, half.y);
            const u32 pair = j & 2 ? quarter.y : quarter.x;
            const int4 four = j & 8 ? (j & 4 ? ids[3] : ids[2]) : (j & 4 ? ids[1] : ids[0]);
            const int token = j & 2 ? (j & 1 ? four.w : four.z) : (j & 1 ? four.y : four.x);
            c[row].put(place, (pair >> (16 * (j & 1))) & 0xffffu, token);
        }
    }
    sync();
    for (int r = 0; r < here; r++)
        if (s.tiles[r] > MAX_CANDIDATES || s.count[r] > MAX_CANDIDATES)
            select_slowly(search.keys + (u64)(base + r) * (16 * PITCH), search.rows, c[r], s, r);
}

// Totals of the candidates within the cut, and of a row the BEAMS best into `s.best`: a warp's work.
__device__ __forceinline__ void rank_candidates(Candidates& c, Selection& s, float score, int row, int out) {
    const int lane = threadIdx.x & 31, count = s.count[row];
#pragma unroll 1
    for (int i = lane; i < count; i += 32) {
        const u32 mine = c.keys[i];
        int rank = 0;
#pragma unroll 4
        for (int j = 0; j < count; j += 4) {
            const uint4 v = *(const uint4*)&c.keys[j];
            rank += (v.x > mine) + (v.y > mine) + (v.z > mine) + (v.w > mine);
        }
        c.sorted[rank] = mine;
    }
    __syncwarp();
    int kept = min(count, TOP);  // the slow way lists no others, and may list fewer
    const u32 last = c.sorted[kept - 1] >> 16;
#pragma unroll 1
    for (int i = TOP; i < count; i += 32)
        kept += __popc(__ballot_sync(0xffffffffu, i + lane < count && c.sorted[i + lane] >> 16 == last));
    const float top = logit_of(s.top[row]);
    float sum = 0.0f;
#pragma unroll 1
    for (int i = lane; i < kept; i += 32) sum += expf(logit_of(c.sorted[i] >> 16) - top);
    sum = warp_sum(sum);
    if (s.uncounted[row]) sum += s.uncounted[row] * expf(logit_of(s.last[row]) - top);
    const float norm = logf(sum);
#pragma unroll 1
    for (int i = lane; i < kept; i += 32) {
        const float log_prob = (logit_of(c.sorted[i] >> 16) - top) - norm;
        c.order[i] = (u64)ordered(score + log_prob) << 32 | (u32)~c.token_of(c.sorted[i]);
    }
    __syncwarp();
    // Totals fall with the logits; where some are equal the lower token comes first.
#pragma unroll 1
    for (int i = lane; i < kept; i += 32) {
        const u64 mine = c.order[i];
        if (i >= BEAMS && (c.order[BEAMS - 1] >> 32) > (mine >> 32)) break;
        int rank = i;
#pragma unroll 1
        for (int j = i - 1; j >= 0 && c.order[j] >> 32 == mine >> 32; j--) rank -= c.order[j] < mine;
#pragma unroll 1
        for (int j = i + 1; j < kept && c.order[j] >> 32 == mine >> 32; j++) rank += c.order[j] > mine;
        if (rank < BEAMS) s.best[out + rank] = mine >> 32, s.best_token[out + rank] = ~(u32)mine;
    }
}

// BEAMS best continuations of the rows `base` .. `base + count` into `out`. All consumers take part.
__device__ __forceinline__ void select(const Search& search, Candidates* c, Selection& s, const Beam* now, int base, int count,
                                       bool more, Beam* out) {
    const int warp = threadIdx.x >> 5;
    for (int first = 0; first < count; first += SELECTED) {
        const int here = min(SELECTED, count - first);
        find_candidates(search, c, s, base + first, here);
        if (warp < here) rank_candidates(c[warp], s, now[base + first + warp].score, warp, (first + warp) * BEAMS);
        sync();
    }
    if (more) {  // embeddings that may be needed next
        constexpr int LINES = HIDDEN / 64, BY = BATCH == 1 ? BLOCKS : 1;
#pragma unroll 1
        for (int i = threadIdx.x * BY + (BATCH == 1 ? blockIdx.x : 0); i < count * BEAMS * LINES; i += CONSUMERS * BY) {
            const u16* p = search.embedding + (u64)s.best_token[i / LINES] * HIDDEN + i % LINES * 64;
            asm volatile("prefetch.global.L2 [%0];" ::"l"(p));
        }
    }
#pragma unroll 1
    for (int at = threadIdx.x; at < count * BEAMS; at += CONSUMERS) {
        const u32 mine = s.best[at];
        int rank = 0;
#pragma unroll 4
        for (int j = 0; j < count * BEAMS; j += 4) {
            const uint4 v = *(const uint4*)&s.best[j];
            rank += v.x > mine || (v.x == mine && j < at);
            rank += v.y > mine || (v.y == mine && j + 1 < at);
            rank += v.z > mine || (v.z == mine && j + 2 < at);
            rank += v.w > mine || (v.w == mine && j + 3 < at);
        }
        if (rank < BEAMS) out[rank].token = s.best_token[at], out[rank].source = base + at / BEAMS, out[rank].score = unordered(mine);
    }
}
