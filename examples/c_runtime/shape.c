#include "shape.h"

#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "files.h"

#define CONFIG "config.json"
#define MAX_CONFIG_BYTES (UINT64_C(16) << 20)
#define MOST (UINT64_C(1) << 23)

/* A value that may be missing or null. */
static int whole(const NlJson *json, const char *object, const char *key, uint64_t otherwise, uint64_t *out) {
    const char *at;
    if (nl_json_find(json, object, key, &at) != 0) return -1;
    *out = otherwise;
    if (at && *at != 'n') return nl_json_whole(json, at, key, 0, MOST, out);
    return 0;
}

static int real(const NlJson *json, const char *object, const char *key, double otherwise, float *out) {
    const char *at;
    double value = otherwise;
    if (nl_json_find(json, object, key, &at) != 0) return -1;
    if (at && *at != 'n' && nl_json_real(json, at, key, &value) != 0) return -1;
    *out = (float)value;
    return 0;
}

static int truth(const NlJson *json, const char *key, int otherwise, int *out) {
    const char *at;
    if (nl_json_find(json, json->text, key, &at) != 0) return -1;
    *out = !at || *at == 'n' ? otherwise : *at == 't';
    return 0;
}

static int needed(const NlJson *json, const char *key, uint64_t *out) {
    return nl_json_number(json, json->text, key, 1, MOST, out);
}

static int read_opt(const NlJson *json, NlShape *shape) {
    int removed;
    if (needed(json, "hidden_size", &shape->hidden) != 0 || needed(json, "num_attention_heads", &shape->heads) != 0 ||
        whole(json, json->text, "word_embed_proj_dim", shape->hidden, &shape->embedded) != 0 ||
        truth(json, "do_layer_norm_before", 1, &shape->norm_first) != 0 ||
        truth(json, "_remove_final_layer_norm", 0, &removed) != 0 || truth(json, "enable_bias", 1, &shape->biased) != 0 ||
        truth(json, "tie_word_embeddings", 1, &shape->tied) != 0)
        return -1;
    shape->last_norm = shape->norm_first && !removed;
    shape->output_biased = shape->biased;
    shape->kv_heads = shape->heads;
    shape->head_size = shape->hidden / shape->heads;
    shape->epsilon = 1e-5f;
    if (shape->head_size * shape->heads != shape->hidden)
        return nl_fail(json->error, NL_BAD_LAYOUT, CONFIG ": hidden_size is no multiple of num_attention_heads");
    return 0;
}

/* How positions turn queries and keys: in `rope_parameters`, or as older configs have it. */
static int read_rope(const NlJson *json, NlShape *shape) {
    const char *object, *type = NULL, *text = json->text;
    float partial = 1;
    if (real(json, text, "rope_theta", 10000.0, &shape->base) != 0 ||
        real(json, text, "partial_rotary_factor", 1, &partial) != 0 ||
        nl_json_find(json, text, "rope_parameters", &object) != 0)
        return -1;
    if ((!object || *object == 'n') && nl_json_find(json, text, "rope_scaling", &object) != 0) return -1;
    if (object && *object == '{') {
        if (real(json, object, "rope_theta", (double)shape->base, &shape->base) != 0 ||
            real(json, object, "partial_rotary_factor", (double)partial, &partial) != 0 ||
            nl_json_find(json, object, "rope_type", &type) != 0 ||
            (!type && nl_json_find(json, object, "type", &type) != 0))
            return -1;
    }
    if (partial < 1)
        return nl_fail(json->error, NL_NOT_SUPPORTED, "rotary embeddings of a part of a head are not supported");
    if (shape->base <= 0) return nl_fail(json->error, NL_BAD_LAYOUT, CONFIG ": rope_theta is not positive");
    /* "dynamic" changes nothing for as many positions as the model was made for, and there are no more. */
    if (!type || *type == 'n' || nl_json_is(type, "default") || nl_json_is(type, "dynamic")) return 0;
    if (nl_json_is(type, "linear")) shape->rope = NL_ROPE_LINEAR;
    else if (nl_json_is(type, "llama3")) shape->rope = NL_ROPE_LLAMA3;
    else return nl_fail(json->error, NL_NOT_SUPPORTED, "this scaling of rotary embeddings is not supported: %.40s", type);
    if (real(json, object, "factor", 0, &shape->factor) != 0 ||
        real(json, object, "low_freq_factor", 0, &shape->low_factor) != 0 ||
        real(json, object, "high_freq_factor", 0, &shape->high_factor) != 0 ||
        real(json, object, "original_max_position_embeddings", (double)shape->positions,
             &shape->original_positions) != 0)
        return -1;
    if (shape->factor <= 0 || (shape->rope == NL_ROPE_LLAMA3 && (shape->low_factor <= 0 || shape->original_positions <= 0 ||
                                                                 shape->high_factor <= shape->low_factor)))
        return nl_fail(json->error, NL_BAD_LAYOUT, CONFIG ": the factors of the rotary embeddings are missing or wrong");
    return 0;
}

