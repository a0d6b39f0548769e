/* The weights outside of bundles: where they are in the file, and in memory. */
#ifndef NL_WEIGHTS_H
#define NL_WEIGHTS_H

#include "arena.h"
#include "kernels.h"
#include "shape.h"
#include "tensors.h"

#define NL_ON_DEMAND 2

/* Rows of weights as they are stored; `data` is NULL if there are none. */
typedef struct {
    NlTensor at;
    int kind; /* of kernels.h */
    int streamed; /* read anew whenever it is used, see stream.h: there is no data in memory; NL_ON_DEMAND if a token may
                     do without it */
    const unsigned char *data;
} NlMatrix;

/* Float32 values, widened when they are read. */
typedef struct {
    NlTensor at;
    float *data;
} NlVector;

typedef struct {
    NlVector norm, bias;
} NlNorm;

typedef struct {
    NlNorm before_attention, before_ffn, of_queries, of_keys;
    NlMatrix queries, keys, values, output;
    NlVector query_bias, key_bias, value_bias, output_bias;
} NlAttention;

/* What the FFN block of a layer keeps in memory: the rows that decide firing, and biases. */
typedef struct {
    NlBlock block;
    NlMatrix rows;
    NlVector biases[NL_ROLES];
} NlFfnWeights;

/* Which blocks are the FFN of a layer: one, or experts and perhaps one that all tokens share; -1 for none. */
typedef struct {
    int32_t plain, shared;
    int32_t *experts; /* by number; NULL if the layer has none */
    NlMatrix router, shared_gate;
} NlRouting;

typedef struct {
    NlMatrix embedding, positions, project_in, project_out, head; /* `head` has no data of its own if it is tied */
    NlNorm last_norm;
    NlAttention *layers;
    NlRouting *routing;
    NlFfnWeights *ffn; /* by block, in the order of the index */
    int32_t *experts;  /* of all layers */
    uint64_t count, blocks; /* of layers; of blocks */
    uint64_t routed, used;  /* experts of a layer that has them, and how many of them a token uses */
    int held;       /* whether dense weights are read, not mapped */
    const unsigned char *mapping;
    uint64_t mapped; /* bytes of it */
} NlWeights;

/* Finds all tensors and checks their sizes; nothing is read. Close it also after an error. */
int nl_weights_find(NlWeights *weights, const NlIndex *index, const NlTensors *tensors, const NlShape *shape,
                    NlError *error);

/* Matrices in the order in which a token uses all of their rows; `all` has room for nl_weights_most of them. Returns how
 * many there are. */
uint64_t nl_weights_most(const NlWeights *weights);
uint64_t nl_weights_order(NlWeights *weights, NlMatrix **all);

/* Marks matrices as streamed, as few as save `bytes` of memory, evenly over a token, and fills in how many bytes a token
 * then reads on average. First those of which a token only needs a row, and nothing else is read; then the rows of routed
 * experts, of which it needs those of the experts that are chosen; then the others. Returns the bytes saved. */
uint64_t nl_weights_stream(NlWeights *weights, uint64_t bytes, uint64_t *read);

/* Gives every weight its memory from an arena; twice, see arena.h. */
void nl_weights_carve(NlWeights *weights, NlArena *arena);

/* Reads, or maps, all weights. */
int nl_weights_read(NlWeights *weights, const NlIndex *index, NlError *error);

void nl_weights_close(NlWeights *weights);

#endif
