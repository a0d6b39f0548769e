/*
 * Which bundles of a block stay in memory between tokens: the pinned ones, and what S3-FIFO keeps of the others (Yang et
 * al., SOSP '23). New neurons enter a small queue of a tenth of the rows. At its end, neurons used at least twice move
 * to the main queue; the others are evicted and remembered by their number. One that comes back while remembered enters
 * the main queue at once. At the end of the main queue, each counted use buys another round. Admission is aligned to
 * linking: neurons of runs enter with lower probability, since reading them again is cheap and a run with holes is read
 * in pieces. Every decision is that of neuralink_cli/storage/cache_kernels.py, which the tests compare.
 *
 * It holds no weights: the caller has a pool of rows. For every token first look up what fires, use the rows found, then
 * admit what was read, which may give rows to other neurons.
 */
#ifndef NL_CACHE_H
#define NL_CACHE_H

#include <stddef.h>
#include <stdint.h>

typedef struct {
    int32_t *slots;
    int64_t room, first, count;
} NlRing;

typedef struct {
    int64_t neurons, pinned, small_target, ghosts, ghost_clock, free_rows, token;
    int64_t run_length;     /* runs of at least as many are admitted at random; 0 for none */
    uint64_t admit_below;   /* of 2^32 */
    uint64_t looked_up, hits;
    int64_t *stamp;         /* by slot: how many ghosts there were when it became one */
    int32_t *row_of, *free; /* by slot: its row or -1; the stack of unused rows */
    NlRing small, main;
    uint8_t *frequency; /* by slot: uses since admission, at most 3 */
} NlCache;

/* Bytes that the tables of a cache take: `rows` rows, the first `pinned` of them for slots 0 to `pinned` - 1. */
size_t nl_cache_bytes(uint64_t neurons, uint64_t rows, uint64_t pinned);

/* Starts a cache in `memory`, which has nl_cache_bytes and the alignment of an int64_t. */
void nl_cache_start(NlCache *cache, void *memory, uint64_t neurons, uint64_t rows, uint64_t pinned,
                    uint64_t run_length, double admission);

/* Starts a token. */
void nl_cache_next(NlCache *cache);

/* The row of each slot that the token uses, or -1; in one go or in parts. Slots are ascending. */
void nl_cache_look_up(NlCache *cache, const int32_t *slots, size_t count, int32_t *rows);

/* Offers the slots that were read for the token, ascending; those with `wanted` 0 were only brought along. Gives the row
 * to copy each bundle to, all different, or -1. */
void nl_cache_admit(NlCache *cache, const int32_t *slots, const uint8_t *wanted, size_t count, int32_t *rows);

#endif
