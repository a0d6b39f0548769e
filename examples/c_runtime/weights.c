#define _GNU_SOURCE
#define _FILE_OFFSET_BITS 64
#include "weights.h"

#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#define MOST_EXPERTS ((size_t)1 << 20)

/* Where names are looked up, and in what. */
typedef struct {
    const NlTensors *tensors;
    const char *prefix; /* of the whole model */
    char stem[160];     /* prefix and layer */
    NlError *error;
} Finder;

static int find(const Finder *finder, const char *stem, const char *name, NlTensor *tensor) {
    char full[300];
    snprintf(full, sizeof full, "%s%s", stem, name);
    return nl_tensors_find(finder->tensors, full, tensor);
}

/* A matrix of `rows` x `columns`. It may be missing if `rows` is 0 or `optional`. */
static int matrix(const Finder *finder, const char *stem, const char *name, uint64_t rows, uint64_t columns,
                  int optional, NlMatrix *out) {
    if (find(finder, stem, name, &out->at) != 0) return -1;
    if (!out->at.format)
        return optional ? 0 : nl_fail(finder->error, NL_BAD_LAYOUT, "the layout has no %s%s", stem, name);
    if (out->at.columns != columns || (rows && out->at.rows != rows))
        return nl_fail(finder->error, NL_BAD_LAYOUT, "%s%s is of %" PRIu64 " x %" PRIu64 ", not %" PRIu64 " x %" PRIu64,
                       stem, name, out->at.rows, out->at.columns, rows, columns);
    if ((out->kind = nl_kind(out->at.format)) < 0)
        return nl_fail(finder->error, NL_NOT_SUPPORTED, "%s%s has dtype %s, which is not computed with", stem, name,
                       out->at.format->name);
    return 0;
}

static int vector(const Finder *finder, const char *stem, const char *name, uint64_t columns, int optional,
                  NlVector *out) {
    NlMatrix found = {0};
    if (matrix(finder, stem, name, 1, columns, optional, &found) != 0) return -1;
    out->at = found.at;
    return 0;
}

static int norm(const Finder *finder, const char *stem, const char *name, uint64_t size, int optional, NlNorm *out) {
    char full[96];
    snprintf(full, sizeof full, "%s.weight", name);
    if (vector(finder, stem, full, size, optional, &out->norm) != 0) return -1;
    snprintf(full, sizeof full, "%s.bias", name);
    return vector(finder, stem, full, size, 1, &out->bias);
}

static int projection(const Finder *finder, const char *name, uint64_t rows, uint64_t columns, int biased,
                      NlMatrix *weight, NlVector *bias) {
    char full[96];
    snprintf(full, sizeof full, "self_attn.%s.weight", name);
    if (matrix(finder, finder->stem, full, rows, columns, 0, weight) != 0) return -1;
    snprintf(full, sizeof full, "self_attn.%s.bias", name);
    if (vector(finder, finder->stem, full, rows, 1, bias) != 0) return -1;
    /* transformers leaves out what config.json does not speak of: to compute with it would be another model. */
    if (bias->at.format && !biased)
        return nl_fail(finder->error, NL_BAD_LAYOUT, "the layout has %s%s, and config.json says that there is none",
                       finder->stem, full);
    return 0;
}

static int find_attention(const Finder *finder, const NlShape *shape, NlAttention *layer) {
    const char *stem = finder->stem;
    uint64_t width = shape->heads * shape->head_size, narrow = shape->kv_heads * shape->head_size;
    int opt = shape->family == NL_OPT;
    if (norm(finder, stem, opt ? "self_attn_layer_norm" : "input_layernorm", shape->hidden, 0,
             &layer->before_attention) != 0 ||
        norm(finder, stem, opt ? "final_layer_norm" : "post_attention_layernorm", shape->hidden, 0,
             &layer->before_ffn) != 0 ||
        projection(finder, "q_proj", width, shape->hidden, shape->biased, &layer->queries, &layer->query_bias) != 0 ||
        projection(finder, "k_proj", narrow, shape->hidden, shape->biased, &layer->keys, &layer->key_bias) != 0 ||
        projection(finder, "v_proj", narrow, shape->hidden, shape->biased, &layer->values, &layer->value_bias) != 0 ||
        projection(finder, opt ? "out_proj" : "o_proj", shape->hidden, width, shape->output_biased, &layer->output,
                   &layer->output_bias) != 0)
        return -1;
    if (strcmp(shape->type, "qwen3") != 0 && strcmp(shape->type, "qwen3_moe") != 0) return 0;
    if (norm(finder, stem, "self_attn.q_norm", shape->head_size, 0, &layer->of_queries) != 0) return -1;
    return norm(finder, stem, "self_attn.k_norm", shape->head_size, 0, &layer->of_keys);
}

