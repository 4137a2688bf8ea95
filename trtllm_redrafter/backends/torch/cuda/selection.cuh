// One round's choice of beams from the logits of a sequence's rows, exactly as `beam_search` makes it, without a sort.
//
// Logits come as keys: unsigned integers of 16 bits in the logits' order. The 50th largest of the blocks' best is a lower
// bound of the 50th largest logit, and few tiles of 16 hold anything above it: those are looked through, and of the few
// dozen candidates the survivors of the cut are counted out. Where that finds too many (logits that tie in their
// hundreds), the threshold is searched for bit by bit among all logits.
//
// Sums run in falling order of the logits and choices by rank, so the result does not depend on the order of threads.
#pragma once

#define TOP 50
#define MAX_CANDIDATES 256  // per row; with more the slow way is taken
#define SELECTED (BEAMS < 7 ? BEAMS : 7)  // rows looked at together, at most a warp for each

struct Beam {
    int token, source;  // source: the row of this round that it continues
    float score;
};

struct Candidates {
    alignas(16) u16 keys[MAX_CANDIDATES + 8];  // zeros behind the last
    u16 tiles[MAX_CANDIDATES], ranks[MAX_CANDIDATES];
    u32 columns[MAX_CANDIDATES];
    union {
        float weights[MAX_CANDIDATES];
        u64 order[MAX_CANDIDATES];  // total and column of each survivor, by falling logit
    };
};

