#include "planning.h"

size_t nl_plan_reads(const int32_t *slots, size_t count, uint64_t gap, int32_t most, NlRead *reads, size_t planned) {
    for (size_t k = 0; k < count; k++) {
        NlRead *last = planned ? &reads[planned - 1] : NULL;
        /* Within a read's reach, and no longer with it than a read may be. */
        if (last && (uint64_t)(slots[k] - (last->first + last->count)) <= gap && slots[k] - last->first < most) {
            last->count = slots[k] - last->first + 1;
        } else {
            reads[planned].first = slots[k];
            reads[planned++].count = 1;
        }
    }
    return planned;
}
