/* Which weights are read anew for every token, if not all of them fit in memory. */
#include <stdlib.h>

#include "weights.h"

uint64_t nl_weights_most(const NlWeights *weights) {
    return weights->count * (weights->routed > 5 ? weights->routed : 5) + 3;
}

uint64_t nl_weights_order(NlWeights *weights, NlMatrix **all) {
    uint64_t count = 0;
    if (weights->project_in.at.format) all[count++] = &weights->project_in;
    for (uint64_t k = 0; k < weights->count; k++) {
        NlAttention *of = &weights->layers[k];
        NlMatrix *used[] = {&of->queries, &of->keys, &of->values, &of->output};
        const NlRouting *routing = &weights->routing[k];
        int32_t always = routing->plain >= 0 ? routing->plain : routing->shared;
        for (unsigned m = 0; m < 4; m++) all[count++] = used[m];
        /* Which experts a token is routed to is not known ahead. */
        if (always >= 0) all[count++] = &weights->ffn[always].rows;
    }
    if (weights->project_out.at.format) all[count++] = &weights->project_out;
    all[count++] = weights->head.at.format ? &weights->head : &weights->embedding;
    return count;
}

static uint64_t bytes_of(const NlMatrix *matrix) { return matrix->at.rows * matrix->at.row_bytes; }

/* Marks matrices that save `bytes`, hardly more, and spread evenly over a token: there is then always something to read
 * while others are computed. Returns what they save. */
static uint64_t mark_evenly(NlMatrix **all, uint64_t count, uint64_t bytes) {
    uint64_t total = 0, passed = 0, marked = 0;
    for (uint64_t k = 0; k < count; k++) total += bytes_of(all[k]);
    for (uint64_t k = 0; k < count; k++) {
        const uint64_t size = bytes_of(all[k]);
        passed += size;
        all[k]->streamed = bytes >= total || (double)marked + (double)size / 2 <= (double)bytes / (double)total * (double)passed;
        if (all[k]->streamed) marked += size;
    }
    while (marked < bytes && marked < total) { /* the smallest that is enough, or else the largest */
        const uint64_t missing = bytes - marked;
        NlMatrix *best = NULL;
        for (uint64_t k = 0; k < count; k++) {
            const uint64_t size = bytes_of(all[k]), before = best ? bytes_of(best) : 0;
            if (all[k]->streamed) continue;
            if (!best || (size >= missing ? before < missing || size < before : before < missing && size > before)) best = all[k];
        }
        best->streamed = 1;
        marked += bytes_of(best);
    }
    for (uint64_t k = 0; k < count; k++) { /* and none that is not needed */
        if (!all[k]->streamed || marked - bytes_of(all[k]) < bytes) continue;
        all[k]->streamed = 0;
        marked -= bytes_of(all[k]);
    }
    return marked;
}

/* The rows of all routed experts, layer by layer; `all` has room for nl_weights_most of them. */
static uint64_t routed_rows(NlWeights *weights, NlMatrix **all) {
    uint64_t count = 0;
    for (uint64_t k = 0; k < weights->count; k++)
        for (uint64_t e = 0; weights->routing[k].experts && e < weights->routed; e++)
            all[count++] = &weights->ffn[weights->routing[k].experts[e]].rows;
    return count;
}

uint64_t nl_weights_stream(NlWeights *weights, uint64_t bytes, uint64_t *read) {
    NlMatrix **all = calloc((size_t)nl_weights_most(weights), sizeof *all);
    uint64_t saved = 0, count;
    *read = 0;
    if (!all) return 0;
    count = nl_weights_order(weights, all);
    for (uint64_t k = 0; k < count; k++) all[k]->streamed = 0;
    count = routed_rows(weights, all);
    for (uint64_t k = 0; k < count; k++) all[k]->streamed = 0;
    weights->embedding.streamed = weights->positions.streamed = 0;
    if (weights->head.at.format) { /* else the embedding is the head too */
        weights->embedding.streamed = saved < bytes;
        saved += saved < bytes ? bytes_of(&weights->embedding) : 0;
    }
    if (weights->positions.at.format && saved < bytes) {
        weights->positions.streamed = 1;
        saved += bytes_of(&weights->positions);
    }
    if (saved < bytes && count) {
        uint64_t marked = mark_evenly(all, count, bytes - saved);
        for (uint64_t k = 0; k < count; k++) all[k]->streamed *= NL_ON_DEMAND;
        saved += marked;
        *read = marked * weights->used / weights->routed;
    }
    if (saved < bytes) {
        uint64_t marked = mark_evenly(all, nl_weights_order(weights, all), bytes - saved);
        saved += marked;
        *read += marked;
    }
    free(all);
    return saved;
}
