/* Integer sums on 64-bit ARM: with the instructions that every one has, and with those for just this. */
#include "integers.h"

#ifdef NL_HAS_NEON
#include <arm_neon.h>
#include <string.h>

/* The first or the second 16 of the 32 codes of a block. */

static inline int8x16_t codes_q8_0(const unsigned char *block, int half) {
    return vreinterpretq_s8_u8(vld1q_u8(block + 2 + 16 * half));
}

static inline int8x16_t look_up(const unsigned char *at, const int8_t *table, int half) {
    const uint8x16_t packed = vld1q_u8(at);
    return vqtbl1q_s8(vld1q_s8(table), half ? vshrq_n_u8(packed, 4) : vandq_u8(packed, vdupq_n_u8(15)));
}

static inline int8x16_t codes_q4_0(const unsigned char *block, int half) { return look_up(block + 2, NL_Q4_0_LEVELS, half); }
static inline int8x16_t codes_iq4_nl(const unsigned char *block, int half) { return look_up(block + 2, NL_IQ4_NL_LEVELS, half); }

static inline float scale_of(const unsigned char *block) {
    __fp16 half;
    memcpy(&half, block, sizeof half);
    return half;
}

/* Adds products to four sums. Two products of 8 bits fit into 16, as activations are 127 at most. */
static inline int32x4_t add_products(int32x4_t sum, int8x16_t weights, int8x16_t codes) {
    const int16x8_t low = vmull_s8(vget_low_s8(weights), vget_low_s8(codes));
    return vpadalq_s16(sum, vmlal_s8(low, vget_high_s8(weights), vget_high_s8(codes)));
}

#define INTEGERS(name, bytes, set, target, add)                                                                 \
    target static void set##_##name(const unsigned char *const rows[4], uint64_t count, const int8_t *codes,    \
                                    const float *scales, float *sums) {                                         \
        float32x4_t of_rows[4];                                                                                 \
        for (int k = 0; k < 4; k++) of_rows[k] = vdupq_n_f32(0);                                                \
        for (uint64_t j = 0, at = 0; j < count; j += 32, at += (bytes)) {                                       \
            const int8x16_t low = vld1q_s8(codes + j), high = vld1q_s8(codes + j + 16);                         \
            for (int k = 0; k < 4; k++) {                                                                       \
                const unsigned char *block = rows[k] + at;                                                      \
                int32x4_t sum = add(vdupq_n_s32(0), codes_##name(block, 0), low);                               \
                sum = add(sum, codes_##name(block, 1), high);                                                   \
                of_rows[k] = vfmaq_n_f32(of_rows[k], vcvtq_f32_s32(sum), scale_of(block) * scales[j / 32]);     \
            }                                                                                                   \
        }                                                                                                       \
        for (int k = 0; k < 4; k++) sums[k] = vaddvq_f32(of_rows[k]);                                           \
    }

#define ANY
INTEGERS(q8_0, 34, neon, ANY, add_products)
INTEGERS(q4_0, 18, neon, ANY, add_products)
INTEGERS(iq4_nl, 18, neon, ANY, add_products)

const NlIntegers NL_NEON_INTEGERS = {
    "neon", {[NL_Q8_0] = neon_q8_0, [NL_Q4_0] = neon_q4_0, [NL_IQ4_NL] = neon_iq4_nl}};

#ifdef NL_HAS_DOTPROD
#ifdef __ARM_FEATURE_DOTPROD
#define DOTPROD
#else
#define DOTPROD __attribute__((target("arch=armv8.2-a+dotprod")))
#endif
INTEGERS(q8_0, 34, dotprod, DOTPROD, vdotq_s32)
INTEGERS(q4_0, 18, dotprod, DOTPROD, vdotq_s32)
INTEGERS(iq4_nl, 18, dotprod, DOTPROD, vdotq_s32)

const NlIntegers NL_DOTPROD_INTEGERS = {
    "dotprod", {[NL_Q8_0] = dotprod_q8_0, [NL_Q4_0] = dotprod_q4_0, [NL_IQ4_NL] = dotprod_iq4_nl}};
#endif

#else
typedef int nl_no_neon_integers; /* a file of C must declare something */
#endif
