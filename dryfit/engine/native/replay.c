/* The models of allocator.py and expandable.py, compiled: the same states, event for event.

   Python's are the ones to read, with the source of each rule. tests/dryfit/engine/test_native.py compares every
   output of the two. native_library.py compiles this file, replay.py calls it. C99 without anything but its library. */
#include "blocks.h"
#include "expandable.h"
#include "segments.h"

#if defined(_WIN32)
#define EXPORT __declspec(dllexport)
#else
#define EXPORT __attribute__((visibility("default")))
#endif

#define PLENTY ((int64_t)1 << 62)
#define MOST_BYTES ((int64_t)1 << 46)
#define MOST_ID ((int64_t)1 << 28) /* an array has a place for each id */

static int within(State *s, int64_t total) {
    if (s->listening) {
        s->sums = with_room(s, s->sums, s->sums_count, &s->sums_room, sizeof(int64_t));
        s->sums[s->sums_count++] = total;
    }
    if (total > s->capacity) return 0;
    if (total > s->risen[2 * s->risen_count - 2]) {
        s->risen = with_room(s, s->risen, s->risen_count, &s->risen_room, 2 * sizeof(int64_t));
        s->risen[2 * s->risen_count] = total;
        s->risen[2 * s->risen_count + 1] = s->at;
        s->risen_count++;
    }
    return 1;
}

static void release(State *s) {
    for (int32_t pool = 0; pool < s->general_count; pool++) {
        if (s->expandable) release_pieces(s, &s->pools[pool], piece_of(pool));
        else release_segments(s, &s->pools[pool]);
    }
}

static int64_t lacking(State *s, int32_t pool, int64_t size, int32_t *first) {
    return s->expandable ? unmapped_part(s, pool, size, first) : segment_size(size);
}

/* Whether there is room for what a block lacks: under pressure what is free is given back first. */
static int make_room(State *s, int32_t pool, int64_t size, int grow, int64_t *more, int32_t *first) {
    *more = lacking(s, pool, size, first);
    if (!s->given_back) {
        if (within(s, s->reserved + *more)) return DONE;
        if (pool >= s->general_count) goto beyond; /* nothing is given back while a graph may be captured */
        s->retries++;
        release(s);
        s->given_back = 1;
        if (s->pausing) return PAUSED; /* the event is served again from its beginning, and comes here again */
        *more = lacking(s, pool, size, first);
    }
    s->given_back = 0;
    if (within(s, s->reserved + *more)) return DONE;
beyond:
    s->needed = s->reserved + *more;
    if (!grow) return OUT_OF_MEMORY;
    s->capacity = s->needed;
    return DONE;
}

static int allocate(State *s, int64_t id, int64_t count, int grow) {
    int64_t size = (count + MIN_BLOCK - 1) & -MIN_BLOCK, more;
    int32_t pool = (id < s->stream_ids ? 2 * s->stream_of[id] : 0) + (size > SMALL), first;
    int32_t at = s->expandable ? take_from_range(s, pool, size) : take_from_segments(s, pool, size);
    if (at < 0) {
        int outcome = make_room(s, pool, size, grow, &more, &first);
        if (outcome == DONE && !s->expandable) outcome = make_segment(s, pool, more, &at);
        if (outcome != DONE) return outcome;
        if (s->expandable) at = map_range(s, pool, size, first);
        s->reserved += more;
        if (s->reserved > s->peak_reserved) s->peak_reserved = s->reserved;
    }
    if (!s->expandable) cut_from_segment(s, at, size);
    while (id >= s->ids) {
        int64_t before = s->ids;
        s->block_of = with_room(s, s->block_of, s->ids, &s->ids, sizeof(int32_t));
        memset(s->block_of + before, 0xff, (size_t)(s->ids - before) * sizeof(int32_t));
    }
    s->block_of[id] = at;
    Block *block = &s->blocks[at];
    block->requested = count;
    block->owner = id;
    s->allocated += block->size;
    s->requested += count;
    if (s->allocated > s->peak_allocated) s->peak_allocated = s->allocated;
    if (s->requested > s->peak_requested) s->peak_requested = s->requested;
    return DONE;
}

