/* What config.json says of a model: its kind and sizes. What this runtime does not compute is refused here, by name. */
#ifndef NL_SHAPE_H
#define NL_SHAPE_H

#include <stdint.h>

#include "error.h"

enum { NL_OPT, NL_LLAMA };

typedef struct {
    int family; /* NL_OPT, or NL_LLAMA for Llama, Mistral, Qwen and Mixtral */
    char type[64];
    uint64_t layers, hidden, heads, kv_heads, head_size, positions;
    float epsilon; /* of the norms */
    int biased, output_biased; /* whether queries, keys and values have biases, and the output of attention */
    int tied;      /* whether the output head is the embedding, unless there is a tensor for it with other values */
    /* OPT */
    int norm_first, last_norm;
    uint64_t embedded; /* width of the embedding */
    /* Llama */
    float base, cut;
    int up_activated; /* dReLU: the activation is applied to up too */
    enum { NL_ROPE_PLAIN, NL_ROPE_LINEAR, NL_ROPE_LLAMA3 } rope;
    float factor, low_factor, high_factor, original_positions;
    uint64_t experts, used_experts; /* of a layer with routed experts, and how many of them a token uses; else 0 */
    int scores_add_up;              /* whether the scores of the used experts are scaled to a sum of 1 */
    uint64_t window, first_windowed; /* tokens that layers from `first_windowed` on look back at, 0 for all */
} NlShape;

/* Reads DIRECTORY/config.json. `type` is the model type that the index states. */
int nl_shape_read(const char *directory, const char *type, NlShape *shape, NlError *error);

#endif
