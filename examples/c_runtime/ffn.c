#include "ffn.h"

#include <math.h>
#include <string.h>

/* Weights worth sharing between threads. */
#define WORTH_SHARING (1u << 15)
/* Neurons that are used together. */
#define TOGETHER 4u

typedef struct {
    const NlFfn *ffn;
    const NlCompute *compute;
    const float *in, *values;
    float *sums;
    uint64_t tokens;
    const NlItem *items;
    size_t count;
} Run;

/* What the neuron in a slot gives for a token: the activated gate times up, or without a gate the activated up. */
static float product(const Run *run, float fired, float up) {
    if (run->ffn->up_activated) nl_activate(&run->ffn->activation, &up, 1);
    return fired * up;
}

/* One token: rows are used as they are stored, those of up to TOGETHER neurons together. */
static void use_once(const Run *run, const NlItem *items, uint64_t count, const NlPart *up, const NlPart *down,
                     float *sums) {
    const NlFfnWeights *weights = run->ffn->weights;
    const uint64_t hidden = weights->block.hidden, bundles = weights->block.bundles_offset;
    const float *bias = weights->biases[NL_UP].data;
    const unsigned char *rows[TOGETHER];
    float values[TOGETHER], dots[TOGETHER];
    for (uint64_t k = 0; k < count; k++) values[k] = run->values[items[k].slot];
    if (!up->resident) {
        for (uint64_t k = 0; k < count; k++) rows[k] = items[k].bundle + (up->offset - bundles);
        nl_multiply(run->compute, nl_kind(up->format), rows, count, hidden, run->in, dots);
        for (uint64_t k = 0; k < count; k++)
            values[k] = product(run, values[k], bias ? dots[k] + bias[items[k].slot] : dots[k]);
    }
    for (uint64_t k = 0; k < count; k++) rows[k] = items[k].bundle + (down->offset - bundles);
    nl_adds(run->compute->kernels, nl_kind(down->format), rows, count, hidden, values, sums);
}

/* Several tokens: rows are widened once for all of them. */
static void use_for_all(const Run *run, const NlItem *item, const NlPart *up, const NlPart *down, float *wide,
                        float *sums) {
    const NlFfnWeights *weights = run->ffn->weights;
    const uint64_t hidden = weights->block.hidden, bundles = weights->block.bundles_offset;
    const NlKernels *kernels = run->compute->kernels;
    float *column = wide + run->compute->widest;
    if (!up->resident) nl_widen(kernels, nl_kind(up->format), item->bundle + (up->offset - bundles), hidden, wide);
    nl_widen(kernels, nl_kind(down->format), item->bundle + (down->offset - bundles), hidden, column);
    for (uint64_t t = 0; t < run->tokens; t++) {
        float value = run->values[t * weights->block.neurons + (uint64_t)item->slot];
        if (value == 0) continue;
        if (!up->resident) {
            float dot = kernels->dot[NL_F32]((const unsigned char *)wide, hidden, run->in + t * hidden);
            const float *bias = weights->biases[NL_UP].data;
            value = product(run, value, bias ? dot + bias[item->slot] : dot);
        }
        kernels->add[NL_F32]((const unsigned char *)column, hidden, value, sums + t * hidden);
    }
}

static void compute_part(void *argument, unsigned thread, unsigned part, unsigned parts) {
    const Run *run = argument;
    const NlBlock *block = &run->ffn->weights->block;
    float *sums = run->sums + thread * run->tokens * block->hidden;
    float *wide = run->compute->scratch + 2 * thread * run->compute->widest;
    uint64_t begin, end;
    nl_share(run->count, part, parts, &begin, &end);
    if (run->tokens == 1) {
        for (uint64_t k = begin; k < end; k += TOGETHER)
            use_once(run, &run->items[k], end - k < TOGETHER ? end - k : TOGETHER, &block->parts[NL_UP],
                     &block->parts[NL_DOWN], sums);
        return;
    }
    for (uint64_t k = begin; k < end; k++)
        use_for_all(run, &run->items[k], &block->parts[NL_UP], &block->parts[NL_DOWN], wide, sums);
}

static void use_items(void *context, const NlItem *items, size_t count) {
    Run *run = context;
    run->items = items;
    run->count = count;
    if (count * run->ffn->weights->block.hidden * run->tokens < WORTH_SHARING) compute_part(run, 0, 0, 1);
    else nl_workers_do(run->compute->workers, compute_part, run);
}

/* Neurons of a block as their values become known. */
typedef struct {
    const NlFfn *ffn;
    NlFetch *fetch;
    const NlFfnRoom *room;
    uint64_t tokens;
    size_t fired;
    int strange; /* whether a value is not a number */
    NlError *error;
} Decide;

/* Activates the values of some neurons and sets those of neurons that do not fire to 0. */
static void decide(void *context, uint64_t first, uint64_t count) {
    Decide *job = context;
    const NlBlock *block = &job->ffn->weights->block;
    int strange = 0;
    for (uint64_t t = 0; t < job->tokens; t++) {
        float *values = job->room->values + t * block->neurons + first;
        nl_activate(&job->ffn->activation, values, count);
        for (uint64_t k = 0; k < count; k++) {
            strange |= isnan(values[k]);
            values[k] = (double)fabsf(values[k]) > block->threshold ? values[k] : 0;
        }
    }
    if (strange) __atomic_store_n(&job->strange, 1, __ATOMIC_RELAXED);
}

/* Some neurons are decided: lists those that fire for any token, and has them fetched. */
static int go_on(void *context, uint64_t first, uint64_t count) {
    Decide *job = context;
    const NlBlock *block = &job->ffn->weights->block;
    if (job->strange) return nl_fail(job->error, NL_BAD_LAYOUT, "a value of %s is not a number", block->id);
    for (uint64_t slot = first; slot < first + count; slot++) {
        for (uint64_t t = 0; t < job->tokens; t++) {
            if (job->room->values[t * block->neurons + slot] == 0) continue;
            job->room->slots[job->fired++] = (int32_t)slot;
            break;
        }
    }
    return nl_fetch_more(job->fetch, job->fired);
}

int nl_ffn_run(NlFfn *ffn, const NlCompute *compute, NlFetch *fetch, const NlFfnRoom *room, const float *in,
               uint64_t tokens, float *out, NlError *error) {
    const NlFfnWeights *weights = ffn->weights;
    const uint64_t hidden = weights->block.hidden, neurons = weights->block.neurons, size = tokens * hidden;
    const float *bias = weights->biases[weights->block.parts[NL_GATE].format ? NL_GATE : NL_UP].data;
    Run run = {ffn, compute, in, room->values, room->sums, tokens, NULL, 0};
    Decide job = {ffn, fetch, room, tokens, 0, 0, error};
    nl_fetch_begin(fetch, &ffn->store, room->slots, error);
    if (nl_linear_parts(compute, &weights->rows, bias, in, tokens, room->values, neurons, decide, go_on, &job) != 0) {
        nl_fetch_give_up(fetch);
        return -1;
    }
    if (tokens == 1) nl_prepare(compute, nl_kind(weights->block.parts[NL_UP].format), in, hidden);
    memset(room->sums, 0, compute->threads * size * sizeof *room->sums);
    if (nl_fetch_finish(fetch, use_items, &run) != 0) return -1;
    for (uint64_t k = 0; k < size; k++) {
        float sum = room->sums[k];
        for (unsigned part = 1; part < compute->threads; part++) sum += room->sums[part * size + k];
        out[k] = weights->biases[NL_DOWN].data ? sum + weights->biases[NL_DOWN].data[k % hidden] : sum;
    }
    return 0;
}