/* Whether two tensors hold the same: 1 or 0; -1 after an error. */
static int same(const Finder *finder, const NlTensor *one, const NlTensor *other) {
    unsigned char left[1 << 14], right[sizeof left];
    uint64_t bytes = one->rows * one->row_bytes;
    int file = finder->tensors->index->file;
    if (one->format != other->format || one->rows != other->rows || one->columns != other->columns) return 0;
    for (uint64_t at = 0, some; at < bytes; at += some) {
        some = bytes - at < sizeof left ? bytes - at : sizeof left;
        if (nl_read_at(file, left, some, one->offset + at, finder->error) != 0 ||
            nl_read_at(file, right, some, other->offset + at, finder->error) != 0)
            return -1;
        if (memcmp(left, right, (size_t)some) != 0) return 0;
    }
    return 1;
}

/* Whether the output head is the embedding: 1 or 0; -1 after an error. transformers does not tie what is stored with
 * other values, whatever the config says. */
static int is_tied(const Finder *finder, const NlShape *shape, const NlTensor *embedding) {
    NlTensor head;
    if (!shape->tied) return 0;
    if (find(finder, "", "lm_head.weight", &head) != 0) return -1;
    return head.format ? same(finder, &head, embedding) : 1;
}

static int find_embeddings(const Finder *finder, const NlShape *shape, NlWeights *weights) {
    const char *stem = finder->prefix;
    int opt = shape->family == NL_OPT, tied;
    uint64_t width = opt ? shape->embedded : shape->hidden;
    if (matrix(finder, stem, "embed_tokens.weight", 0, width, 0, &weights->embedding) != 0) return -1;
    if (opt) {
        int same = width == shape->hidden;
        if (matrix(finder, stem, "embed_positions.weight", shape->positions + 2, shape->hidden, 0,
                   &weights->positions) != 0 ||
            (!same && (matrix(finder, stem, "project_in.weight", shape->hidden, width, 0, &weights->project_in) != 0 ||
                       matrix(finder, stem, "project_out.weight", width, shape->hidden, 0, &weights->project_out) != 0)))
            return -1;
    }
    if ((!opt || shape->last_norm) &&
        norm(finder, stem, opt ? "final_layer_norm" : "norm", shape->hidden, 0, &weights->last_norm) != 0)
        return -1;
    if ((tied = is_tied(finder, shape, &weights->embedding.at)) != 0) return tied < 0 ? -1 : 0;
    return matrix(finder, "", "lm_head.weight", weights->embedding.at.rows, width, 0, &weights->head);
}

/* Which FFN a block is, by its id: `layers.3`, `layers.3.experts.7` or `layers.3.shared_expert`. */
static int place_block(NlWeights *weights, const NlShape *shape, const char *id, int32_t number, NlError *error) {
    int32_t *place = NULL;
    unsigned long layer, expert;
    char *rest;
    if (!strncmp(id, "layers.", 7) && id[7] >= '0' && id[7] <= '9' && (layer = strtoul(id + 7, &rest, 10)) < weights->count) {
        NlRouting *routing = &weights->routing[layer];
        if (!*rest) place = &routing->plain;
        else if (!strcmp(rest, ".shared_expert") && shape->experts) place = &routing->shared;
        else if (!strncmp(rest, ".experts.", 9) && rest[9] >= '0' && rest[9] <= '9') {
            expert = strtoul(rest + 9, &rest, 10);
            if (!*rest && expert < shape->experts) {
                if (!routing->experts) routing->experts = weights->experts + layer * shape->experts;
                place = &routing->experts[expert];
            }
        }
    }
    if (!place) return nl_fail(error, NL_NOT_SUPPORTED, "a block %s is not supported in this model", id);
    if (*place >= 0) return nl_fail(error, NL_BAD_LAYOUT, "the block %s is there twice", id);
    *place = number;
    return 0;
}