/* Routed experts. */
static int read_experts(const NlJson *json, NlShape *shape) {
    const char *const names[] = {"num_local_experts", "num_experts"}, *at;
    int mixtral = !strcmp(shape->type, "mixtral");
    if (!mixtral && strcmp(shape->type, "qwen2_moe") != 0 && strcmp(shape->type, "qwen3_moe") != 0) return 0;
    /* Configs have one name or the other, whatever the model. */
    if (nl_json_find(json, json->text, names[0], &at) != 0 ||
        nl_json_number(json, json->text, names[!at], 1, 65536, &shape->experts) != 0 ||
        nl_json_number(json, json->text, "num_experts_per_tok", 1, shape->experts, &shape->used_experts) != 0)
        return -1;
    shape->scores_add_up = 1;
    return mixtral ? 0 : truth(json, "norm_topk_prob", 0, &shape->scores_add_up);
}

/* How far layers look back. */
static int read_window(const NlJson *json, NlShape *shape) {
    const char *text = json->text, *kinds;
    uint64_t layer = 0, first = UINT64_MAX;
    int used = 1;
    if (!strcmp(shape->type, "llama") || !strcmp(shape->type, "sparsellama")) return 0;
    if (!strcmp(shape->type, "mixtral")) return whole(json, text, "sliding_window", 0, &shape->window);
    if (!strcmp(shape->type, "mistral") || !strcmp(shape->type, "bamboo"))
        return whole(json, text, "sliding_window", nl_json_find(json, text, "sliding_window", &kinds) == 0 && kinds ? 0 : 4096,
                     &shape->window);
    if (truth(json, "use_sliding_window", 0, &used) != 0) return -1;
    if (!used) return 0;
    if (whole(json, text, "sliding_window", 4096, &shape->window) != 0 ||
        whole(json, text, "max_window_layers", 28, &shape->first_windowed) != 0 ||
        nl_json_find(json, text, "layer_types", &kinds) != 0)
        return -1;
    if ((!kinds || *kinds != '[') && shape->experts)
        return nl_fail(json->error, NL_NOT_SUPPORTED, "a window without layer_types is not supported in this model");
    if (!kinds || *kinds != '[') return 0;
    for (int more = nl_json_item(json, &kinds, 1); more; more = nl_json_item(json, &kinds, 0), layer++) {
        if (nl_json_is(kinds, "sliding_attention")) {
            if (first == UINT64_MAX) first = layer;
        } else if (first != UINT64_MAX) {
            return nl_fail(json->error, NL_NOT_SUPPORTED, "layers with and without a window in turn are not supported");
        }
    }
    shape->first_windowed = first;
    return 0;
}

