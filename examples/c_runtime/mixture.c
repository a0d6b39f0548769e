/* The FFN of a layer. Where it has experts, each token is routed to some of them; the neurons of an expert are read only for
 * the tokens that it runs on, and of those only the neurons that fire. */
#include <math.h>
#include <string.h>

#include "model.h"

static int run_block(NlModel *model, int32_t block, const float *in, uint64_t tokens, float *out, NlError *error) {
    return nl_ffn_run(&model->ffn[block], &model->compute, &model->fetch, &model->room, in, tokens, out, error);
}

/* Chooses the experts of a token: those with the highest probabilities. Scores are spent. -1 if one is not a number. */
static int choose(const NlShape *shape, float *scores, uint32_t *chosen, float *shares) {
    float most = -INFINITY, sum = 0, kept = 0;
    for (uint64_t e = 0; e < shape->experts; e++)
        if (scores[e] > most) most = scores[e];
    for (uint64_t e = 0; e < shape->experts; e++) sum += scores[e] = expf(scores[e] - most);
    if (!(sum > 0)) return -1;
    for (uint64_t k = 0; k < shape->used_experts; k++) {
        uint64_t best = 0;
        for (uint64_t e = 1; e < shape->experts; e++)
            if (scores[e] > scores[best]) best = e;
        chosen[k] = (uint32_t)best;
        shares[k] = scores[best] / sum;
        kept += shares[k];
        scores[best] = -1;
    }
    for (uint64_t k = 0; shape->scores_add_up && k < shape->used_experts; k++) shares[k] /= kept;
    return 0;
}

/* Has the rows of the chosen experts read that are not in memory: those of the second while the first computes. */
static void read_ahead(NlModel *model, const NlRouting *routing, uint64_t tokens) {
    const NlMixture *room = &model->mixture;
    uint64_t count = 0;
    if (!model->compute.routed) return;
    for (uint32_t e = 0; e < model->shape.experts; e++) {
        const NlMatrix *rows = &model->weights.ffn[routing->experts[e]].rows;
        uint64_t k = 0;
        while (rows->streamed && k < tokens * model->shape.used_experts && room->chosen[k] != e) k++;
        if (rows->streamed && k < tokens * model->shape.used_experts) room->wanted[count++] = rows;
    }
    if (count) nl_stream_ask(model->compute.routed, room->wanted, count);
}

/* Runs an expert on the tokens that are routed to it, and adds what it gives. */
static int run_expert(NlModel *model, int32_t block, uint32_t expert, const float *in, uint64_t tokens, float *out,
                      NlError *error) {
    const NlMixture *room = &model->mixture;
    const uint64_t hidden = model->shape.hidden, used = model->shape.used_experts;
    uint64_t count = 0;
    for (uint64_t k = 0; k < tokens * used; k++) {
        if (room->chosen[k] != expert) continue;
        memcpy(room->in + count * hidden, in + k / used * hidden, hidden * sizeof *in);
        room->tokens[count++] = (uint32_t)k;
    }
    if (count == 0) return 0;
    if (run_block(model, block, room->in, count, room->out, error) != 0) return -1;
    for (uint64_t t = 0; t < count; t++)
        model->compute.kernels->add[NL_F32]((const unsigned char *)(room->out + t * hidden), hidden,
                                            room->shares[room->tokens[t]], out + room->tokens[t] / used * hidden);
    return 0;
}

static int run_shared(NlModel *model, const NlRouting *routing, const float *in, uint64_t tokens, float *out,
                      NlError *error) {
    const uint64_t hidden = model->shape.hidden;
    if (run_block(model, routing->shared, in, tokens, model->mixture.out, error) != 0) return -1;
    for (uint64_t t = 0; t < tokens; t++) {
        float gate;
        nl_linear(&model->compute, &routing->shared_gate, NULL, in + t * hidden, 1, &gate, 1);
        model->compute.kernels->add[NL_F32]((const unsigned char *)(model->mixture.out + t * hidden), hidden,
                                            1 / (1 + expf(-gate)), out + t * hidden);
    }
    return 0;
}

int nl_layer_ffn(NlModel *model, uint64_t layer, const float *in, uint64_t tokens, float *out, NlError *error) {
    const NlShape *shape = &model->shape;
    const NlRouting *routing = &model->weights.routing[layer];
    const NlMixture *room = &model->mixture;
    if (routing->plain >= 0) return run_block(model, routing->plain, in, tokens, out, error);
    nl_linear(&model->compute, &routing->router, NULL, in, tokens, room->scores, shape->experts);
    for (uint64_t t = 0; t < tokens; t++)
        if (choose(shape, room->scores + t * shape->experts, room->chosen + t * shape->used_experts,
                   room->shares + t * shape->used_experts) != 0)
            return nl_fail(error, NL_BAD_LAYOUT, "the score of an expert is not a number");
    read_ahead(model, routing, tokens);
    memset(out, 0, tokens * shape->hidden * sizeof *out);
    for (uint32_t e = 0; e < shape->experts; e++)
        if (run_expert(model, routing->experts[e], e, in, tokens, out, error) != 0) return -1;
    return routing->shared < 0 ? 0 : run_shared(model, routing, in, tokens, out, error);
}
