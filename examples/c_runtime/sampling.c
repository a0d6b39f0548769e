#include <math.h>
#include <stdlib.h>

#include "model.h"

static uint32_t likeliest(const float *logits, uint64_t count) {
    uint64_t best = 0;
    for (uint64_t k = 1; k < count; k++)
        if (logits[k] > logits[best]) best = k;
    return (uint32_t)best;
}

/* The likeliest first; of equals, the smaller token. */
static int compare(const void *a, const void *b) {
    const NlCandidate *one = a, *other = b;
    if (one->value != other->value) return one->value > other->value ? -1 : 1;
    return one->token < other->token ? -1 : 1;
}

/* In [0, 1), by SplitMix64. */
static double draw(uint64_t *state) {
    uint64_t mixed = *state += UINT64_C(0x9E3779B97F4A7C15);
    mixed = (mixed ^ mixed >> 30) * UINT64_C(0xBF58476D1CE4E5B9);
    mixed = (mixed ^ mixed >> 27) * UINT64_C(0x94D049BB133111EB);
    return (double)((mixed ^ mixed >> 31) >> 11) * 0x1p-53;
}

uint32_t nl_choose(NlModel *model, NlSampling *sampling) {
    NlCandidate *candidates = model->candidates;
    uint64_t count = model->vocabulary, kept = 0;
    double sum = 0, reached = 0, point;
    uint32_t best = likeliest(model->logits, count);
    if (!(sampling->temperature > 0)) return best;
    for (uint64_t k = 0; k < count; k++) {
        candidates[k].token = (uint32_t)k;
        candidates[k].value = expf((model->logits[k] - model->logits[best]) / sampling->temperature);
        if (isnan(candidates[k].value)) candidates[k].value = 0;
    }
    qsort(candidates, (size_t)count, sizeof *candidates, compare);
    if (sampling->top_k && sampling->top_k < count) count = sampling->top_k;
    for (uint64_t k = 0; k < count; k++) sum += (double)candidates[k].value;
    /* Every token is kept until those before it have the probability. */
    for (; kept < count && (kept == 0 || reached < (double)sampling->top_p * sum); kept++)
        reached += (double)candidates[kept].value;
    point = draw(&sampling->seed) * reached;
    for (uint64_t k = 0; k < kept; k++) {
        point -= (double)candidates[k].value;
        if (point < 0) return candidates[k].token;
    }
    return candidates[0].token;
}