/* Which biases attention has: in Qwen 2 some whatever the config says, in Mistral none. */
static int read_biases(const NlJson *json, NlShape *shape) {
    if (!strcmp(shape->type, "qwen2")) return shape->biased = 1, 0;
    if (!strcmp(shape->type, "qwen2_moe")) return truth(json, "qkv_bias", 1, &shape->biased);
    if (!strcmp(shape->type, "mistral") || !strcmp(shape->type, "bamboo") || !strcmp(shape->type, "mixtral")) return 0;
    if (truth(json, "attention_bias", 0, &shape->biased) != 0) return -1;
    shape->output_biased = shape->biased;
    return 0;
}

static int read_llama(const NlJson *json, NlShape *shape) {
    if (needed(json, "hidden_size", &shape->hidden) != 0 || needed(json, "num_attention_heads", &shape->heads) != 0 ||
        whole(json, json->text, "num_key_value_heads", shape->heads, &shape->kv_heads) != 0 ||
        whole(json, json->text, "head_dim", !strcmp(shape->type, "qwen3") ? 128 : shape->hidden / shape->heads,
              &shape->head_size) != 0 ||
        real(json, json->text, "rms_norm_eps", 1e-6, &shape->epsilon) != 0 ||
        real(json, json->text, "hidden_act_param", 0, &shape->cut) != 0 ||
        truth(json, "tie_word_embeddings", 0, &shape->tied) != 0 || read_rope(json, shape) != 0 || read_experts(json, shape) != 0 ||
        read_biases(json, shape) != 0)
        return -1;
    if (shape->head_size < 2 || shape->head_size % 2 || shape->head_size > 4096)
        return nl_fail(json->error, NL_BAD_LAYOUT, CONFIG ": a head of %" PRIu64 " elements", shape->head_size);
    if (shape->kv_heads == 0 || shape->heads % shape->kv_heads)
        return nl_fail(json->error, NL_BAD_LAYOUT, CONFIG ": %" PRIu64 " heads cannot share %" PRIu64 " of keys",
                       shape->heads, shape->kv_heads);
    shape->up_activated = !strcmp(shape->type, "bamboo");
    return read_window(json, shape);
}

static int read_shape(const NlJson *json, NlShape *shape) {
    static const char *const llamas[] = {"llama", "mistral", "qwen2", "qwen3", "sparsellama", "bamboo",
                                        "mixtral", "qwen2_moe", "qwen3_moe"};
    const char *at;
    shape->family = -1;
    if (!strcmp(shape->type, "opt")) shape->family = NL_OPT;
    for (unsigned k = 0; k < sizeof llamas / sizeof *llamas; k++)
        if (!strcmp(shape->type, llamas[k])) shape->family = NL_LLAMA;
    if (shape->family < 0)
        return nl_fail(json->error, NL_NOT_SUPPORTED,
                       "models of type \"%s\" are not supported: the attention of opt, llama, mistral, qwen2, qwen3, "
                       "sparsellama, bamboo, mixtral, qwen2_moe and qwen3_moe is there",
                       shape->type);
    if (nl_json_find(json, json->text, "model_type", &at) != 0) return -1;
    if (!at || !nl_json_is(at, shape->type))
        return nl_fail(json->error, NL_BAD_LAYOUT, CONFIG ": model_type is not \"%s\", as the index says", shape->type);
    if (needed(json, "num_hidden_layers", &shape->layers) != 0 ||
        needed(json, "max_position_embeddings", &shape->positions) != 0)
        return -1;
    return shape->family == NL_OPT ? read_opt(json, shape) : read_llama(json, shape);
}

int nl_shape_read(const char *directory, const char *type, NlShape *shape, NlError *error) {
    NlJson json;
    int result = -1;
    memset(shape, 0, sizeof *shape);
    memcpy(shape->type, type, strlen(type) + 1 < sizeof shape->type ? strlen(type) + 1 : 0);
    if (nl_read_json(directory, CONFIG, MAX_CONFIG_BYTES, &json, error) == 0) result = read_shape(&json, shape);
    free((char *)json.text);
    return result;
}
