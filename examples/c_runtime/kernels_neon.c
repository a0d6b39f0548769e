/* Kernels for 64-bit ARM. Four weights are widened at a time by a `load` per format. */
#include "kernels.h"

#ifdef NL_HAS_NEON
#include <arm_neon.h>
#include <string.h>

static const int8_t IQ4_NL[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};

static inline float32x4_t load_f32(const unsigned char *at) { return vreinterpretq_f32_u8(vld1q_u8(at)); }

static inline float32x4_t load_f16(const unsigned char *at) { return vcvt_f32_f16(vreinterpret_f16_u8(vld1_u8(at))); }

static inline float32x4_t load_bf16(const unsigned char *at) {
    return vreinterpretq_f32_u32(vshll_n_u16(vreinterpret_u16_u8(vld1_u8(at)), 16));
}

/* The remainder of a row of fewer than four weights is copied into a row of four that ends in zeros. */
#define PLAIN(name, bytes)                                                                                     \
    static float dot_##name(const unsigned char *row, uint64_t count, const float *values) {                   \
        float32x4_t a = vdupq_n_f32(0), b = a, c = a, d = a;                                                   \
        uint64_t j = 0;                                                                                        \
        for (; j + 16 <= count; j += 16) {                                                                     \
            a = vfmaq_f32(a, load_##name(row + j * (bytes)), vld1q_f32(values + j));                           \
            b = vfmaq_f32(b, load_##name(row + (j + 4) * (bytes)), vld1q_f32(values + j + 4));                 \
            c = vfmaq_f32(c, load_##name(row + (j + 8) * (bytes)), vld1q_f32(values + j + 8));                 \
            d = vfmaq_f32(d, load_##name(row + (j + 12) * (bytes)), vld1q_f32(values + j + 12));               \
        }                                                                                                      \
        for (; j + 4 <= count; j += 4) a = vfmaq_f32(a, load_##name(row + j * (bytes)), vld1q_f32(values + j)); \
        if (j < count) {                                                                                       \
            unsigned char rest[16] = {0};                                                                      \
            float of[4] = {0};                                                                                 \
            memcpy(rest, row + j * (bytes), (count - j) * (bytes));                                            \
            memcpy(of, values + j, (count - j) * sizeof *of);                                                  \
            b = vfmaq_f32(b, load_##name(rest), vld1q_f32(of));                                                \
        }                                                                                                      \
        return vaddvq_f32(vaddq_f32(vaddq_f32(a, b), vaddq_f32(c, d)));                                        \
    }                                                                                                          \
    static void add_##name(const unsigned char *row, uint64_t count, float scale, float *values) {             \
        uint64_t j = 0;                                                                                        \
        for (; j + 4 <= count; j += 4)                                                                         \
            vst1q_f32(values + j, vfmaq_n_f32(vld1q_f32(values + j), load_##name(row + j * (bytes)), scale));  \
        if (j < count) {                                                                                       \
            unsigned char rest[16] = {0};                                                                      \
            float sums[4] = {0};                                                                               \
            memcpy(rest, row + j * (bytes), (count - j) * (bytes));                                            \
            memcpy(sums, values + j, (count - j) * sizeof *sums);                                              \
            vst1q_f32(sums, vfmaq_n_f32(vld1q_f32(sums), load_##name(rest), scale));                           \
            memcpy(values + j, sums, (count - j) * sizeof *sums);                                              \
        }                                                                                                      \
    }

PLAIN(f32, 4)
PLAIN(f16, 2)
PLAIN(bf16, 2)

/* 16 of the 32 codes of a block as signed bytes: the first or the second half, in the order of the weights. */

static inline int8x16_t codes_q8_0(const unsigned char *at, int half) {
    return vreinterpretq_s8_u8(vld1q_u8(at + 16 * half));
}

static inline uint8x16_t nibbles(const unsigned char *at, int half) {
    uint8x16_t packed = vld1q_u8(at);
    return half ? vshrq_n_u8(packed, 4) : vandq_u8(packed, vdupq_n_u8(15));
}

static inline int8x16_t codes_q4_0(const unsigned char *at, int half) {
    return vsubq_s8(vreinterpretq_s8_u8(nibbles(at, half)), vdupq_n_s8(8));
}

static inline int8x16_t codes_iq4_nl(const unsigned char *at, int half) {
    return vqtbl1q_s8(vld1q_s8(IQ4_NL), nibbles(at, half));
}

static inline void widen(int8x16_t codes, float32x4_t out[4]) {
    int16x8_t low = vmovl_s8(vget_low_s8(codes)), high = vmovl_s8(vget_high_s8(codes));
    out[0] = vcvtq_f32_s32(vmovl_s16(vget_low_s16(low)));
    out[1] = vcvtq_f32_s32(vmovl_s16(vget_high_s16(low)));
    out[2] = vcvtq_f32_s32(vmovl_s16(vget_low_s16(high)));
    out[3] = vcvtq_f32_s32(vmovl_s16(vget_high_s16(high)));
}

static inline float scale_of(const unsigned char *block) {
    __fp16 half;
    memcpy(&half, block, sizeof half);
    return half;
}

#define BLOCKS(name, bytes)                                                                             \
    static float dot_##name(const unsigned char *row, uint64_t count, const float *values) {            \
        float32x4_t sum = vdupq_n_f32(0), codes[4];                                                     \
        for (uint64_t j = 0; j < count; j += 32, row += (bytes)) {                                      \
            float32x4_t a = vdupq_n_f32(0), b = a;                                                      \
            for (int half = 0; half < 2; half++) {                                                      \
                const float *of = values + j + 16 * half;                                               \
                widen(codes_##name(row + 2, half), codes);                                              \
                a = vfmaq_f32(a, codes[0], vld1q_f32(of));                                              \
                b = vfmaq_f32(b, codes[1], vld1q_f32(of + 4));                                          \
                a = vfmaq_f32(a, codes[2], vld1q_f32(of + 8));                                          \
                b = vfmaq_f32(b, codes[3], vld1q_f32(of + 12));                                         \
            }                                                                                           \
            sum = vfmaq_n_f32(sum, vaddq_f32(a, b), scale_of(row));                                     \
        }                                                                                               \
        return vaddvq_f32(sum);                                                                         \
    }                                                                                                   \
    static void add_##name(const unsigned char *row, uint64_t count, float scale, float *values) {      \
        float32x4_t codes[4];                                                                           \
        for (uint64_t j = 0; j < count; j += 32, row += (bytes)) {                                      \
            float by = scale * scale_of(row);                                                           \
            for (int half = 0; half < 2; half++) {                                                      \
                float *to = values + j + 16 * half;                                                     \
                widen(codes_##name(row + 2, half), codes);                                              \
                for (int k = 0; k < 4; k++)                                                             \
                    vst1q_f32(to + 4 * k, vfmaq_n_f32(vld1q_f32(to + 4 * k), codes[k], by));            \
            }                                                                                           \
        }                                                                                               \
    }

BLOCKS(q8_0, 34)
BLOCKS(q4_0, 18)
BLOCKS(iq4_nl, 18)

const NlKernels NL_NEON_KERNELS = {
    "neon",
    {dot_f32, dot_f16, dot_bf16, dot_q8_0, dot_q4_0, dot_iq4_nl},
    {add_f32, add_f16, add_bf16, add_q8_0, add_q4_0, add_iq4_nl},
};

#else
typedef int nl_no_neon; /* a file of C must declare something */
#endif
