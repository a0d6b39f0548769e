#include "cache.h"

#include <string.h>

#define MAX_FREQUENCY 3
/* Uses in the small queue that earn a place in the main queue. */
#define PROMOTED_FROM 2

size_t nl_cache_bytes(uint64_t neurons, uint64_t rows, uint64_t pinned) {
    return (size_t)(neurons * (sizeof(int64_t) + sizeof(int32_t) + 1) + (rows - pinned) * 3 * sizeof(int32_t));
}

void nl_cache_start(NlCache *cache, void *memory, uint64_t neurons, uint64_t rows, uint64_t pinned,
                    uint64_t run_length, double admission) {
    int64_t evictable = (int64_t)(rows - pinned);
    memset(cache, 0, sizeof *cache);
    cache->stamp = memory;
    cache->row_of = (int32_t *)(cache->stamp + neurons);
    cache->free = cache->row_of + neurons;
    cache->small.slots = cache->free + evictable;
    cache->main.slots = cache->small.slots + evictable;
    cache->frequency = (uint8_t *)(cache->main.slots + evictable);
    cache->neurons = (int64_t)neurons;
    cache->pinned = (int64_t)pinned;
    cache->small.room = cache->main.room = cache->free_rows = evictable;
    cache->small_target = evictable / 10 > 1 ? evictable / 10 : 1;
    cache->ghosts = evictable - evictable / 10;
    cache->run_length = (int64_t)run_length;
    cache->admit_below = (uint64_t)(admission * 4294967296.0 + 0.5);
    for (uint64_t slot = 0; slot < neurons; slot++) {
        cache->row_of[slot] = slot < pinned ? (int32_t)slot : -1;
        cache->stamp[slot] = -(int64_t)rows - 1; /* further back than any ghost */
        cache->frequency[slot] = 0;
    }
    /* The stack gives out low rows first. */
    for (int64_t k = 0; k < evictable; k++) cache->free[k] = (int32_t)((int64_t)rows - 1 - k);
}

void nl_cache_next(NlCache *cache) { cache->token++; }

void nl_cache_look_up(NlCache *cache, const int32_t *slots, size_t count, int32_t *rows) {
    cache->looked_up += count;
    for (size_t k = 0; k < count; k++) {
        int32_t slot = slots[k];
        rows[k] = cache->row_of[slot];
        if (rows[k] < 0) continue;
        cache->hits++;
        if (rows[k] >= cache->pinned && cache->frequency[slot] < MAX_FREQUENCY) cache->frequency[slot]++;
    }
}

static void append(NlRing *ring, int32_t slot) {
    int64_t place = ring->first + ring->count++;
    ring->slots[place < ring->room ? place : place - ring->room] = slot;
}

static int32_t take(NlRing *ring) {
    int32_t slot = ring->slots[ring->first];
    ring->first = ring->first + 1 < ring->room ? ring->first + 1 : 0;
    ring->count--;
    return slot;
}

static void release(NlCache *cache, int32_t slot) {
    cache->free[cache->free_rows++] = cache->row_of[slot];
    cache->row_of[slot] = -1;
}

/* Evicts the first slot of the small queue that was not used enough; slots before it move to the main queue. */
static int leave_small(NlCache *cache) {
    while (cache->small.count > 0) {
        int32_t slot = take(&cache->small);
        if (cache->frequency[slot] < PROMOTED_FROM) {
            cache->stamp[slot] = cache->ghost_clock++;
            release(cache, slot);
            return 1;
        }
        cache->frequency[slot] = 0;
        append(&cache->main, slot);
    }
    return 0;
}

/* Evicts the first slot of the main queue that was not used since it entered or got its last chance. */
static void leave_main(NlCache *cache) {
    for (;;) {
        int32_t slot = take(&cache->main);
        if (cache->frequency[slot] == 0) {
            cache->stamp[slot] = -cache->ghosts - 1;
            release(cache, slot);
            return;
        }
        cache->frequency[slot]--;
        append(&cache->main, slot);
    }
}

static void enter(NlCache *cache, int32_t slot) {
    if (cache->free_rows == 0 && (cache->small.count < cache->small_target || !leave_small(cache))) leave_main(cache);
    cache->row_of[slot] = cache->free[--cache->free_rows];
    cache->frequency[slot] = 0;
    append(cache->ghost_clock - cache->stamp[slot] <= cache->ghosts ? &cache->main : &cache->small, slot);
}

/* A number below 2^32 from the token and the slot: the finaliser of SplitMix64. */
static uint64_t chance(const NlCache *cache, int32_t slot) {
    uint64_t mixed = (uint64_t)cache->token * UINT64_C(0x9E3779B97F4A7C15);
    mixed ^= (uint64_t)slot * UINT64_C(0xD1B54A32D192ED03);
    mixed = (mixed ^ mixed >> 30) * UINT64_C(0xBF58476D1CE4E5B9);
    mixed = (mixed ^ mixed >> 27) * UINT64_C(0x94D049BB133111EB);
    return (mixed ^ mixed >> 31) >> 32;
}

void nl_cache_admit(NlCache *cache, const int32_t *slots, const uint8_t *wanted, size_t count, int32_t *rows) {
    for (size_t k = 0; k < count; k++) rows[k] = -1;
    if (cache->free_rows + cache->small.count + cache->main.count == 0) return;
    for (size_t start = 0, stop; start < count; start = stop) {
        int64_t length;
        for (stop = start + 1; stop < count && slots[stop] == slots[stop - 1] + 1;) stop++;
        length = (int64_t)(stop - start);
        /* While there is room, every neuron is admitted. */
        if (cache->run_length && length >= cache->run_length && cache->free_rows < length &&
            chance(cache, slots[start]) >= cache->admit_below)
            continue;
        for (size_t k = start; k < stop; k++) {
            if (!wanted[k] || cache->row_of[slots[k]] >= 0) continue;
            enter(cache, slots[k]);
            rows[k] = 0;
        }
    }
    /* One admitted early may be evicted again by now, and its row given to another. */
    for (size_t k = 0; k < count; k++)
        if (rows[k] >= 0) rows[k] = cache->row_of[slots[k]];
}
