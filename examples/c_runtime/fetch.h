/*
 * Fetches the bundles of neurons: those in memory are used at once, while the missing ones are being read; these are
 * used in the order in which they arrive, and kept if the cache takes them.
 */
#ifndef NL_FETCH_H
#define NL_FETCH_H

#include "arena.h"
#include "cache.h"
#include "index.h"
#include "planning.h"
#include "reads.h"
#include "room.h"

/* The bundles of a block that are in memory. */
typedef struct {
    const NlBlock *block;
    NlCache cache;
    unsigned char *pool; /* a bundle per row */
} NlStore;

typedef struct {
    int32_t slot;
    const unsigned char *bundle;
} NlItem;

/* Uses some bundles, which are there until it returns. */
typedef void (*NlUse)(void *context, const NlItem *items, size_t count);

/* Where a fetch is. */
typedef struct {
    NlStore *store;
    NlError *error;
    const int32_t *slots;
    size_t count, missing;             /* slots so far, and those of them that are not cached */
    size_t planned, final, started, done; /* reads: `final` of them become no longer */
    size_t covered, wanted;            /* slots that final reads bring, and how many of them are missing */
    unsigned in_flight, ready;
} NlCall;

/* What all blocks share. Requests are twice as many as reads in flight, so that some are read while others are used. */
typedef struct {
    NlReads *reads;
    unsigned depth, idle_count;
    uint64_t longest, unit; /* bytes of a read at most; offsets and sizes are multiples of `unit` */
    NlRoom room;
    NlRequest *requests, **idle, **ready;
    NlItem *items;
    NlRead *planned;
    int32_t *rows, *missing, *read_slots, *read_rows, *begins;
    uint8_t *wanted;
    NlCounters counters;
    NlCall call;
} NlFetch;

/* Gives it memory from an arena, for blocks of at most `neurons` neurons, with so many pages for
 * reads; `depth` and `longest` are set, and the pages have room for the longest. */
void nl_fetch_carve(NlFetch *fetch, NlArena *arena, uint64_t neurons, uint64_t pages);

/* Makes it as if nothing had been read; once before the first fetch. */
void nl_fetch_reset(NlFetch *fetch);

/* Bytes of a read of one bundle, wherever it lies. */
uint64_t nl_fetch_least(uint64_t stride);

/*
 * A fetch: begun with a list of slots that grows, told how many there are so far, ascending, as they become known, so that
 * reads start at once; and finished, when `use` is called with the bundles of all of them in groups. After an error the
 * cache may hold bundles that never came: the store must not be used again.
 */
void nl_fetch_begin(NlFetch *fetch, NlStore *store, const int32_t *slots, NlError *error);
int nl_fetch_more(NlFetch *fetch, size_t count);
int nl_fetch_finish(NlFetch *fetch, NlUse use, void *context);

/* Ends a fetch that is not to be finished. */
void nl_fetch_give_up(NlFetch *fetch);

/* Seconds of a clock that only goes forward. */
double nl_now(void);

#endif
