#include "attention.h"

#include <math.h>
#include <string.h>

#define WORTH_SHARING (1u << 15)
/* Positions whose keys or values are used together, and heads that share them. */
#define STRETCH 32u
#define GROUP 4u
#define PI 3.14159265358979323846

/* How many heads that share keys are taken together. */
static uint64_t group_of(const NlShape *shape) {
    const uint64_t sharing = shape->heads / shape->kv_heads;
    return sharing < GROUP ? sharing : GROUP;
}

void nl_sequence_carve(NlSequence *sequence, NlArena *arena, const NlShape *shape, uint64_t batch, unsigned threads) {
    uint64_t wide = shape->heads * shape->head_size, half = shape->head_size / 2;
    uint64_t cached = shape->layers * sequence->context * shape->kv_heads * shape->head_size;
    sequence->width = shape->kv_heads * shape->head_size;
    sequence->value_bytes = sequence->kind == NL_F16 ? sizeof(uint16_t) : sizeof(float);
    sequence->keys = nl_carve(arena, NL_SEQUENCE, cached * sequence->value_bytes);
    sequence->values = nl_carve(arena, NL_SEQUENCE, cached * sequence->value_bytes);
    sequence->new_keys = nl_carve(arena, NL_WORKING, batch * sequence->width * sizeof(float));
    sequence->new_values = nl_carve(arena, NL_WORKING, batch * sequence->width * sizeof(float));
    sequence->queries = nl_carve(arena, NL_WORKING, batch * wide * sizeof(float));
    sequence->mixed = nl_carve(arena, NL_WORKING, batch * wide * sizeof(float));
    sequence->cosines = nl_carve(arena, NL_WORKING, batch * half * sizeof(float));
    sequence->sines = nl_carve(arena, NL_WORKING, batch * half * sizeof(float));
    sequence->scores = nl_carve(arena, NL_WORKING, threads * group_of(shape) * sequence->context * sizeof(float));
    sequence->frequencies = nl_carve(arena, NL_WORKING, half * sizeof(float));
}

/* As transformers computes it, step by step in float32. */
void nl_sequence_start(NlSequence *sequence, const NlShape *shape) {
    if (shape->family == NL_OPT) return;
    for (uint64_t j = 0; j < shape->head_size / 2; j++) {
        float frequency = 1.0f / powf(shape->base, (float)(2 * j) / (float)shape->head_size);
        if (shape->rope == NL_ROPE_LINEAR) frequency /= shape->factor;
        if (shape->rope == NL_ROPE_LLAMA3) {
            float length = (float)(2 * PI) / frequency;
            float low = shape->original_positions / shape->low_factor;
            float high = shape->original_positions / shape->high_factor;
            float smooth = (shape->original_positions / length - shape->low_factor) /
                           (shape->high_factor - shape->low_factor);
            if (length > low) frequency /= shape->factor;
            else if (length >= high) frequency = (1 - smooth) * frequency / shape->factor + smooth * frequency;
        }
        sequence->frequencies[j] = frequency;
    }
}

void nl_sequence_turn(NlSequence *sequence, const NlShape *shape, uint64_t length, uint64_t tokens) {
    uint64_t half = shape->head_size / 2;
    if (shape->family == NL_OPT) return;
    for (uint64_t t = 0; t < tokens; t++) {
        for (uint64_t j = 0; j < half; j++) {
            float angle = (float)(length + t) * sequence->frequencies[j];
            sequence->cosines[t * half + j] = cosf(angle);
            sequence->sines[t * half + j] = sinf(angle);
        }
    }
}

/* Turns `heads` heads of every token: element j together with the one half a head further. */
static void turn(const NlSequence *sequence, const NlShape *shape, float *of, uint64_t heads, uint64_t tokens) {
    uint64_t half = shape->head_size / 2;
    for (uint64_t t = 0; t < tokens; t++) {
        const float *cosines = sequence->cosines + t * half, *sines = sequence->sines + t * half;
        for (uint64_t h = 0; h < heads; h++, of += shape->head_size) {
            for (uint64_t j = 0; j < half; j++) {
                float a = of[j], b = of[half + j];
                of[j] = a * cosines[j] - b * sines[j];
                of[half + j] = b * cosines[j] + a * sines[j];
            }
        }
    }
}

typedef struct {
    const NlSequence *sequence;
    const NlShape *shape;
    const NlKernels *kernels;
    const unsigned char *keys, *values; /* of the layer */
    uint64_t length, tokens, window;
} Attend;

/* The rows of a stretch of positions. */
static uint64_t stretch(const unsigned char *from, uint64_t width, uint64_t p, uint64_t last, const unsigned char **rows) {
    const uint64_t count = last + 1 - p < STRETCH ? last + 1 - p : STRETCH;
    for (uint64_t k = 0; k < count; k++) rows[k] = from + (p + k) * width;
    return count;
}

