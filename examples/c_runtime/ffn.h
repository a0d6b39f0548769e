/* A sparse FFN block: resident rows tell which neurons fire, and only the bundles of those are fetched. */
#ifndef NL_FFN_H
#define NL_FFN_H

#include "activations.h"
#include "fetch.h"
#include "linear.h"

typedef struct {
    const NlFfnWeights *weights;
    NlActivation activation;
    int up_activated;
    NlStore store;
} NlFfn;

/* Room for a batch: values of all neurons `[tokens, neurons]`, sums `[threads, tokens, hidden]`, the slots that fire. */
typedef struct {
    float *values, *sums;
    int32_t *slots;
} NlFfnRoom;

/* out = the block of in, both `[tokens, hidden]`. */
int nl_ffn_run(NlFfn *ffn, const NlCompute *compute, NlFetch *fetch, const NlFfnRoom *room, const float *in,
               uint64_t tokens, float *out, NlError *error);

#endif