static void end_of(State *s, int64_t id) {
    if (id >= s->ids || s->block_of[id] < 0) return;
    int32_t at = s->block_of[id];
    s->block_of[id] = -1;
    s->allocated -= s->blocks[at].size;
    s->requested -= s->blocks[at].requested;
    give(s, at);
}

/* Serve events (id, bytes, id, bytes, ...) from one index to before another; trail gets what is allocated before each.
   Returns an outcome; if it isn't DONE, `at` says where. */
EXPORT int replay_run(State *s, const int64_t *events, int64_t first, int64_t last, int grow, int64_t *trail) {
    if (setjmp(s->no_host_memory)) return NO_HOST_MEMORY;
    for (s->at = first; s->at < last; s->at++) {
        int64_t id = events[2 * s->at], count = events[2 * s->at + 1];
        if (trail) trail[s->at - first] = s->allocated;
        if (id < 0) {
            end_of(s, -id);
            continue;
        }
        if (id == 0) release(s);
        if (!count) continue;
        int outcome = allocate(s, id, count, grow);
        if (outcome != DONE) return outcome;
    }
    return DONE;
}

EXPORT void replay_free(State *s) {
    for (int32_t pool = 0; s->pools && pool < s->pool_count; pool++) {
        free(s->pools[pool].free.keys);
        free(s->pools[pool].unmapped.keys);
    }
    free(s->pools);
    free(s->blocks);
    free(s->block_of);
    free(s->risen);
    free(s->sums);
    free(s);
}

static int begun(State *s, int expandable, int streams, int general, const int32_t *stream_of, int64_t stream_ids) {
    if (setjmp(s->no_host_memory)) return 0;
    s->capacity = PLENTY;
    s->high = TOP;
    s->low = TOP / 2;
    s->spare = -1;
    s->expandable = expandable;
    s->stream_of = stream_of;
    s->stream_ids = stream_ids;
    s->risen = with_room(s, NULL, 0, &s->risen_room, 2 * sizeof(int64_t));
    s->risen[0] = s->risen[1] = 0;
    s->risen_count = 1;
    s->pools = calloc((size_t)(2 * streams), sizeof(Pool));
    if (!s->pools) return 0;
    s->pool_count = 2 * streams;
    s->general_count = 2 * general;
    for (int32_t pool = 0; expandable && pool < s->pool_count; pool++) {
        int32_t head = s->pools[pool].head = new_block(s, 0, ENDLESS, pool, UNMAPPED);
        insert(s, &s->pools[pool].unmapped, 0, 0, head);
    }
    return 1;
}

/* A first state; NULL without memory. stream_of: by id, below stream_ids, the number of its stream. From the number
   `general` on they are private pools of CUDA graphs. */
EXPORT State *replay_new(int expandable, int streams, int general, const int32_t *stream_of, int64_t stream_ids) {
    State *s = calloc(1, sizeof(State));
    if (!s || begun(s, expandable, streams, general, stream_of, stream_ids)) return s;
    replay_free(s);
    return NULL;
}

static void *copied(State *s, const void *array, int64_t room, size_t each) {
    if (!array) return NULL;
    void *twin = malloc((size_t)room * each);
    if (!twin) longjmp(s->no_host_memory, 1);
    return memcpy(twin, array, (size_t)room * each);
}

static List copied_list(State *s, List list) {
    list.keys = copied(s, list.keys, list.room, sizeof(Key));
    return list;
}

