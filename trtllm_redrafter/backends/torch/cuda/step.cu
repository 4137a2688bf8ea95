// A step's bookkeeping on the device, so that the host need not wait for it: what each sequence decodes next, token trees
// from the drafter's beams, acceptance along the trees, and the committed part of the KV cache.
//
//     gather -> (search) -> plan_trees -> base pass and head -> accept -> compact
//
// Roof: latency. Everything here is a few kilobytes, except the keys and values that move.
//
// Compile-time: BEAMS, LENGTH (drafted tokens of a beam; 0 without a drafter), PATH (of the layout, at least LENGTH + 1).
#include "common.cuh"

#define STEP (LENGTH + 1)
#define ENTRIES (BEAMS * STEP)
#define STOPS 8

// What a slot's sequence decodes next. The host writes it when a request is admitted, `accept` from then on.
struct Sequence {
    long long root, base, remaining, flags;  // root: written but not computed; base: committed positions
    long long stops[STOPS];                  // tokens that end the text; -1: none
};
#define DRAFTS 1
#define DONE 2
#define DRAFTLESS 4  // do the next step without drafts: with them, its numbers were not finite

// What a step brought a sequence, for the host.
struct Outcome {
    long long count, drafted, status;  // tokens written; tokens drafted along a path; see below
    long long tokens[STEP];
};
#define DRAFTER_NOT_FINITE 1
#define LOGITS_NOT_FINITE 2

// The parts of a `Layout`, and what acceptance needs beside them.
struct Trees {
    long long *sequence, *depths, *paths, *slots, *bases, *first, *tokens;
    int *parents;  // [R]
    int *kept;     // [B, 1 + PATH]: how many nodes of a tree were accepted, and which
};

// contexts [B, H], roots [B]: the search's inputs, in the order of the batch.
extern "C" __global__ void __launch_bounds__(256)
    gather(const Sequence* __restrict__ sequences, const long long* __restrict__ order, const u32* __restrict__ states,
           const int pairs, u32* __restrict__ contexts, long long* __restrict__ roots) {
    const long long slot = order[blockIdx.x];
    if (threadIdx.x == 0) roots[blockIdx.x] = sequences[slot].root;
    for (int i = threadIdx.x; i < pairs; i += blockDim.x) contexts[blockIdx.x * pairs + i] = states[slot * pairs + i];
}

// One warp per sequence merges its beams by common beginnings; nodes are numbered beam by beam, as `Tree.merge` does. One
// block: rows of all trees stand end to end. beams, scores: [B, K, L + 1], or null.
extern "C" __global__ void __launch_bounds__(1024)
    plan_trees(const Sequence* __restrict__ sequences, const long long* __restrict__ order, const int batch,
               const long long* __restrict__ beams, const float* __restrict__ scores, const int rows, const Trees out,
               Outcome* __restrict__ outcomes) {
    extern __shared__ int shared_memory[];
    int* counts = shared_memory;                                      // [batch + 1]: nodes, then first rows
    int* tokens = shared_memory + batch + 1 + (threadIdx.x >> 5) * 2 * ENTRIES;  // [K, L + 1]
    int* numbers = tokens + ENTRIES;
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, warps = blockDim.x >> 5;

    for (int pass = 0; pass < 2; pass++) {  // count the nodes of every sequence, then write them down
        for (int b = warp; b < batch; b += warps) {
            const Sequence& own = sequences[order[b]];
            const bool done = own.flags & DONE;
            bool drafts = beams && (own.flags & DRAFTS) && !(own.flags & DRAFTLESS) && own.remaining > 1 && !done;
            bool finite = true;
            if (drafts)
                for (int e = lane; e < ENTRIES; e += 32) {
                    const float score = scores[b * ENTRIES + e];
                    finite = finite && score - score == 0.0f;
                }
            finite = __all_sync(0xffffffffu, finite);
            if (pass == 1 && lane == 0) {
                outcomes[b].status = finite ? 0 : DRAFTER_NOT_FINITE;
                outcomes[b].drafted = drafts && finite ? LENGTH : 0;
            }
            drafts = drafts && finite;
            const int entries = drafts ? ENTRIES : 1;
            __syncwarp();
            for (int e = lane; e < entries; e += 32) tokens[e] = drafts ? (int)beams[b * ENTRIES + e] : (int)own.root;
            __syncwarp();
            int nodes = 0;
            for (int start = 0; start < entries; start += 32) {
                const int e = start + lane, k = e / STEP, d = e % STEP;
                int holder = k;  // the lowest beam with the same tokens up to d
                for (int j = 0; e < entries && j < holder; j++) {
                    bool same = true;
                    for (int i = 0; i <= d && same; i++) same = tokens[j * STEP + i] == tokens[k * STEP + i];
                    if (same) holder = j;
                }
                const u32 is_node = __ballot_sync(0xffffffffu, e < entries && holder == k);
                if (e < entries) numbers[e] = holder == k ? nodes + __popc(is_node & ((1u << lane) - 1)) : -1 - holder;
                nodes += __popc(is_node);
            }
            __syncwarp();
            if (pass == 0) {
                if (lane == 0) counts[b + 1] = done ? 0 : nodes;
                continue;
            }
            if (lane == 0) out.slots[b] = order[b], out.bases[b] = own.base, out.first[b] = counts[b];
            if (done) continue;
            for (int e = lane; e < entries; e += 32)  // entries that are no nodes of their own
                if (numbers[e] < 0) numbers[e] = numbers[(-1 - numbers[e]) * STEP + e % STEP] | 0x40000000;
            __syncwarp();
            for (int e = lane; e < entries; e += 32) {
                const int k = e / STEP, d = e % STEP;
                if (numbers[e] & 0x40000000) continue;
                const int row = counts[b] + numbers[e];
                out.sequence[row] = b, out.depths[row] = d, out.tokens[row] = tokens[e];
                out.parents[row] = d ? numbers[e - 1] & 0x3fffffff : -1;
                for (int i = 0; i < PATH; i++)
                    out.paths[(u64)row * PATH + i] = numbers[k * STEP + (i < d ? i : d)] & 0x3fffffff;
            }
        }
        __syncthreads();
        if (pass == 0) {
            if (threadIdx.x == 0) {
                counts[0] = 0;
                for (int b = 1; b <= batch; b++) counts[b] += counts[b - 1];
                out.first[batch] = counts[batch];
            }
            __syncthreads();
        }
    }
    for (int row = counts[batch] + threadIdx.x; row < rows; row += blockDim.x) {
        out.sequence[row] = -1, out.depths[row] = 0, out.tokens[row] = 0;
        for (int i = 0; i < PATH; i++) out.paths[(u64)row * PATH + i] = 0;
    }
}

