#include "index.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define MAX_INDEX_BYTES (UINT64_C(64) << 20)
#define MAX_NEURONS (UINT64_C(1) << 24)
#define MAX_STRIDE (UINT64_C(1) << 26)

const char *const NL_ROLE_NAMES[NL_ROLES] = {"gate", "up", "down"};

#define WRONG(json, ...) nl_fail((json)->error, NL_BAD_LAYOUT, NL_INDEX_NAME ": " __VA_ARGS__)

int nl_index_open(NlIndex *index, const char *directory, NlError *error) {
    const NlJson *json = &index->json;
    const char *file, *name, *model;
    uint64_t version, stated;
    memset(index, 0, sizeof *index);
    index->file = -1;
    if (nl_read_json(directory, NL_INDEX_NAME, MAX_INDEX_BYTES, &index->json, error) != 0 ||
        nl_json_string(json, json->text, "format", "neuralink-flash") != 0 ||
        nl_json_number(json, json->text, "version", 1, 1, &version) != 0 ||
        !(file = nl_json_member(json, json->text, "file")) ||
        nl_json_number(json, file, "bytes", 1, INT64_MAX, &stated) != 0)
        return -1;
    if (!(name = nl_json_member(json, file, "name")) || *name != '"') return WRONG(json, "the file has no name");
    if (nl_json_copy(name, index->name, sizeof index->name) != 0 || !*index->name || *index->name == '.' ||
        strchr(index->name, '/'))
        return WRONG(json, "the file's name is not a plain one");
    if (nl_json_find(json, json->text, "model", &model) != 0) return -1;
    if (model && *model == '{') {
        const char *type;
        if (nl_json_find(json, model, "model_type", &type) != 0) return -1;
        if (type && nl_json_copy(type, index->model_type, sizeof index->model_type) != 0) *index->model_type = '\0';
    }
    if ((index->file = nl_open_file(directory, index->name, 0, &index->file_bytes, error)) < 0) return -1;
    if (index->file_bytes != stated)
        return nl_fail(error, NL_BAD_LAYOUT, "%s: has %" PRIu64 " bytes, the index says %" PRIu64, index->name,
                       index->file_bytes, stated);
    return 0;
}

void nl_index_close(NlIndex *index) {
    free((char *)index->json.text);
    if (index->file >= 0) close(index->file);
    index->json.text = NULL;
    index->file = -1;
}

int nl_index_next(const NlIndex *index, const char **at, int first) {
    const NlJson *json = &index->json;
    if (first) {
        if (!(*at = nl_json_member(json, json->text, "blocks"))) return -1;
        if (**at != '[') return WRONG(json, "blocks is not a list");
    }
    return nl_json_item(json, at, first);
}

/* The member `key` of an object, a range of the flash file that must have `bytes` bytes and lie within it. */
static int range(const NlIndex *index, const char *object, const char *key, uint64_t bytes, uint64_t *offset) {
    const NlJson *json = &index->json;
    const char *place = nl_json_member(json, object, key);
    uint64_t stated;
    if (!place || nl_json_number(json, place, "bytes", bytes, bytes, &stated) != 0) return -1;
    if (bytes > index->file_bytes) return WRONG(json, "%s is larger than the file", key);
    return nl_json_number(json, place, "offset", 0, index->file_bytes - bytes, offset);
}

static int role_of(const NlJson *json, const char *entry) {
    const char *role = nl_json_member(json, entry, "role");
    if (!role) return -1;
    for (int k = 0; k < NL_ROLES; k++)
        if (nl_json_is(role, NL_ROLE_NAMES[k])) return k;
    return WRONG(json, "a role is not gate, up or down");
}

/* Whether weights of a dtype may have been codes with scales in the source: they are then always rounded, or mxfp4. */
static int may_have_scales(const NlFormat *source) {
    return !strcmp(source->name, "I8") || !strcmp(source->name, "F8_E4M3");
}

/* Enters what an entry of `parts` or `resident` describes: format and bytes of the part of its role. */
static int new_part(const NlJson *json, const char *entry, NlBlock *block, NlPart **part) {
    const char *weights;
    const NlFormat *format;
    int k = role_of(json, entry);
    if (k < 0 || nl_json_find(json, entry, "weights", &weights) != 0) return -1;
    if (block->parts[k].format) return WRONG(json, "the weights of %s are there twice", NL_ROLE_NAMES[k]);
    format = weights ? nl_find_format(NL_BLOCK_FORMATS, weights) : block->source;
    if (!format) return WRONG(json, "the weights of %s are in an unknown format", NL_ROLE_NAMES[k]);
    if (weights && !block->source->decode && !may_have_scales(block->source))
        return WRONG(json, "weights of dtype %s cannot be %s", block->source->name, format->name);
    *part = &block->parts[k];
    (*part)->format = format;
    (*part)->bytes = nl_row_bytes(format, block->hidden);
    if ((*part)->bytes > 0) return 0;
    return WRONG(json, "%" PRIu64 " weights are no whole blocks of %s", block->hidden, format->name);
}

