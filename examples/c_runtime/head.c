/* The output head: logits after a token, or how likely the tokens of a text are. */
#include <math.h>

#include "model.h"

/* What the head multiplies, for states from `first` on: `[count, width of the embedding]`. */
static const float *enter(NlModel *model, uint64_t first, uint64_t count) {
    const NlShape *shape = &model->shape;
    const NlWeights *weights = &model->weights;
    float *states = model->states + first * shape->hidden;
    if (weights->last_norm.norm.data)
        nl_norm(&weights->last_norm, shape->family == NL_OPT, shape->epsilon, states, count, shape->hidden, states);
    if (!weights->project_out.at.format) return states;
    nl_linear(&model->compute, &weights->project_out, NULL, states, count, model->normed, shape->embedded);
    return model->normed;
}

static const NlMatrix *head_of(const NlModel *model) {
    return model->weights.head.at.format ? &model->weights.head : &model->weights.embedding;
}

void nl_logits(NlModel *model, uint64_t token) {
    const float *in = enter(model, token, 1);
    nl_linear(&model->compute, head_of(model), NULL, in, 1, model->logits, model->vocabulary);
}

/* Logits of some tokens of the vocabulary, for every token of a batch. */
typedef struct {
    const NlModel *model;
    const uint32_t *targets;
    uint64_t tokens, first, count;
} Some;

/* Adds them to what is known of each token of the batch: the highest logit, the sum of exp(logit - highest), and the
 * logit of the token that came. */
static void take(void *argument, unsigned thread, unsigned part, unsigned parts) {
    const Some *some = argument;
    uint64_t begin, end;
    (void)thread;
    nl_share(some->tokens, part, parts, &begin, &end);
    for (uint64_t t = begin; t < end; t++) {
        const float *logits = some->model->logits + t * some->count;
        NlSurprise *of = &some->model->surprises[t];
        float highest = of->highest;
        for (uint64_t k = 0; k < some->count; k++)
            if (logits[k] > highest) highest = logits[k];
        if (highest > of->highest) of->sum *= exp((double)of->highest - (double)highest);
        of->highest = highest;
        for (uint64_t k = 0; k < some->count; k++) of->sum += exp((double)logits[k] - (double)highest);
        if (some->targets[t] >= some->first && some->targets[t] - some->first < some->count)
            of->came = logits[some->targets[t] - some->first];
    }
}

int nl_surprises(NlModel *model, const uint32_t *targets, uint64_t count, double *sum) {
    const float *in = enter(model, 0, count);
    const NlMatrix *head = head_of(model);
    const uint64_t at_once = model->vocabulary > count ? model->vocabulary / count : 1;
    NlMatrix rows = *head;
    Some some = {model, targets, count, 0, 0};
    rows.streamed = 0;
    for (uint64_t t = 0; t < count; t++) model->surprises[t] = (NlSurprise){0, -INFINITY, 0};
    for (uint64_t first = 0, there = 0, row = 0; first < model->vocabulary; first += there) {
        NlRows read = {head->data, model->vocabulary};
        if (head->streamed && nl_stream_rows(model->compute.stream, head, first, &read, model->compute.failed) != 0) return -1;
        there = read.count;
        for (row = 0; row < there; row += some.count) {
            some.first = first + row;
            some.count = rows.at.rows = there - row < at_once ? there - row : at_once;
            rows.data = read.data + row * head->at.row_bytes;
            nl_linear(&model->compute, &rows, NULL, in, count, model->logits, some.count);
            nl_workers_do(model->compute.workers, take, &some);
        }
    }
    for (uint64_t t = 0; t < count; t++) {
        const NlSurprise *of = &model->surprises[t];
        *sum += log(of->sum) + (double)of->highest - (double)of->came;
    }
    return 0;
}
