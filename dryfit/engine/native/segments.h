/* Segments that stay as cudaMalloc returned them: allocator.py. */
#ifndef REPLAY_SEGMENTS_H
#define REPLAY_SEGMENTS_H

#include "blocks.h"

#define TOP ((int64_t)1 << 47) /* the address above the first large segment */

static int64_t segment_size(int64_t size) {
    if (size <= SMALL) return SMALL_SEGMENT;
    if (size < MIN_LARGE) return LARGE_SEGMENT;
    return (size + ROUND_LARGE - 1) / ROUND_LARGE * ROUND_LARGE;
}

static int32_t take_from_segments(State *s, int32_t pool, int64_t size) {
    List *list = &s->pools[pool].free;
    int64_t place = place_of(list, size, -1);
    if (place == list->count) return -1;
    int32_t at = list->keys[place].block;
    remove_at(list, place);
    s->blocks[at].kind = USED;
    return at;
}

static int make_segment(State *s, int32_t pool, int64_t segment, int32_t *at) {
    int64_t address;
    if (segment > LARGE_SEGMENT) {
        address = s->high -= segment;
    } else {
        address = s->low;
        s->low += segment;
    }
    if (s->high < s->low) return NO_ADDRESSES;
    *at = new_block(s, address, segment, pool, USED);
    return DONE;
}

static void cut_from_segment(State *s, int32_t at, int64_t size) {
    int64_t rest = s->blocks[at].size - size;
    if (rest > SMALL || (rest >= MIN_BLOCK && !(s->blocks[at].pool & 1))) list_free(s, split(s, at, size));
}

static void release_segments(State *s, Pool *pool) {
    int64_t kept = 0;
    for (int64_t place = 0; place < pool->free.count; place++) {
        Key key = pool->free.keys[place];
        const Block *block = &s->blocks[key.block];
        if (block->previous < 0 && block->next < 0) {
            s->reserved -= block->size;
            drop(s, key.block);
        } else {
            pool->free.keys[kept++] = key;
        }
    }
    pool->free.count = kept;
}

#endif