/* What a bundle holds: parts without holes between them, that fill it. */
static int find_bundle_parts(const NlJson *json, const char *object, NlBlock *block) {
    const char *at = nl_json_member(json, object, "parts"), *bundles;
    uint64_t place = 0, stated;
    int rounded = 0;
    if (!at) return -1;
    for (int more = nl_json_item(json, &at, 1); more; more = nl_json_item(json, &at, 0)) {
        NlPart *part;
        if (new_part(json, at, block, &part) != 0 ||
            nl_json_number(json, at, "offset", place, place, &stated) != 0 ||
            nl_json_number(json, at, "bytes", part->bytes, part->bytes, &stated) != 0)
            return -1;
        part->offset = block->bundles_offset + place;
        part->pitch = block->stride;
        place += part->bytes;
        if (part->format != block->source) rounded = 1;
    }
    if (place != block->stride)
        return WRONG(json, "stride is %" PRIu64 ", the parts have %" PRIu64 " bytes", block->stride, place);
    if (!(bundles = nl_json_member(json, object, "bundles"))) return -1;
    return nl_json_string(json, bundles, "dtype", rounded ? "U8" : block->source->name);
}

static int new_bias(const NlIndex *index, const char *entry, NlBlock *block, int output) {
    const NlJson *json = &index->json;
    const char *place, *dtype;
    NlBias *bias;
    int k = output ? NL_DOWN : role_of(json, entry);
    if (k < 0) return -1;
    if (!output && k == NL_DOWN) return WRONG(json, "a bias of down is not called output_bias");
    bias = &block->biases[k];
    if (bias->format) return WRONG(json, "the bias of %s is there twice", NL_ROLE_NAMES[k]);
    if (!(place = nl_json_member(json, entry, "place")) || !(dtype = nl_json_member(json, place, "dtype"))) return -1;
    if (!(bias->format = nl_find_format(NL_SOURCE_FORMATS, dtype))) return WRONG(json, "a bias has an unknown dtype");
    if (output) {
        /* A part of a tensor: `hidden` elements from byte source_start on. */
        uint64_t start, stated, bytes = block->hidden * bias->format->block_bytes;
        if (nl_json_number(json, place, "bytes", bytes, index->file_bytes, &stated) != 0 ||
            nl_json_number(json, entry, "source_start", 0, stated - bytes, &start) != 0 ||
            nl_json_number(json, place, "offset", 0, index->file_bytes - stated, &bias->offset) != 0)
            return -1;
        bias->offset += start;
        return 0;
    }
    return range(index, entry, "place", block->neurons * bias->format->block_bytes, &bias->offset);
}

/* Rows and, with `biases`, biases, which are kept in memory. */
static int find_resident(const NlIndex *index, const char *object, NlBlock *block, int biases) {
    const NlJson *json = &index->json;
    const char *at = nl_json_member(json, object, "resident"), *kind, *place;
    if (!at) return -1;
    if (*at != '[') return WRONG(json, "resident is not a list");
    for (int more = nl_json_item(json, &at, 1); more; more = nl_json_item(json, &at, 0)) {
        NlPart *part;
        int output;
        if (!(kind = nl_json_member(json, at, "kind"))) return -1;
        output = nl_json_is(kind, "output_bias");
        if (output || nl_json_is(kind, "bias")) {
            if (biases && new_bias(index, at, block, output) != 0) return -1;
            continue;
        }
        if (!nl_json_is(kind, "rows")) return WRONG(json, "a kind is not rows, bias or output_bias");
        if (new_part(json, at, block, &part) != 0 ||
            range(index, at, "place", block->neurons * part->bytes, &part->offset) != 0 ||
            !(place = nl_json_member(json, at, "place")) ||
            nl_json_string(json, place, "dtype", part->format != block->source ? "U8" : block->source->name) != 0)
            return -1;
        part->pitch = part->bytes;
        part->resident = 1;
    }
    return 0;
}

