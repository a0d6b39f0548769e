/* Integer sums on any machine, and the choice between all. */
#define _GNU_SOURCE
#include "integers.h"

#include <float.h>
#include <math.h>
#include <string.h>

#ifdef NL_HAS_AVXVNNI
#include <cpuid.h>
#endif
#ifdef NL_HAS_DOTPROD
#include <sys/auxv.h>
#define HWCAP_DOTPROD (1ul << 20)
#endif

#define BLOCK 32
/* Adding it leaves no bits behind the point: halves go to the even number. */
#define ROUNDER 0x1.8p23f
/* Blocks of no more than that are zeros, so that no scale is subnormal. */
#define LEAST 0x1p-100f

void nl_round(const float *values, uint64_t count, int8_t *codes, float *scales) {
    for (uint64_t begin = 0; begin < count; begin += BLOCK, values += BLOCK, codes += BLOCK) {
        float most = 0, inverse;
        int finite = 1;
        for (int j = 0; j < BLOCK; j++) {
            float size = fabsf(values[j]);
            finite &= size <= FLT_MAX;
            if (size > most) most = size;
        }
        scales[begin / BLOCK] = !finite ? NAN : most > LEAST ? most / 127 : 0;
        inverse = finite && most > LEAST ? 127 / most : 0;
        if (!finite) memset(codes, 0, BLOCK);
        else
            for (int j = 0; j < BLOCK; j++) codes[j] = (int8_t)(values[j] * inverse + ROUNDER - ROUNDER);
    }
}

static float scale_of(const unsigned char *block) { return nl_widen_f16(block[0] | (uint32_t)block[1] << 8); }

static void codes_q8_0(const unsigned char *block, int *codes) {
    for (int j = 0; j < BLOCK; j++) codes[j] = block[2 + j] < 128 ? block[2 + j] : block[2 + j] - 256;
}

static void look_up(const unsigned char *block, const int8_t *levels, int *codes) {
    for (int j = 0; j < BLOCK / 2; j++) {
        codes[j] = levels[block[2 + j] & 15];
        codes[BLOCK / 2 + j] = levels[block[2 + j] >> 4];
    }
}

static void codes_q4_0(const unsigned char *block, int *codes) { look_up(block, NL_Q4_0_LEVELS, codes); }
static void codes_iq4_nl(const unsigned char *block, int *codes) { look_up(block, NL_IQ4_NL_LEVELS, codes); }

#define SCALAR(name, bytes)                                                                                     \
    static void dots_##name(const unsigned char *const rows[4], uint64_t count, const int8_t *codes,            \
                            const float *scales, float *sums) {                                                 \
        for (int k = 0; k < 4; k++) {                                                                           \
            const unsigned char *block = rows[k];                                                               \
            sums[k] = 0;                                                                                        \
            for (uint64_t j = 0; j < count; j += BLOCK, block += (bytes)) {                                     \
                int of_row[BLOCK], sum = 0;                                                                     \
                codes_##name(block, of_row);                                                                    \
                for (int i = 0; i < BLOCK; i++) sum += of_row[i] * codes[j + (uint64_t)i];                      \
                sums[k] += scale_of(block) * scales[j / BLOCK] * (float)sum;                                    \
            }                                                                                                   \
        }                                                                                                       \
    }

SCALAR(q8_0, 34)
SCALAR(q4_0, 18)
SCALAR(iq4_nl, 18)

const NlIntegers NL_SCALAR_INTEGERS = {
    "scalar", {[NL_Q8_0] = dots_q8_0, [NL_Q4_0] = dots_q4_0, [NL_IQ4_NL] = dots_iq4_nl}};

void nl_integer_dots(const NlIntegers *integers, int kind, const unsigned char *const *rows, uint64_t rows_count,
                     uint64_t count, const int8_t *codes, const float *scales, float *sums) {
    const NlIntegerDots dots = integers->dots[kind];
    uint64_t k = 0;
    for (; k + 4 <= rows_count; k += 4) dots(rows + k, count, codes, scales, sums + k);
    if (k < rows_count) { /* the last ones, and the very last once more in place of those that are missing */
        const unsigned char *four[4];
        float found[4];
        for (uint64_t r = 0; r < 4; r++) four[r] = rows[k + r < rows_count ? k + r : rows_count - 1];
        dots(four, count, codes, scales, found);
        memcpy(sums + k, found, (rows_count - k) * sizeof *sums);
    }
}

#ifdef NL_HAS_AVXVNNI
/* Beside AVX2, as not every compiler's function knows it by name. */
static int has_avxvnni(void) {
    unsigned a, b, c, d;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) && a >= 1 && __get_cpuid_count(7, 1, &a, &b, &c, &d) && a >> 4 & 1;
}
#endif

const NlIntegers *nl_integers(const char *name) {
    const NlKernels *kernels = nl_kernels(name);
#ifdef NL_HAS_AVX512
    if (kernels == &NL_AVX512_KERNELS) return &NL_AVX512_INTEGERS;
#endif
#ifdef NL_HAS_AVXVNNI
    if (!name && kernels == &NL_AVX2_KERNELS && has_avxvnni()) return &NL_AVXVNNI_INTEGERS;
#endif
#ifdef NL_HAS_AVX2
    if (kernels == &NL_AVX2_KERNELS) return &NL_AVX2_INTEGERS;
#endif
#ifdef NL_HAS_DOTPROD
    if (!name && getauxval(AT_HWCAP) & HWCAP_DOTPROD) return &NL_DOTPROD_INTEGERS;
#endif
#ifdef NL_HAS_NEON
    if (kernels == &NL_NEON_KERNELS) return &NL_NEON_INTEGERS;
#endif
    return kernels ? &NL_SCALAR_INTEGERS : NULL;
}
