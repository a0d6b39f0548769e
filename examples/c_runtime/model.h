/* An open model: everything that neuralink.h promises hangs on it. */
#ifndef NL_MODEL_H
#define NL_MODEL_H

#include "attention.h"
#include "direct.h"
#include "ffn.h"

typedef struct {
    float value;
    uint32_t token;
} NlCandidate;

/* How likely a token was, while its logits are computed a part at a time. */
typedef struct {
    double sum; /* of exp(logit - highest) so far */
    float highest, came;
} NlSurprise;

/* Room for a batch in a layer with experts. */
typedef struct {
    float *scores;    /* [tokens, experts] */
    float *shares;    /* [tokens, used experts], what the output of each is multiplied by */
    uint32_t *chosen; /* [tokens, used experts] */
    uint32_t *tokens; /* those that an expert runs on */
    float *in, *out;  /* [tokens, hidden], of these */
    const NlMatrix **wanted; /* [experts], rows that are not in memory and have to be read */
} NlMixture;

struct NlModel {
    NlShape shape;
    NlIndex index;
    NlWeights weights;
    NlMemory memory;
    NlOptions options;
    NlError error; /* of nl_open, and of what made the model unusable */
    NlSource source; /* what bundles are read from */
    NlArena arena;
    NlCompute compute;
    NlFetch fetch;
    NlSequence sequence;
    NlFfn *ffn;            /* by block */
    uint64_t *capacities;  /* by block: bundles that the cache has room for */
    unsigned char *caches; /* tables and pools of all blocks */
    uint64_t cache_bytes;
    NlMatrix **streamed_order; /* matrices that are read anew for every token, in the order in which it uses them */
    uint64_t streamed_count, stream_usual, stream_bytes; /* of a buffer: about, and exactly */
    unsigned char *stream_memory;
    uint64_t routed_bytes; /* the same for rows of routed experts; 0 if all of them are in memory */
    unsigned char *routed_memory;
    NlFfnRoom room;
    NlMixture mixture;
    float *states, *normed, *changes; /* [batch, hidden]; `normed` also has room for the width of the embedding */
    float *logits;                    /* [vocabulary], but at least [batch] */
    NlSurprise *surprises;            /* [batch] */
    NlCandidate *candidates;          /* [vocabulary], for sampling */
    uint64_t vocabulary;
    uint32_t length;
};

/* Decides batch, room for reads and the capacity of every cache, and fills model->memory. Weights must be found. */
int nl_plan_memory(NlModel *model, NlError *error);

/* Gives everything but the caches its memory, with so many pages for reads of bundles. */
void nl_model_carve(NlModel *model, NlArena *arena, uint64_t batch, uint64_t pages);

/* The FFN of a layer: its block, or the experts that each token is routed to. `[tokens, hidden]` in and out. */
int nl_layer_ffn(NlModel *model, uint64_t layer, const float *in, uint64_t tokens, float *out, NlError *error);

/* The logits after a token of the batch whose states are there; those states are spent. */
void nl_logits(NlModel *model, uint64_t token);

/* Adds the negative log-likelihoods of the tokens that came after the first `count` of the batch. The logits are never all
 * there: as many at a time as fit in model->logits. -1 if a matrix could not be read, as compute->failed says. */
int nl_surprises(NlModel *model, const uint32_t *targets, uint64_t count, double *sum);

/* Starts the caches with the planned capacities, and reads the pinned bundles. */
int nl_start_caches(NlModel *model, NlError *error);

#endif
