/* The index of a flash layout, model.flash.json: what its blocks are and where their weights lie. docs/format.md
 * describes every field. Everything that a read relies on is checked against the size of the file. */
#ifndef NL_INDEX_H
#define NL_INDEX_H

#include "files.h"
#include "weight_formats.h"

#define NL_INDEX_NAME "model.flash.json"

enum { NL_GATE, NL_UP, NL_DOWN, NL_ROLES };
extern const char *const NL_ROLE_NAMES[NL_ROLES];

/* Where the weights of one role are: `bytes` of every neuron, the one in slot k at `offset` + k * `pitch`. */
typedef struct {
    const NlFormat *format; /* NULL if the block has none */
    uint64_t bytes, offset, pitch;
    int resident; /* whether they are rows for memory, not parts of the bundles */
} NlPart;

/* A bias: one element for every slot, or for every element of the output (NL_DOWN). */
typedef struct {
    const NlFormat *format; /* NULL if there is none */
    uint64_t offset;
} NlBias;

/* A block. Offsets are absolute in the flash file. */
typedef struct {
    char id[208], activation[64];
    uint64_t neurons, hidden, stride, bundles_offset, order_offset, frequency_offset;
    const NlFormat *source; /* of weights that are not rounded */
    NlPart parts[NL_ROLES];
    NlBias biases[NL_ROLES];
    double threshold;
    uint64_t pinned, gap; /* gaps of up to `gap` slots are worth reading across */
    int expert;           /* whether it runs on some tokens only */
} NlBlock;

/* An open layout. */
typedef struct {
    NlJson json; /* the index */
    int file;    /* the flash file, through the page cache */
    uint64_t file_bytes;
    char name[256]; /* of the flash file */
    char model_type[64];
} NlIndex;

/* Opens index and file, and checks that they fit. Close it also after an error. */
int nl_index_open(NlIndex *index, const char *directory, NlError *error);
void nl_index_close(NlIndex *index);

/* Goes to the first (`first`) or next block, whose object *at becomes. 1, 0 at the end, -1 on error. */
int nl_index_next(const NlIndex *index, const char **at, int first);

/* What is needed to read the block whose object this is; with `whole`, also what is needed to compute it. */
int nl_index_block(const NlIndex *index, const char *object, NlBlock *block, int whole);

/* Reads how many neurons of a block fire for a token, on average over the tokens that made the order. */
int nl_index_firing(const NlIndex *index, const NlBlock *block, double *neurons, NlError *error);

/* Reads a block's order: slots[neuron] = slot. An error if it is no permutation. */
int nl_index_slots(const NlIndex *index, const NlBlock *block, uint32_t *slots);

#endif
