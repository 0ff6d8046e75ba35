/* Expandable segments: expandable.py. */
#ifndef REPLAY_EXPANDABLE_H
#define REPLAY_EXPANDABLE_H

#include "blocks.h"

#define ENDLESS ((int64_t)1 << 60) /* addresses of a pool */

static int64_t piece_of(int32_t pool) { return pool & 1 ? LARGE_SEGMENT : SMALL_SEGMENT; }

/* A free block before unmapped addresses counts as large as both. */
static int64_t reach(const State *s, const Key *key) {
    int32_t after = s->blocks[key->block].next;
    return key->size + (is_kind(s, after, UNMAPPED) ? s->blocks[after].size : 0);
}

static void cut_from_range(State *s, int32_t at, int64_t size) {
    if (s->blocks[at].size - size >= MIN_BLOCK) list_free(s, split(s, at, size));
}

static int32_t take_from_range(State *s, int32_t pool, int64_t size) {
    List *list = &s->pools[pool].free;
    int64_t place = place_of(list, size, -1);
    if (place == list->count) return -1;
    while (place + 1 < list->count && is_kind(s, s->blocks[list->keys[place].block].next, UNMAPPED)) {
        if (reach(s, &list->keys[place + 1]) >= reach(s, &list->keys[place])) break;
        place++;
    }
    int32_t at = list->keys[place].block;
    remove_at(list, place);
    s->blocks[at].kind = USED;
    cut_from_range(s, at, size);
    return at;
}

/* How much of an unmapped stretch is mapped, in whole pieces, where so many bytes are missing. */
static int64_t mapped_part(int64_t extent, int64_t missing, int64_t piece) {
    int64_t wanted = extent < missing ? extent : missing;
    int64_t whole = (wanted + piece - 1) / piece * piece;
    return extent < whole ? extent : whole;
}

/* What would have to be mapped for a block, and the free or unmapped block that it begins with. */
static int64_t unmapped_part(State *s, int32_t pool, int64_t size, int32_t *first) {
    const List *unmapped = &s->pools[pool].unmapped;
    for (int64_t place = 0; place < unmapped->count; place++) {
        int32_t start = unmapped->keys[place].block, before = s->blocks[start].previous;
        *first = is_kind(s, before, FREE) ? before : start;
        int64_t length = 0;
        for (int32_t at = *first; at >= 0 && length < size && s->blocks[at].kind != USED; at = s->blocks[at].next)
            length += s->blocks[at].size;
        if (length >= size) break;
    }
    int64_t needed = 0, have = 0;
    for (int32_t at = *first; have < size; at = s->blocks[at].next) {
        int64_t extent = s->blocks[at].size;
        if (s->blocks[at].kind != FREE) needed += extent = mapped_part(extent, size - have, piece_of(pool));
        have += extent;
    }
    return needed;
}

static int32_t map_range(State *s, int32_t pool, int64_t size, int32_t first) {
    List *unmapped = &s->pools[pool].unmapped;
    int64_t have = 0;
    for (int32_t at = first; have < size; at = s->blocks[first].next) {
        if (s->blocks[at].kind != FREE) {
            int64_t extent = mapped_part(s->blocks[at].size, size - have, piece_of(pool));
            unlist_unmapped(s, at);
            if (s->blocks[at].size > extent) {
                int32_t rest = split(s, at, extent);
                s->blocks[rest].kind = UNMAPPED;
                insert(s, unmapped, 0, s->blocks[rest].address, rest);
            }
            s->blocks[at].kind = USED;
            give(s, at);
        }
        have = s->blocks[first].size;
    }
    unlist_free(s, first);
    cut_from_range(s, first, size);
    return first;
}

static void unmap(State *s, int32_t at) {
    int32_t before = s->blocks[at].previous, after = s->blocks[at].next;
    s->blocks[at].kind = UNMAPPED;
    if (is_kind(s, after, UNMAPPED)) {
        unlist_unmapped(s, after);
        join_next(s, at);
    }
    if (is_kind(s, before, UNMAPPED)) join_next(s, before);
    else insert(s, &s->pools[s->blocks[at].pool].unmapped, 0, s->blocks[at].address, at);
}

static void release_pieces(State *s, Pool *pool, int64_t piece) {
    int64_t count = pool->free.count;
    if (!count) return;
    Key *keys = malloc((size_t)count * sizeof(Key));
    if (!keys) longjmp(s->no_host_memory, 1);
    memcpy(keys, pool->free.keys, (size_t)count * sizeof(Key));
    for (int64_t place = 0; place < count; place++) {
        int64_t address = keys[place].address, end = address + keys[place].size;
        int64_t low = (address + piece - 1) / piece * piece, high = end / piece * piece;
        if (high <= low) continue;
        int32_t at = keys[place].block;
        unlist_free(s, at);
        if (high < end) list_free(s, split(s, at, high - address));
        if (low > address) {
            int32_t middle = split(s, at, low - address);
            list_free(s, at);
            at = middle;
        }
        unmap(s, at);
        s->reserved -= high - low;
    }
    free(keys);
}

#endif