/* A block of the index. */
static int enter_block(const NlIndex *index, const char *at, const NlShape *shape, NlWeights *weights, int32_t number) {
    NlError *error = index->json.error;
    NlFfnWeights *ffn = &weights->ffn[number];
    NlBlock block;
    int decides = shape->family == NL_OPT ? NL_UP : NL_GATE;
    if (nl_index_block(index, at, &block, 1) != 0) return -1;
    if (place_block(weights, shape, block.id, number, error) != 0) return -1;
    ffn->block = block;
    if (block.hidden != shape->hidden)
        return nl_fail(error, NL_BAD_LAYOUT, "%s has rows of another size than the model", block.id);
    for (int role = 0; role < NL_ROLES; role++) {
        const NlPart *part = &ffn->block.parts[role];
        const NlBias *bias = &ffn->block.biases[role];
        int wanted = role != NL_GATE || decides == NL_GATE;
        if (wanted != (part->format != NULL) || (wanted && part->resident != (role == decides)))
            return nl_fail(error, NL_NOT_SUPPORTED, "%s: relayout with --resident gate, which this runtime needs", block.id);
        if (part->format && nl_kind(part->format) < 0)
            return nl_fail(error, NL_NOT_SUPPORTED, "%s has weights of dtype %s, which are not computed with", block.id,
                           part->format->name);
        if (bias->format && nl_kind(bias->format) < 0)
            return nl_fail(error, NL_NOT_SUPPORTED, "%s has a bias of dtype %s", block.id, bias->format->name);
        if (bias->format) {
            NlTensor *to = &ffn->biases[role].at;
            to->format = bias->format;
            to->rows = 1;
            to->columns = role == NL_DOWN ? block.hidden : block.neurons;
            to->row_bytes = to->columns * bias->format->block_bytes;
            to->offset = bias->offset;
        }
    }
    ffn->rows.kind = nl_kind(block.parts[decides].format);
    ffn->rows.at = (NlTensor){block.parts[decides].format, block.neurons, block.hidden, block.parts[decides].bytes,
                              block.parts[decides].offset};
    return 0;
}

/* What sends tokens to the experts of a layer, all of which must be there. */
static int find_routing(Finder *finder, const NlShape *shape, NlWeights *weights, uint64_t layer) {
    NlRouting *routing = &weights->routing[layer];
    if (routing->plain >= 0) return 0;
    if (!routing->experts)
        return nl_fail(finder->error, NL_NOT_SUPPORTED, "the FFN of layer %" PRIu64 " is no block of the layout", layer);
    for (uint64_t k = 0; k < shape->experts; k++)
        if (routing->experts[k] < 0)
            return nl_fail(finder->error, NL_NOT_SUPPORTED, "expert %" PRIu64 " of layer %" PRIu64 " is no block of the layout",
                           k, layer);
    snprintf(finder->stem, sizeof finder->stem, "%slayers.%" PRIu64 ".", finder->prefix, layer);
    if (matrix(finder, finder->stem, "block_sparse_moe.gate.weight", shape->experts, shape->hidden, 1,
               &routing->router) != 0 ||
        (!routing->router.at.format &&
         matrix(finder, finder->stem, "mlp.gate.weight", shape->experts, shape->hidden, 0, &routing->router) != 0))
        return -1;
    if (routing->shared < 0) return 0;
    return matrix(finder, finder->stem, "mlp.shared_expert_gate.weight", 1, shape->hidden, 0, &routing->shared_gate);
}