// One block per sequence: follow the tree along the base model's own tokens, `draws` [R], from the root. The last accepted
// node's draw is the next root, its hidden state the next context.
extern "C" __global__ void __launch_bounds__(128)
    accept(Sequence* __restrict__ sequences, const Trees trees, const long long* __restrict__ draws,
           const u32* __restrict__ hidden, const int pairs, u32* __restrict__ states, Outcome* __restrict__ outcomes) {
    const int b = blockIdx.x, lane = threadIdx.x & 31;
    const long long first = trees.first[b], slot = trees.slots[b];
    const int nodes = (int)(trees.first[b + 1] - first);
    int* kept = trees.kept + b * (1 + PATH);
    __shared__ int last_node;
    wait_for_previous();
    if (nodes == 0) {
        if (threadIdx.x == 0) kept[0] = 0, outcomes[b].count = 0;
        return;
    }
    if (threadIdx.x < 32) {
        int last = 0, count = 1;
        long long drawn = draws[first];
        if (lane == 0) kept[1] = 0;
        for (bool found = true; found && count < PATH;) {
            found = false;
            for (int start = last + 1; start < nodes && !found; start += 32) {  // a node comes after its parent
                const int node = start + lane;
                const bool here = node < nodes && trees.parents[first + node] == last && trees.tokens[first + node] == drawn;
                const u32 where = __ballot_sync(0xffffffffu, here);
                if (where) last = start + __ffs(where) - 1, found = true;
            }
            if (found) {
                drawn = draws[first + last];
                if (lane == 0) kept[1 + count] = last;
                count++;
            }
        }
        __syncwarp();
        if (lane == 0) {
            Sequence own = sequences[slot];
            if (drawn < 0) {  // nothing is committed; without drafts there is no other try
                outcomes[b].status |= LOGITS_NOT_FINITE;
                outcomes[b].count = kept[0] = 0;
                own.flags |= nodes > 1 ? DRAFTLESS : DONE;
            } else {
                int written = 0;
                bool ends = false;
                for (; written < count && !ends; written++) {
                    const long long token = draws[first + kept[1 + written]];
                    outcomes[b].tokens[written] = token;
                    ends = written + 1 >= own.remaining;
                    for (int i = 0; i < STOPS; i++) ends = ends || own.stops[i] == token;
                }
                outcomes[b].count = written;
                kept[0] = count;
                own.root = drawn, own.base += count, own.remaining -= written;
                own.flags &= ~DRAFTLESS;
                if (ends) own.flags |= DONE;
            }
            sequences[slot] = own;
            last_node = drawn < 0 ? -1 : last;
        }
    }
    __syncthreads();
    if (last_node >= 0)
        for (int i = threadIdx.x; i < pairs; i += blockDim.x) states[slot * pairs + i] = hidden[(first + last_node) * pairs + i];
}

// Keys and values of the accepted nodes move to the positions after the committed ones. caches: keys, values
// [layers, slots, KV heads, capacity, D]; `pieces`: 16 bytes of a row. Grid: (layers x 2, KV heads, B).
extern "C" __global__ void __launch_bounds__(64)
    compact(const Trees trees, uint4* __restrict__ keys, uint4* __restrict__ values, const long long layer_size,
            const long long capacity, const int pieces) {
    const int b = blockIdx.z;
    const int* kept = trees.kept + b * (1 + PATH);
    wait_for_previous();
    const long long rows = ((long long)trees.slots[b] * gridDim.y + blockIdx.y) * capacity + trees.bases[b];
    uint4* cache = (blockIdx.x & 1 ? values : keys) + (blockIdx.x >> 1) * layer_size + rows * pieces;
    for (int piece = threadIdx.x; piece < pieces; piece += blockDim.x)
        for (int i = 1; i < kept[0]; i++)  // nodes rise along a path: none is overwritten before it has moved
            if (kept[1 + i] != i) cache[i * pieces + piece] = cache[kept[1 + i] * pieces + piece];
}
