/* Tokens through a model, and what it says of itself. */
#include <math.h>

#include "model.h"

/* An error inside a call may have left a cache with bundles that never came: the model then only repeats it. */
static int broken(const NlModel *model, NlError *error) {
    if (model->error.code == NL_OK) return 0;
    return nl_fail(error, model->error.code, "%s", model->error.text);
}

static void add_to(float *states, const float *changes, uint64_t count) {
    for (uint64_t k = 0; k < count; k++) states[k] += changes[k];
}

/* The embeddings of tokens and, in OPT, of their positions. */
static void embed(NlModel *model, const uint32_t *tokens, uint64_t count) {
    const NlShape *shape = &model->shape;
    const uint64_t hidden = shape->hidden;
    for (uint64_t t = 0; t < count; t++) {
        float *to = model->states + t * hidden;
        if (model->weights.project_in.at.format) {
            nl_row(&model->compute, &model->weights.embedding, tokens[t], model->compute.scratch);
            nl_linear(&model->compute, &model->weights.project_in, NULL, model->compute.scratch, 1, to, hidden);
        } else {
            nl_row(&model->compute, &model->weights.embedding, tokens[t], to);
        }
        if (shape->family != NL_OPT) continue;
        nl_row(&model->compute, &model->weights.positions, model->length + t + 2, model->changes);
        add_to(to, model->changes, hidden);
    }
}

static int layer(NlModel *model, uint64_t number, uint64_t count, NlError *error) {
    const NlShape *shape = &model->shape;
    const NlAttention *weights = &model->weights.layers[number];
    const uint64_t hidden = shape->hidden, size = count * hidden;
    const int centred = shape->family == NL_OPT, first = !centred || shape->norm_first;
    float *states = model->states, *normed = first ? model->normed : states;
    if (first) nl_norm(&weights->before_attention, centred, shape->epsilon, states, count, hidden, normed);
    nl_attend(&model->sequence, shape, weights, number, &model->compute, model->length, count, normed, model->changes);
    add_to(states, model->changes, size);
    nl_norm(first ? &weights->before_ffn : &weights->before_attention, centred, shape->epsilon, states, count, hidden,
            normed);
    if (nl_layer_ffn(model, number, normed, count, model->changes, error) != 0) return -1;
    add_to(states, model->changes, size);
    if (!first) nl_norm(&weights->before_ffn, centred, shape->epsilon, states, count, hidden, states);
    return 0;
}

/* Whether a token can be chosen by them: minus infinity excludes one, and what is not a number tells nothing. */
static int are_numbers(const float *logits, uint64_t count) {
    float highest = -INFINITY;
    for (uint64_t k = 0; k < count; k++) {
        if (!(logits[k] < INFINITY)) return 0;
        if (logits[k] > highest) highest = logits[k];
    }
    return highest > -INFINITY;
}

/* Goes on by some tokens: with the logits after the last one, or with `sum` adds what each but the first surprised by. */
static int go_on(NlModel *model, const uint32_t *tokens, uint32_t count, double *sum, NlError *error) {
    if (broken(model, error)) return -1;
    if (count == 0 || count > model->sequence.context - model->length)
        return nl_fail(error, NL_BAD_OPTION, "%u tokens more than the %u that there are: the context has %u", count,
                       model->length, (unsigned)model->sequence.context);
    for (uint32_t k = 0; k < count; k++)
        if (tokens[k] >= model->vocabulary)
            return nl_fail(error, NL_BAD_OPTION, "token %u is not in the vocabulary of %u", tokens[k],
                           (unsigned)model->vocabulary);
    while (count > 0) {
        uint32_t now = count < model->memory.batch ? count : (uint32_t)model->memory.batch;
        embed(model, tokens, now);
        nl_sequence_turn(&model->sequence, &model->shape, model->length, now);
        for (uint64_t k = 0; k < model->shape.layers; k++) {
            if (layer(model, k, now, error) == 0) continue;
            model->error = *error;
            return -1;
        }
        if (sum && (now < count || now > 1)) nl_surprises(model, tokens + 1, now < count ? now : now - 1, sum);
        else if (!sum && count == now) nl_logits(model, now - 1);
        if (broken(model, error)) return -1; /* a matrix could not be read */
        if (sum ? !isfinite(*sum) : count == now && !are_numbers(model->logits, model->vocabulary))
            return nl_fail(error, NL_BAD_LAYOUT, "the outputs of the model are not numbers: check its weights");
        model->length += now;
        tokens += now;
        count -= now;
    }
    return 0;
}

const float *nl_tokens(NlModel *model, const uint32_t *tokens, uint32_t count, NlError *error) {
    return go_on(model, tokens, count, NULL, error) == 0 ? model->logits : NULL;
}

int nl_perplexity(NlModel *model, const uint32_t *tokens, uint32_t count, double *mean, NlError *error) {
    double sum = 0;
    if (count < 2) return nl_fail(error, NL_BAD_OPTION, "perplexity is of two tokens or more");
    if (go_on(model, tokens, count, &sum, error) != 0) return -1;
    *mean = sum / (count - 1);
    return isnan(sum) ? nl_fail(error, NL_BAD_LAYOUT, "a logit is not a number") : 0;
}

int nl_ffn(NlModel *model, uint32_t number, const float *in, uint32_t tokens, float *out, NlError *error) {
    if (broken(model, error)) return -1;
    if (number >= model->shape.layers || tokens == 0 || tokens > model->memory.batch)
        return nl_fail(error, NL_BAD_OPTION, "no layer %u, or more tokens than a batch has", number);
    if (nl_layer_ffn(model, number, in, tokens, out, error) == 0) return broken(model, error);
    model->error = *error;
    return -1;
}

uint32_t nl_length(const NlModel *model) { return model->length; }

void nl_cut(NlModel *model, uint32_t length) {
    if (length < model->length) model->length = length;
}

void nl_memory(const NlModel *model, NlMemory *memory) { *memory = model->memory; }

void nl_counters(const NlModel *model, NlCounters *counters) {
    NlStream *const streams[] = {model->compute.stream, model->compute.routed};
    *counters = model->fetch.counters;
    for (unsigned k = 0; k < 2; k++) {
        uint64_t reads, bytes;
        double waited;
        if (!streams[k]) continue;
        nl_stream_counters(streams[k], &reads, &bytes, &waited);
        counters->reads += reads;
        counters->bytes_streamed += bytes;
        counters->bytes_read += bytes;
        counters->io_seconds += waited;
    }
}

void nl_facts(const NlModel *model, NlFacts *facts) {
    facts->type = model->shape.type;
    facts->kernels = model->compute.kernels->name;
    facts->rounded = model->compute.integers != NULL;
    facts->reads = nl_reads_name(model->fetch.reads);
    facts->direct = model->source.direct;
    facts->note = model->source.note;
    facts->layers = (uint32_t)model->shape.layers;
    facts->hidden = (uint32_t)model->shape.hidden;
    facts->vocabulary = (uint32_t)model->vocabulary;
    facts->context = (uint32_t)model->sequence.context;
}