int nl_weights_find(NlWeights *weights, const NlIndex *index, const NlTensors *tensors, const NlShape *shape,
                    NlError *error) {
    static const char *const prefixes[2][3] = {{"model.decoder.", "decoder.", NULL}, {"model.", "", NULL}};
    const char *const *prefix = prefixes[shape->family == NL_OPT ? 0 : 1], *at;
    Finder finder = {tensors, NULL, "", error};
    NlTensor tensor;
    int32_t number = 0;
    size_t experts;
    int more;
    memset(weights, 0, sizeof *weights);
    if (shape->layers > 4096) return nl_fail(error, NL_BAD_LAYOUT, "%" PRIu64 " layers", shape->layers);
    weights->count = shape->layers;
    weights->routed = shape->experts;
    weights->used = shape->used_experts;
    for (more = nl_index_next(index, &at, 1); more > 0; more = nl_index_next(index, &at, 0)) weights->blocks++;
    if (more < 0) return -1;
    experts = (size_t)(weights->count * shape->experts);
    if (experts > MOST_EXPERTS) return nl_fail(error, NL_BAD_LAYOUT, "%zu experts", experts);
    weights->layers = calloc((size_t)weights->count, sizeof *weights->layers);
    weights->routing = calloc((size_t)weights->count, sizeof *weights->routing);
    weights->ffn = calloc((size_t)weights->blocks + 1, sizeof *weights->ffn);
    weights->experts = malloc((experts + 1) * sizeof *weights->experts);
    if (!weights->layers || !weights->routing || !weights->ffn || !weights->experts)
        return nl_fail(error, NL_NO_MEMORY, "out of memory");
    memset(weights->experts, 0xff, experts * sizeof *weights->experts); /* -1 */
    for (uint64_t k = 0; k < weights->count; k++) weights->routing[k].plain = weights->routing[k].shared = -1;
    for (; *prefix; prefix++) {
        if (find(&finder, *prefix, "embed_tokens.weight", &tensor) != 0) return -1;
        if (tensor.format) break;
    }
    if (!*prefix) return nl_fail(error, NL_BAD_LAYOUT, "the layout has no embedding of tokens");
    finder.prefix = *prefix;
    if (find_embeddings(&finder, shape, weights) != 0) return -1;
    for (uint64_t layer = 0; layer < weights->count; layer++) {
        snprintf(finder.stem, sizeof finder.stem, "%slayers.%" PRIu64 ".", finder.prefix, layer);
        if (find_attention(&finder, shape, &weights->layers[layer]) != 0) return -1;
    }
    for (more = nl_index_next(index, &at, 1); more > 0; more = nl_index_next(index, &at, 0))
        if (enter_block(index, at, shape, weights, number++) != 0) return -1;
    if (more < 0) return -1;
    for (uint64_t layer = 0; layer < weights->count; layer++)
        if (find_routing(&finder, shape, weights, layer) != 0) return -1;
    return 0;
}

/* Calls one of two functions for every weight. */
typedef struct {
    int (*matrix)(void *context, int use, NlMatrix *matrix);
    int (*vector)(void *context, int use, NlVector *vector);
    void *context;
} Visitor;

static int visit_matrices(const Visitor *visit, int use, NlMatrix *const *all, int count) {
    for (int k = 0; k < count; k++)
        if (all[k]->at.format && visit->matrix(visit->context, use, all[k]) != 0) return -1;
    return 0;
}

static int visit_vectors(const Visitor *visit, int use, NlVector *const *all, int count) {
    for (int k = 0; k < count; k++)
        if (all[k]->at.format && visit->vector(visit->context, use, all[k]) != 0) return -1;
    return 0;
}

