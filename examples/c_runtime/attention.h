/* Attention of a layer over the tokens so far: queries in groups that share keys, positions that turn them or not. */
#ifndef NL_ATTENTION_H
#define NL_ATTENTION_H

#include "linear.h"

/* Keys and values of a sequence, `[layers, context, width]` each in float32 or float16, and room for a batch. */
typedef struct {
    int kind; /* of kernels.h */
    uint64_t value_bytes;
    unsigned char *keys, *values;
    float *new_keys, *new_values; /* [tokens, width], before they are stored */
    uint64_t context, width;
    float *queries, *mixed;    /* [tokens, heads * head size] */
    float *cosines, *sines;    /* [tokens, head size / 2], of the batch's positions */
    float *scores;             /* [threads, heads taken together, context] */
    float *frequencies;        /* [head size / 2] */
} NlSequence;

/* Gives it memory from an arena, for batches of `batch` tokens. */
void nl_sequence_carve(NlSequence *sequence, NlArena *arena, const NlShape *shape, uint64_t batch, unsigned threads);

/* Computes how fast each pair of elements turns. */
void nl_sequence_start(NlSequence *sequence, const NlShape *shape);

/* Prepares a batch at positions `length` and following. */
void nl_sequence_turn(NlSequence *sequence, const NlShape *shape, uint64_t length, uint64_t tokens);

/* out = the attention of layer `layer` to `in`, `[tokens, hidden]` each, for tokens at positions from `length` on. */
void nl_attend(NlSequence *sequence, const NlShape *shape, const NlAttention *weights, uint64_t layer,
               const NlCompute *compute, uint64_t length, uint64_t tokens, const float *in, float *out);

#endif