struct Selection {
    u64 best[BEAMS][BEAMS];  // per row: totals and columns
    int best_token[BEAMS][BEAMS];
    u32 floor[SELECTED], top[SELECTED], last[SELECTED];  // keys: lower bound, largest; last: of uncounted ties
    int tiles[SELECTED], count[SELECTED], survivors[SELECTED], uncounted[SELECTED];
    float norm[SELECTED];
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
__device__ __noinline__ void select_slowly(const u16* keys, Candidates& c, Selection& s, int row) {
    const auto count_from = [&](u32 least) {
        int count = 0;
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
    for (int i = threadIdx.x; i < MAX_CANDIDATES + 8; i += CONSUMERS) c.keys[i] = 0;
    sync();
    for (int i = threadIdx.x; i < WIDTH; i += CONSUMERS) {
        const u32 key = load2(keys + i);
        if (key > last) {
            const int place = atomicAdd(&s.count[row], 1);
            c.keys[place] = (u16)key, c.columns[place] = i;
        }
    }
    sync();
    const int above = s.count[row];
    int found = -1, equals = 0;
    for (; equals < BEAMS; equals++) {
        int next = 0x7fffffff;
        for (int i = threadIdx.x; i < WIDTH; i += CONSUMERS)
            if (i > found && load2(keys + i) == last) {
                next = i;
                break;
            }
        next = block_min(s, next);
        if (next == 0x7fffffff) break;
        found = next;
        if (threadIdx.x == 0) c.keys[above + equals] = (u16)last, c.columns[above + equals] = next;
    }
    if (threadIdx.x == 0) {
        s.count[row] = above + equals;
        s.last[row] = last, s.uncounted[row] = at_least - above - equals;
    }
    sync();
}

// Finds the candidates of rows `base` .. `base + here`.
__device__ __forceinline__ void find_candidates(const Search& search, Candidates* c, Selection& s, int base, int here) {
    constexpr int CHUNKS = PITCH / 8, EARLY = 4;
    const int thread = threadIdx.x, warp = thread >> 5, lane = thread & 31;
    uint4 early[EARLY];  // asked for before the threshold is known
#pragma unroll
    for (int i = 0; i < EARLY; i++) {
        const int at = thread + i * CONSUMERS, row = at / CHUNKS;
        if (row < here) early[i] = load16(search.tile_best + (u64)(base + row) * PITCH + 8 * (at - row * CHUNKS));
    }
    if (warp < here) {
        u32 keys[(BLOCKS + 31) / 32], top = 0, least = 0;
#pragma unroll
        for (int i = 0; i < (BLOCKS + 31) / 32; i++) {
            keys[i] = 32 * i + lane < BLOCKS ? load2(search.block_best + (base + warp) * BLOCKS + 32 * i + lane) : 0;
            top = max(top, keys[i]);
        }
        for (int bit = 15; bit >= 0; bit--) {
            int count = 0;
#pragma unroll
            for (int i = 0; i < (BLOCKS + 31) / 32; i++) count += keys[i] >= (least | 1u << bit);
            if (__reduce_add_sync(0xffffffffu, count) >= TOP) least |= 1u << bit;
        }
        top = __reduce_max_sync(0xffffffffu, top);
        if (lane == 0) {
            s.floor[warp] = least, s.top[warp] = top, s.last[warp] = 0;
            s.tiles[warp] = s.count[warp] = s.survivors[warp] = s.uncounted[warp] = 0;
        }
        for (int i = lane; i < (MAX_CANDIDATES + 8) / 8; i += 32) ((uint4*)c[warp].keys)[i] = make_uint4(0, 0, 0, 0);
    }
    sync();
    const auto look = [&](int at, uint4 v) {
        const int row = at / CHUNKS;
        const u32 least = s.floor[row], word[4] = {v.x, v.y, v.z, v.w};
        const u32 twice = least | least << 16;
        if (!(__vcmpgeu2(v.x, twice) | __vcmpgeu2(v.y, twice) | __vcmpgeu2(v.z, twice) | __vcmpgeu2(v.w, twice))) return;
#pragma unroll
        for (int i = 0; i < 8; i++) {
            const int tile = 8 * (at - row * CHUNKS) + i;
            if (((word[i / 2] >> (16 * (i & 1))) & 0xffffu) < least || tile >= TILES) continue;
            const int place = atomicAdd(&s.tiles[row], 1);
            if (place < MAX_CANDIDATES) c[row].tiles[place] = (u16)tile;
        }
    };
#pragma unroll
    for (int i = 0; i < EARLY; i++)
        if ((thread + i * CONSUMERS) / CHUNKS < here) look(thread + i * CONSUMERS, early[i]);
    for (int at = thread + EARLY * CONSUMERS; at < here * CHUNKS; at += CONSUMERS) {
        const int row = at / CHUNKS;
        look(at, load16(search.tile_best + (u64)(base + row) * PITCH + 8 * (at - row * CHUNKS)));
    }
    sync();
    for (int at = thread; at < here * MAX_CANDIDATES; at += CONSUMERS) {
        const int row = at % here, i = at / here;
        if (i >= s.tiles[row]) continue;
        const int tile = c[row].tiles[i];
        const u32 least = s.floor[row];
        const u16* keys = search.keys + (u64)(base + row) * (16 * PITCH) + 16 * tile;
        const uint4 low = load16(keys), high = load16(keys + 8);
        const u32 word[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
        for (int j = 0; j < 16; j++) {
            const u32 key = (word[j / 2] >> (16 * (j & 1))) & 0xffffu;
            if (key < least || 16 * tile + j >= WIDTH) continue;
            const int place = atomicAdd(&s.count[row], 1);
            if (place < MAX_CANDIDATES) c[row].keys[place] = (u16)key, c[row].columns[place] = 16 * tile + j;
        }
    }
    sync();
    for (int row = 0; row < here; row++)
        if (s.tiles[row] > MAX_CANDIDATES || s.count[row] > MAX_CANDIDATES)
            select_slowly(search.keys + (u64)(base + row) * (16 * PITCH), c[row], s, row);
}

// The survivors' totals, and of each row the BEAMS best into `s.best[first + row]`.
__device__ __forceinline__ void rank_candidates(const Search& search, Candidates* c, Selection& s, const Beam* now, int base,
                                                int first, int here) {
    const int thread = threadIdx.x, warp = thread >> 5, lane = thread & 31;
    for (int at = thread; at < here * MAX_CANDIDATES; at += CONSUMERS) {
        const int row = at % here, i = at / here, count = s.count[row];
        if (i >= count) continue;
        const u32 mine = c[row].keys[i];
        int greater = 0, before = 0;
        for (int j = 0; j < count; j += 8) {
            const uint4 v = *(const uint4*)&c[row].keys[j];
            const u32 word[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
            for (int k = 0; k < 8; k++) {
                const u32 other = (word[k / 2] >> (16 * (k & 1))) & 0xffffu;
                greater += other > mine;
                before += other == mine && j + k < i;
            }
        }
        const bool survives = greater < TOP;
        c[row].ranks[i] = survives ? (u16)(greater + before) : (u16)0xffff;
        if (!survives) continue;
        c[row].weights[greater + before] = expf(logit_of(mine) - logit_of(s.top[row]));
        atomicAdd(&s.survivors[row], 1);
    }
    sync();
    if (warp < here) {
        float sum = 0.0f;
        for (int i = lane; i < s.survivors[warp]; i += 32) sum += c[warp].weights[i];
        sum = warp_sum(sum);
        if (s.uncounted[warp]) sum += s.uncounted[warp] * expf(logit_of(s.last[warp]) - logit_of(s.top[warp]));
        if (lane == 0) s.norm[warp] = logf(sum);
    }
    sync();
    for (int at = thread; at < here * MAX_CANDIDATES; at += CONSUMERS) {
        const int row = at % here, i = at / here;
        if (i >= s.count[row] || c[row].ranks[i] == 0xffff) continue;
        const float law = (logit_of(c[row].keys[i]) - logit_of(s.top[row])) - s.norm[row];
        c[row].order[c[row].ranks[i]] = (u64)ordered(now[base + row].score + law) << 32 | (u32)~c[row].columns[i];
    }
    sync();
    // Totals fall with the logits; where some are equal the lower column comes first.
    for (int at = thread; at < here * MAX_CANDIDATES; at += CONSUMERS) {
        const int row = at % here, i = at / here, count = s.survivors[row];
        if (i >= count) continue;
        const u64 mine = c[row].order[i];
        if (i >= BEAMS && (c[row].order[BEAMS - 1] >> 32) > (mine >> 32)) continue;
        int rank = i;
        for (int j = i - 1; j >= 0 && c[row].order[j] >> 32 == mine >> 32; j--) rank -= c[row].order[j] < mine;
        for (int j = i + 1; j < count && c[row].order[j] >> 32 == mine >> 32; j++) rank += c[row].order[j] > mine;
        if (rank >= BEAMS) continue;
        const u32 column = ~(u32)mine;
        s.best[first + row][rank] = mine;
        s.best_token[first + row][rank] = search.rows ? (int)search.rows[column] : (int)column;
    }
    sync();
}

// BEAMS best continuations of the rows `base` .. `base + count` into `out`. All consumers take part.
__device__ __forceinline__ void select(const Search& search, Candidates* c, Selection& s, const Beam* now, int base, int count,
                                       Beam* out) {
    for (int first = 0; first < count; first += SELECTED) {
        const int here = min(SELECTED, count - first);
        find_candidates(search, c, s, base + first, here);
        rank_candidates(search, c, s, now, base + first, first, here);
    }
    for (int at = threadIdx.x; at < count * BEAMS; at += CONSUMERS) {
        const int beam = at / BEAMS, i = at - beam * BEAMS;
        const u32 mine = s.best[beam][i] >> 32;
        int rank = i;
        for (int b = 0; b < count; b++) {
            if (b == beam) continue;
            for (int j = 0; j < BEAMS; j++) {
                const u32 other = s.best[b][j] >> 32;
                rank += other > mine || (other == mine && b < beam);
            }
        }
        if (rank < BEAMS) out[rank].token = s.best_token[beam][i], out[rank].source = base + beam, out[rank].score = unordered(mine);
    }
}