static int visit_all(NlWeights *weights, const Visitor *visit) {
    NlMatrix *matrices[] = {&weights->embedding, &weights->positions, &weights->project_in, &weights->project_out,
                            &weights->head};
    NlVector *vectors[] = {&weights->last_norm.norm, &weights->last_norm.bias};
    if (visit_matrices(visit, NL_DENSE, matrices, 5) != 0 || visit_vectors(visit, NL_DENSE, vectors, 2) != 0) return -1;
    for (uint64_t k = 0; k < weights->count; k++) {
        NlAttention *of = &weights->layers[k];
        NlMatrix *parts[] = {&of->queries,
                             &of->keys,
                             &of->values,
                             &of->output,
                             &weights->routing[k].router,
                             &weights->routing[k].shared_gate};
        NlVector *small[] = {&of->before_attention.norm, &of->before_attention.bias, &of->before_ffn.norm,
                             &of->before_ffn.bias,       &of->of_queries.norm,       &of->of_keys.norm,
                             &of->query_bias,            &of->key_bias,              &of->value_bias,
                             &of->output_bias};
        if (visit_matrices(visit, NL_DENSE, parts, 6) != 0 || visit_vectors(visit, NL_DENSE, small, 10) != 0) return -1;
    }
    for (uint64_t k = 0; k < weights->blocks; k++) {
        NlFfnWeights *ffn = &weights->ffn[k];
        NlMatrix *rows = &ffn->rows;
        NlVector *biases[] = {&ffn->biases[0], &ffn->biases[1], &ffn->biases[2]};
        if (visit_matrices(visit, NL_RESIDENT, &rows, 1) != 0 || visit_vectors(visit, NL_RESIDENT, biases, 3) != 0)
            return -1;
    }
    return 0;
}

typedef struct {
    NlWeights *weights;
    NlArena *arena;
    const NlIndex *index;
    NlError *error;
} Context;

static int carve_matrix(void *argument, int use, NlMatrix *matrix) {
    Context *context = argument;
    uint64_t bytes = matrix->at.rows * matrix->at.row_bytes;
    if (matrix->streamed) return 0;
    if (context->weights->held) {
        matrix->data = nl_carve(context->arena, use, bytes);
    } else {
        context->arena->uses[use] += bytes; /* pages of the file count as well once they were touched */
        matrix->data = context->weights->mapping ? context->weights->mapping + matrix->at.offset : NULL;
    }
    return 0;
}

static int carve_vector(void *argument, int use, NlVector *vector) {
    Context *context = argument;
    vector->data = nl_carve(context->arena, use, vector->at.columns * sizeof(float));
    return 0;
}

void nl_weights_carve(NlWeights *weights, NlArena *arena) {
    Context context = {weights, arena, NULL, NULL};
    Visitor visitor = {carve_matrix, carve_vector, &context};
    visit_all(weights, &visitor);
}

static int read_matrix(void *argument, int use, NlMatrix *matrix) {
    Context *context = argument;
    uint64_t bytes = matrix->at.rows * matrix->at.row_bytes;
    (void)use;
    if (!context->weights->held || matrix->streamed) return 0;
    /* `data` is const for all but this. */
    return nl_read_at(context->index->file, (unsigned char *)matrix->data, bytes, matrix->at.offset, context->error);
}

static int read_vector(void *argument, int use, NlVector *vector) {
    Context *context = argument;
    unsigned char *row = malloc((size_t)vector->at.row_bytes);
    int result = -1;
    (void)use;
    if (!row) return nl_fail(context->error, NL_NO_MEMORY, "out of memory");
    if (nl_read_at(context->index->file, row, vector->at.row_bytes, vector->at.offset, context->error) == 0) {
        vector->at.format->decode(row, vector->at.columns, vector->data);
        result = 0;
    }
    free(row);
    return result;
}

int nl_weights_read(NlWeights *weights, const NlIndex *index, NlError *error) {
    Context context = {weights, NULL, index, error};
    Visitor visitor = {read_matrix, read_vector, &context};
    return visit_all(weights, &visitor);
}

void nl_weights_close(NlWeights *weights) {
    if (weights->mapping) munmap((void *)(uintptr_t)weights->mapping, (size_t)weights->mapped);
    free(weights->layers);
    free(weights->routing);
    free(weights->ffn);
    free(weights->experts);
    memset(weights, 0, sizeof *weights);
}
