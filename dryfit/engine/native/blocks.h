/* Blocks, their free lists, and the state that holds both. */
#ifndef REPLAY_BLOCKS_H
#define REPLAY_BLOCKS_H

#include <setjmp.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define MIB ((int64_t)1 << 20)
#define MIN_BLOCK ((int64_t)512)
#define SMALL MIB
#define SMALL_SEGMENT (2 * MIB)
#define LARGE_SEGMENT (20 * MIB)
#define MIN_LARGE (10 * MIB)
#define ROUND_LARGE (2 * MIB)

enum { USED, FREE, UNMAPPED, SPARE };
enum { DONE, PAUSED, OUT_OF_MEMORY, NO_ADDRESSES, NO_HOST_MEMORY };

typedef struct {
    int64_t address, size, requested, owner; /* owner: the id that uses it */
    int32_t previous, next;                  /* neighbours; next: of a spare block, the next spare one */
    int32_t pool, kind;
} Block;

typedef struct {
    int64_t size, address;
    int32_t block;
} Key;

typedef struct {
    Key *keys; /* ascending by size, then address */
    int64_t count, room;
} List;

typedef struct {
    List free, unmapped; /* unmapped: by address alone */
    int32_t head;        /* of an expandable pool: the block at address 0 */
} Pool;

typedef struct {
    /* What replay.py reads and writes: _Totals. */
    int64_t capacity, allocated, requested, reserved, peak_allocated, peak_requested, peak_reserved, retries;
    int64_t at;                 /* the event that is served, or that could not be */
    int64_t needed;             /* what would have sufficed there */
    int64_t listening, pausing; /* whether sums are kept, and whether a release under pressure returns PAUSED */
    int64_t risen_count, sums_count;
    int64_t *risen, *sums; /* risen: a sum, and the event that asked for it */
    /* What it alone knows. */
    int64_t risen_room, sums_room, ids, high, low, block_count, block_room;
    int32_t *block_of; /* by id: the block in use, or -1 */
    Block *blocks;
    Pool *pools; /* of each stream a small and a large one */
    const int32_t *stream_of;
    int64_t stream_ids;
    int32_t pool_count, general_count, spare, expandable, given_back; /* general: no private pool of CUDA graphs */
    jmp_buf no_host_memory;
} State;

/* Room for one more element: the array may move. */
static void *with_room(State *s, void *array, int64_t count, int64_t *room, size_t each) {
    if (count < *room) return array;
    int64_t wanted = *room ? 2 * *room : 64;
    void *larger = realloc(array, (size_t)wanted * each);
    if (!larger) longjmp(s->no_host_memory, 1);
    *room = wanted;
    return larger;
}

/* ---- lists of free blocks */

/* Half of the rest is left out at each look, without a branch that a processor would guess wrong half the time. */
static int64_t place_of(const List *list, int64_t size, int64_t address) {
    const Key *first = list->keys;
    if (!first) return 0;
    for (int64_t rest = list->count; rest > 0;) {
        int64_t half = (rest + 1) / 2;
        const Key *key = &first[half - 1];
        int before = (key->size < size) | ((key->size == size) & (key->address < address));
        first += before ? half : 0;
        rest -= half;
    }
    return first - list->keys;
}

static void insert(State *s, List *list, int64_t size, int64_t address, int32_t block) {
    list->keys = with_room(s, list->keys, list->count, &list->room, sizeof(Key));
    int64_t place = place_of(list, size, address);
    memmove(list->keys + place + 1, list->keys + place, (size_t)(list->count - place) * sizeof(Key));
    list->keys[place] = (Key){size, address, block};
    list->count++;
}

static void remove_at(List *list, int64_t place) {
    list->count--;
    memmove(list->keys + place, list->keys + place + 1, (size_t)(list->count - place) * sizeof(Key));
}

/* ---- blocks */

static int32_t new_block(State *s, int64_t address, int64_t size, int32_t pool, int32_t kind) {
    int32_t at = s->spare;
    if (at >= 0) {
        s->spare = s->blocks[at].next;
    } else {
        s->blocks = with_room(s, s->blocks, s->block_count, &s->block_room, sizeof(Block));
        at = (int32_t)s->block_count++;
    }
    s->blocks[at] = (Block){address, size, 0, 0, -1, -1, pool, kind};
    return at;
}

static void drop(State *s, int32_t at) {
    s->blocks[at].kind = SPARE;
    s->blocks[at].next = s->spare;
    s->spare = at;
}

static int is_kind(const State *s, int32_t at, int32_t kind) { return at >= 0 && s->blocks[at].kind == kind; }

/* The block keeps its first bytes; returns the one behind them, in use. */
static int32_t split(State *s, int32_t at, int64_t size) {
    int32_t rest = new_block(s, s->blocks[at].address + size, s->blocks[at].size - size, s->blocks[at].pool, USED);
    Block *block = &s->blocks[at], *after = &s->blocks[rest];
    after->previous = at;
    after->next = block->next;
    if (block->next >= 0) s->blocks[block->next].previous = rest;
    block->next = rest;
    block->size = size;
    return rest;
}

static void join_next(State *s, int32_t at) {
    Block *block = &s->blocks[at];
    int32_t gone = block->next;
    block->size += s->blocks[gone].size;
    block->next = s->blocks[gone].next;
    if (block->next >= 0) s->blocks[block->next].previous = at;
    drop(s, gone);
}

static void list_free(State *s, int32_t at) {
    Block *block = &s->blocks[at];
    block->kind = FREE;
    insert(s, &s->pools[block->pool].free, block->size, block->address, at);
}

static void unlist_free(State *s, int32_t at) {
    Block *block = &s->blocks[at];
    List *list = &s->pools[block->pool].free;
    remove_at(list, place_of(list, block->size, block->address));
    block->kind = USED;
}

static void unlist_unmapped(State *s, int32_t at) {
    List *list = &s->pools[s->blocks[at].pool].unmapped;
    remove_at(list, place_of(list, 0, s->blocks[at].address));
}

/* Free a block; free neighbours merge. */
static void give(State *s, int32_t at) {
    int32_t before = s->blocks[at].previous;
    if (is_kind(s, before, FREE)) {
        unlist_free(s, before);
        join_next(s, before);
        at = before;
    }
    int32_t after = s->blocks[at].next;
    if (is_kind(s, after, FREE)) {
        unlist_free(s, after);
        join_next(s, at);
    }
    list_free(s, at);
}

#endif
