/* Plans the reads that fetch bundles: neighbours together, and across gaps of unwanted bundles where that pays. */
#ifndef NL_PLANNING_H
#define NL_PLANNING_H

#include <stddef.h>
#include <stdint.h>

/* A read brings the slots `first` to `first` + `count` - 1. */
typedef struct {
    int32_t first, count;
} NlRead;

/*
 * The reads that bring `slots` (ascending, each once), across every gap of at most `gap` slots, in pieces of at most
 * `most` slots. `reads` has `planned` of them, for slots before these, and room for one more per slot; the last of them may
 * become longer. Returns how many there are then. A piece begins and ends with a slot that is asked for.
 */
size_t nl_plan_reads(const int32_t *slots, size_t count, uint64_t gap, int32_t most, NlRead *reads, size_t planned);

#endif
