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
SCALAR(mxfp4, NL_BLOCK_FORMATS[3])

const NlKernels NL_SCALAR_KERNELS = {
    "scalar",
    {dot_f32, dot_f16, dot_bf16, dot_q8_0, dot_q4_0, dot_iq4_nl, dot_mxfp4},
    {add_f32, add_f16, add_bf16, add_q8_0, add_q4_0, add_iq4_nl, add_mxfp4},
    {NULL},
    {NULL},
    {NULL},
    nl_narrow_row,
};

void nl_widen(const NlKernels *kernels, int kind, const unsigned char *row, uint64_t count, float *values) {
    memset(values, 0, count * sizeof *values);
    kernels->add[kind](row, count, 1, values);
}

void nl_dots(const NlKernels *kernels, int kind, const unsigned char *const *rows, uint64_t rows_count, uint64_t count,
             const float *values, float *sums) {
    uint64_t k = 0;
    if (kernels->dots[kind] && count % 8 == 0)
        for (; k + 4 <= rows_count; k += 4) kernels->dots[kind](rows + k, count, values, sums + k);
    for (; k < rows_count; k++) sums[k] = kernels->dot[kind](rows[k], count, values);
}

void nl_adds(const NlKernels *kernels, int kind, const unsigned char *const *rows, uint64_t rows_count, uint64_t count,
             const float *scales, float *values) {
    uint64_t k = 0;
    if (kernels->adds[kind] && count % 8 == 0)
        for (; k + 4 <= rows_count; k += 4) kernels->adds[kind](rows + k, count, scales + k, values);
    for (; k < rows_count; k++) kernels->add[kind](rows[k], count, scales[k], values);
}

void nl_products(const NlKernels *kernels, int kind, const unsigned char *const *rows, uint64_t rows_count,
                 uint64_t count, const float *vectors, uint64_t vectors_count, uint64_t pitch, float *out,
                 uint64_t row_step, uint64_t vector_step) {
    const NlTile tile = kind < NL_PLAIN_KINDS && count % 8 == 0 ? kernels->tile[kind] : NULL;
    float sums[8];
    uint64_t v = 0;
    for (; tile && v + 4 <= vectors_count; v += 4) {
        for (uint64_t r = 0; r < rows_count; r += 2) {
            const unsigned char *pair[2] = {rows[r], rows[r + 1 < rows_count ? r + 1 : r]};
            tile(pair, count, vectors + v * pitch, pitch, sums);
            for (uint64_t k = 0; k < 8 && r + k / 4 < rows_count; k++)
                out[(r + k / 4) * row_step + (v + k % 4) * vector_step] = sums[k];
        }
    }
    for (; v < vectors_count; v++) {
        for (uint64_t r = 0; r < rows_count; r += 4) {
            const uint64_t found = rows_count - r < 4 ? rows_count - r : 4;
            nl_dots(kernels, kind, rows + r, found, count, vectors + v * pitch, sums);
            for (uint64_t k = 0; k < found; k++) out[(r + k) * row_step + v * vector_step] = sums[k];
        }
    }
}

int nl_kind(const NlFormat *format) {
    for (int k = 0; k < NL_PLAIN_KINDS; k++)
        if (format == &NL_SOURCE_FORMATS[k]) return k;
    for (int k = NL_PLAIN_KINDS; k < NL_KINDS; k++)
        if (format == &NL_BLOCK_FORMATS[k - NL_PLAIN_KINDS]) return k;
    return -1;
}

const NlKernels *nl_kernels(const char *name) {
#ifdef NL_HAS_AVX512
    /* The compilers' functions ask the system too whether it keeps the registers. */
    if ((!name || !strcmp(name, "avx512")) && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
        return &NL_AVX512_KERNELS;
#endif
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