static int copied_to(State *twin, const State *s) {
    *twin = *s;
    twin->pools = NULL, twin->blocks = NULL, twin->block_of = NULL, twin->risen = NULL, twin->sums = NULL;
    if (setjmp(twin->no_host_memory)) return 0;
    twin->pools = calloc((size_t)s->pool_count, sizeof(Pool));
    if (!twin->pools) return 0;
    for (int32_t pool = 0; pool < s->pool_count; pool++) {
        twin->pools[pool].head = s->pools[pool].head;
        twin->pools[pool].free = copied_list(twin, s->pools[pool].free);
        twin->pools[pool].unmapped = copied_list(twin, s->pools[pool].unmapped);
    }
    twin->block_room = s->block_count;
    twin->blocks = copied(twin, s->blocks, s->block_count, sizeof(Block));
    twin->block_of = copied(twin, s->block_of, s->ids, sizeof(int32_t));
    twin->risen = copied(twin, s->risen, s->risen_room, 2 * sizeof(int64_t));
    twin->sums = copied(twin, s->sums, s->sums_room, sizeof(int64_t));
    return 1;
}

/* The same state once more; NULL without memory. */
EXPORT State *replay_copy(const State *s) {
    State *twin = malloc(sizeof(State));
    if (!twin || copied_to(twin, s)) return twin;
    replay_free(twin);
    return NULL;
}

static uint64_t mixed(uint64_t hash, int64_t value) {
    hash = (hash ^ (uint64_t)value) * UINT64_C(0x9E3779B97F4A7C15);
    hash ^= hash >> 29;
    hash *= UINT64_C(0xBF58476D1CE4E5B9);
    return hash ^ (hash >> 32);
}

static int by_place(const void *first, const void *second) {
    const Block *a = first, *b = second;
    if (a->pool != b->pool) return a->pool < b->pool ? -1 : 1;
    return a->address < b->address ? -1 : a->address > b->address;
}

/* What is held, by pool in the order of addresses, as one number in *hash; 0 without memory for it. */
EXPORT int replay_signature(const State *s, int64_t *hash) {
    uint64_t found = 0;
    if (s->expandable) {
        for (int32_t pool = 0; pool < s->pool_count; pool++) {
            for (int32_t at = s->pools[pool].head; at >= 0; at = s->blocks[at].next) {
                const Block *block = &s->blocks[at];
                int64_t owner = block->kind == USED ? block->owner : block->kind == FREE ? 0 : -1;
                found = mixed(mixed(mixed(found, block->address), block->size), owner);
            }
            found = mixed(found, -2);
        }
    } else {
        Block *held = malloc((size_t)(s->block_count + 1) * sizeof(Block));
        if (!held) return 0;
        size_t count = 0;
        for (int64_t at = 0; at < s->block_count; at++)
            if (s->blocks[at].kind != SPARE) held[count++] = s->blocks[at];
        qsort(held, count, sizeof(Block), by_place);
        for (size_t at = 0; at < count; at++) {
            int64_t owner = held[at].kind == USED ? held[at].owner : 0;
            found = mixed(mixed(mixed(mixed(found, held[at].pool), owner), held[at].size), held[at].previous < 0);
        }
        free(held);
    }
    *hash = (int64_t)found;
    return 1;
}

/* The largest id of events; -1 where a number is beyond what this file can hold. */
EXPORT int64_t events_largest_id(const int64_t *events, int64_t count) {
    int64_t largest = 0;
    for (int64_t at = 0; at < count; at++) {
        int64_t id = events[2 * at], bytes = events[2 * at + 1];
        if (id < -MOST_ID || id > MOST_ID || bytes < 0 || bytes > MOST_BYTES) return -1;
        if (id < 0) id = -id;
        if (id > largest) largest = id;
    }
    return largest;
}

/* The largest sum of requests in use, each rounded up to 512 bytes; -1 without memory. */
EXPORT int64_t events_peak_blocks(const int64_t *events, int64_t count, int64_t largest_id) {
    int64_t *sizes = calloc((size_t)largest_id + 1, sizeof(int64_t)), total = 0, most = 0;
    if (!sizes) return -1;
    for (int64_t at = 0; at < count; at++) {
        int64_t id = events[2 * at], bytes = events[2 * at + 1];
        if (id > 0 && bytes) {
            total += sizes[id] = (bytes + MIN_BLOCK - 1) & -MIN_BLOCK;
            if (total > most) most = total;
        } else if (id < 0) {
            total -= sizes[-id];
            sizes[-id] = 0;
        }
    }
    free(sizes);
    return most;
}