/* Turns scores into shares of 1. */
static void soften(float *scores, uint64_t count, float scale) {
    float most = -INFINITY, sum = 0;
    for (uint64_t p = 0; p < count; p++) {
        scores[p] *= scale;
        if (scores[p] > most) most = scores[p];
    }
    for (uint64_t p = 0; p < count; p++) sum += scores[p] = expf(scores[p] - most);
    for (uint64_t p = 0; p < count; p++) scores[p] /= sum;
}

/* Some heads that share keys and values, of one token at position `last`. */
static void attend_heads(const Attend *job, uint64_t head, uint64_t heads, uint64_t last, const float *queries,
                         float *scores, float *out) {
    const NlShape *shape = job->shape;
    const uint64_t size = shape->head_size, each = job->sequence->value_bytes, width = job->sequence->width * each;
    const uint64_t first = job->window && last + 1 > job->window ? last + 1 - job->window : 0;
    const uint64_t begin = head / (shape->heads / shape->kv_heads) * size * each, room = job->sequence->context;
    const unsigned char *rows[STRETCH];
    uint64_t count;
    for (uint64_t p = first; p <= last; p += count) {
        count = stretch(job->keys + begin, width, p, last, rows);
        nl_products(job->kernels, job->sequence->kind, rows, count, size, queries, heads, size, scores + p, 1, room);
    }
    for (uint64_t h = 0; h < heads; h++) soften(scores + h * room + first, last + 1 - first, 1 / sqrtf((float)size));
    memset(out, 0, heads * size * sizeof *out);
    for (uint64_t p = first; p <= last; p += count) {
        count = stretch(job->values + begin, width, p, last, rows);
        for (uint64_t h = 0; h < heads; h++)
            nl_adds(job->kernels, job->sequence->kind, rows, count, size, scores + h * room + p, out + h * size);
    }
}

static void attend_part(void *argument, unsigned thread, unsigned part, unsigned parts) {
    const Attend *job = argument;
    const NlShape *shape = job->shape;
    const uint64_t size = shape->head_size, sharing = shape->heads / shape->kv_heads, group = group_of(shape);
    const uint64_t groups = (sharing + group - 1) / group, of_token = shape->kv_heads * groups;
    float *scores = job->sequence->scores + thread * group * job->sequence->context;
    uint64_t begin, end;
    nl_share(job->tokens * of_token, part, parts, &begin, &end);
    for (uint64_t k = begin; k < end; k++) {
        const uint64_t within = k % groups * group, head = k % of_token / groups * sharing + within;
        const uint64_t at = (k / of_token * shape->heads + head) * size;
        attend_heads(job, head, sharing - within < group ? sharing - within : group, job->length + k / of_token,
                     job->sequence->queries + at, scores, job->sequence->mixed + at);
    }
}

static void store(const NlSequence *sequence, const NlKernels *kernels, const float *from, uint64_t count,
                  unsigned char *to) {
    if (sequence->kind == NL_F32) memcpy(to, from, count * sizeof *from);
    else kernels->narrow(from, count, to);
}

void nl_attend(NlSequence *sequence, const NlShape *shape, const NlAttention *weights, uint64_t layer,
               const NlCompute *compute, uint64_t length, uint64_t tokens, const float *in, float *out) {
    const uint64_t wide = shape->heads * shape->head_size, narrow = sequence->width;
    const uint64_t row = narrow * sequence->value_bytes;
    unsigned char *keys = sequence->keys + layer * sequence->context * row;
    unsigned char *values = sequence->values + layer * sequence->context * row;
    Attend job = {sequence, shape, compute->kernels, keys, values, length, tokens, 0};
    if (shape->window && layer >= shape->first_windowed) job.window = shape->window;
    nl_linear(compute, &weights->queries, weights->query_bias.data, in, tokens, sequence->queries, wide);
    nl_linear(compute, &weights->keys, weights->key_bias.data, in, tokens, sequence->new_keys, narrow);
    nl_linear(compute, &weights->values, weights->value_bias.data, in, tokens, sequence->new_values, narrow);
    if (weights->of_queries.norm.data) {
        nl_norm(&weights->of_queries, 0, shape->epsilon, sequence->queries, tokens * shape->heads, shape->head_size,
                sequence->queries);
        nl_norm(&weights->of_keys, 0, shape->epsilon, sequence->new_keys, tokens * shape->kv_heads, shape->head_size,
                sequence->new_keys);
    }
    if (shape->family != NL_OPT) {
        turn(sequence, shape, sequence->queries, shape->heads, tokens);
        turn(sequence, shape, sequence->new_keys, shape->kv_heads, tokens);
    }
    store(sequence, compute->kernels, sequence->new_keys, tokens * narrow, keys + length * row);
    store(sequence, compute->kernels, sequence->new_values, tokens * narrow, values + length * row);
    if (tokens * (length + tokens) * wide < WORTH_SHARING) attend_part(&job, 0, 0, 1);
    else nl_workers_do(compute->workers, attend_part, &job);
    nl_linear(compute, &weights->output, weights->output_bias.data, sequence->mixed, tokens, out, shape->hidden);
}
