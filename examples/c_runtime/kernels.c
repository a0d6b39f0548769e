/* The kernels that any machine can run, and the choice between all. */
#include "kernels.h"

#include <string.h>

/* The widest block. Rows of formats without blocks are taken in stretches of as many. */
#define STRETCH 32

/* Rows are decoded stretch by stretch. Four sums run side by side, as compilers can then keep them in one register. */
static float dot_with(const NlFormat *format, const unsigned char *row, uint64_t count, const float *values) {
    const uint64_t bytes = STRETCH / format->block_weights * format->block_bytes;
    float weights[STRETCH], sums[4] = {0, 0, 0, 0};
    for (uint64_t begin = 0; begin < count; begin += STRETCH, row += bytes) {
        uint64_t length = count - begin < STRETCH ? count - begin : STRETCH, j = 0;
        format->decode(row, length, weights);
        for (; j + 4 <= length; j += 4)
            for (uint64_t k = 0; k < 4; k++) sums[k] += weights[j + k] * values[begin + j + k];
        for (; j < length; j++) sums[0] += weights[j] * values[begin + j];
    }
    return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

static void add_with(const NlFormat *format, const unsigned char *row, uint64_t count, float scale, float *values) {
    const uint64_t bytes = STRETCH / format->block_weights * format->block_bytes;
    float weights[STRETCH];
    for (uint64_t begin = 0; begin < count; begin += STRETCH, row += bytes) {
        uint64_t length = count - begin < STRETCH ? count - begin : STRETCH;
        format->decode(row, length, weights);
        for (uint64_t j = 0; j < length; j++) values[begin + j] += scale * weights[j];
    }
}

#define SCALAR(name, format)                                                                           \
    static float dot_##name(const unsigned char *row, uint64_t count, const float *values) {           \
        return dot_with(&(format), row, count, values);                                                \
    }                                                                                                  \
    static void add_##name(const unsigned char *row, uint64_t count, float scale, float *values) {     \
        add_with(&(format), row, count, scale, values);                                                \
    }

SCALAR(f32, NL_SOURCE_FORMATS[0])
SCALAR(f16, NL_SOURCE_FORMATS[1])
SCALAR(bf16, NL_SOURCE_FORMATS[2])
SCALAR(q8_0, NL_BLOCK_FORMATS[0])
SCALAR(q4_0, NL_BLOCK_FORMATS[1])
SCALAR(iq4_nl, NL_BLOCK_FORMATS[2])

const NlKernels NL_SCALAR_KERNELS = {
    "scalar",
    {dot_f32, dot_f16, dot_bf16, dot_q8_0, dot_q4_0, dot_iq4_nl},
    {add_f32, add_f16, add_bf16, add_q8_0, add_q4_0, add_iq4_nl},
};

void nl_widen(const NlKernels *kernels, int kind, const unsigned char *row, uint64_t count, float *values) {
    memset(values, 0, count * sizeof *values);
    kernels->add[kind](row, count, 1, values);
}

int nl_kind(const NlFormat *format) {
    for (int k = 0; k < 3; k++) {
        if (format == &NL_SOURCE_FORMATS[k]) return NL_F32 + k;
        if (format == &NL_BLOCK_FORMATS[k]) return NL_Q8_0 + k;
    }
    return -1;
}

const NlKernels *nl_kernels(const char *name) {
#ifdef NL_HAS_AVX2
    /* Every processor with AVX2 has F16C. */
    if ((!name || !strcmp(name, "avx2")) && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
        return &NL_AVX2_KERNELS;
#endif
#ifdef NL_HAS_NEON
    if (!name || !strcmp(name, "neon")) return &NL_NEON_KERNELS; /* every 64-bit ARM has it */
#endif
    return !name || !strcmp(name, "scalar") ? &NL_SCALAR_KERNELS : NULL;
}