/* What only computing needs. */
static int find_rules(const NlIndex *index, const char *object, NlBlock *block) {
    const NlJson *json = &index->json;
    const char *value;
    if (range(index, object, "frequency", block->neurons * sizeof(float), &block->frequency_offset) != 0) return -1;
    if (!(value = nl_json_member(json, object, "id"))) return -1;
    if (nl_json_copy(value, block->id, sizeof block->id) != 0) return WRONG(json, "a block's id is not a plain name");
    if (!(value = nl_json_member(json, object, "activation"))) return -1;
    if (nl_json_copy(value, block->activation, sizeof block->activation) != 0)
        return WRONG(json, "the activation of %s is not a plain name", block->id);
    if (!(value = nl_json_member(json, object, "threshold")) ||
        nl_json_real(json, value, "threshold", &block->threshold) != 0 ||
        nl_json_number(json, object, "pinned", 0, block->neurons, &block->pinned) != 0 ||
        nl_json_number(json, object, "collapse_gap", 0, INT64_MAX, &block->gap) != 0 ||
        nl_json_find(json, object, "expert", &value) != 0)
        return -1;
    if (block->gap > block->neurons) block->gap = block->neurons;
    block->expert = value && *value != 'n';
    if (nl_json_find(json, object, "up_values", &value) != 0) return -1;
    if (value)
        return nl_fail(json->error, NL_NOT_SUPPORTED, "%s clamps the values of up or adds to them, which is not computed here",
                       block->id);
    return 0;
}

int nl_index_block(const NlIndex *index, const char *object, NlBlock *block, int whole) {
    const NlJson *json = &index->json;
    const char *dtype, *order;
    memset(block, 0, sizeof *block);
    if (nl_json_number(json, object, "neurons", 1, MAX_NEURONS, &block->neurons) != 0 ||
        nl_json_number(json, object, "hidden", 1, NL_MAX_HIDDEN, &block->hidden) != 0 ||
        nl_json_number(json, object, "stride", 1, MAX_STRIDE, &block->stride) != 0 ||
        range(index, object, "bundles", block->neurons * block->stride, &block->bundles_offset) != 0 ||
        range(index, object, "order", block->neurons * 4, &block->order_offset) != 0)
        return -1;
    order = nl_json_member(json, object, "order");
    if (nl_json_string(json, order, "dtype", "I32") != 0 || !(dtype = nl_json_member(json, object, "dtype"))) return -1;
    if (!(block->source = nl_find_format(NL_SOURCE_FORMATS, dtype)))
        return WRONG(json, "a block has a dtype that this reader does not know");
    if (find_bundle_parts(json, object, block) != 0 || find_resident(index, object, block, whole) != 0) return -1;
    return whole ? find_rules(index, object, block) : 0;
}

int nl_index_firing(const NlIndex *index, const NlBlock *block, double *neurons, NlError *error) {
    unsigned char raw[4096];
    float values[sizeof raw / sizeof(float)];
    const NlFormat *format = nl_find_format(NL_SOURCE_FORMATS, "\"F32\"");
    *neurons = 0;
    for (uint64_t slot = 0, count; slot < block->neurons; slot += count) {
        count = block->neurons - slot < sizeof raw / sizeof(float) ? block->neurons - slot : sizeof raw / sizeof(float);
        if (nl_read_at(index->file, raw, count * sizeof(float), block->frequency_offset + slot * sizeof(float), error) != 0)
            return -1;
        format->decode(raw, count, values);
        for (uint64_t k = 0; k < count; k++)
            if (values[k] > 0) *neurons += values[k] < 1 ? (double)values[k] : 1; /* what is no share is none */
    }
    return 0;
}

int nl_index_slots(const NlIndex *index, const NlBlock *block, uint32_t *slots) {
    NlError *error = index->json.error;
    unsigned char *order = malloc((size_t)block->neurons * 4);
    int bad = !order;
    if (bad) nl_fail(error, NL_NO_MEMORY, "out of memory");
    else bad = nl_read_at(index->file, order, block->neurons * 4, block->order_offset, error) != 0;
    if (!bad) memset(slots, 0xff, (size_t)block->neurons * sizeof *slots);
    for (uint64_t slot = 0; !bad && slot < block->neurons; slot++) {
        const unsigned char *entry = order + 4 * slot; /* little-endian, whatever this machine is */
        uint32_t neuron = entry[0] | (uint32_t)entry[1] << 8 | (uint32_t)entry[2] << 16 | (uint32_t)entry[3] << 24;
        if (neuron >= block->neurons || slots[neuron] != UINT32_MAX)
            bad = 1, nl_fail(error, NL_BAD_LAYOUT, "the order is no permutation");
        else
            slots[neuron] = (uint32_t)slot;
    }
    free(order);
    return bad ? -1 : 0;
}
