/* Kernels for 64-bit ARM. Four weights are widened at a time by a `load` per format. */
#include "kernels.h"

#ifdef NL_HAS_NEON
#include <arm_neon.h>
#include <string.h>

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

static inline float32x4_t sums_of(float32x4_t a, float32x4_t b, float32x4_t c, float32x4_t d) {
    return vpaddq_f32(vpaddq_f32(a, b), vpaddq_f32(c, d));
}

/* Four rows at once are four streams of memory, and share what they are multiplied with. A tile is two rows with four
 * vectors: a weight is then widened once for four products. */
#define PLAIN_ROWS(name, bytes)                                                                                \
    static void dots_##name(const unsigned char *const rows[4], uint64_t count, const float *values,           \
                            float *sums) {                                                                     \
        float32x4_t a = vdupq_n_f32(0), b = a, c = a, d = a;                                                   \
        for (uint64_t j = 0; j < count; j += 4) {                                                              \
            float32x4_t of = vld1q_f32(values + j);                                                            \
            a = vfmaq_f32(a, load_##name(rows[0] + j * (bytes)), of);                                          \
            b = vfmaq_f32(b, load_##name(rows[1] + j * (bytes)), of);                                          \
            c = vfmaq_f32(c, load_##name(rows[2] + j * (bytes)), of);                                          \
            d = vfmaq_f32(d, load_##name(rows[3] + j * (bytes)), of);                                          \
        }                                                                                                      \
        vst1q_f32(sums, sums_of(a, b, c, d));                                                                  \
    }                                                                                                          \
    static void tile_##name(const unsigned char *const rows[2], uint64_t count, const float *vectors,          \
                            uint64_t pitch, float *sums) {                                                     \
        float32x4_t a[4], b[4];                                                                                \
        for (int v = 0; v < 4; v++) a[v] = b[v] = vdupq_n_f32(0);                                              \
        for (uint64_t j = 0; j < count; j += 4) {                                                              \
            float32x4_t p = load_##name(rows[0] + j * (bytes)), q = load_##name(rows[1] + j * (bytes));        \
            for (unsigned v = 0; v < 4; v++) {                                                                 \
                float32x4_t of = vld1q_f32(vectors + v * pitch + j);                                           \
                a[v] = vfmaq_f32(a[v], p, of);                                                                 \
                b[v] = vfmaq_f32(b[v], q, of);                                                                 \
            }                                                                                                  \
        }                                                                                                      \
        vst1q_f32(sums, sums_of(a[0], a[1], a[2], a[3]));                                                      \
        vst1q_f32(sums + 4, sums_of(b[0], b[1], b[2], b[3]));                                                  \
    }                                                                                                          \
    static void adds_##name(const unsigned char *const rows[4], uint64_t count, const float *scales,           \
                            float *values) {                                                                   \
        for (uint64_t j = 0; j < count; j += 4) {                                                              \
            float32x4_t sum = vld1q_f32(values + j);                                                           \
            for (int k = 0; k < 4; k++) sum = vfmaq_n_f32(sum, load_##name(rows[k] + j * (bytes)), scales[k]); \
            vst1q_f32(values + j, sum);                                                                        \
        }                                                                                                      \
    }

PLAIN(f32, 4)
PLAIN(f16, 2)
PLAIN(bf16, 2)
PLAIN_ROWS(f32, 4)
PLAIN_ROWS(f16, 2)
PLAIN_ROWS(bf16, 2)

static inline void widen(int8x16_t codes, float32x4_t out[4]) {
    int16x8_t low = vmovl_s8(vget_low_s8(codes)), high = vmovl_s8(vget_high_s8(codes));
    out[0] = vcvtq_f32_s32(vmovl_s16(vget_low_s16(low)));
    out[1] = vcvtq_f32_s32(vmovl_s16(vget_high_s16(low)));
    out[2] = vcvtq_f32_s32(vmovl_s16(vget_low_s16(high)));
    out[3] = vcvtq_f32_s32(vmovl_s16(vget_high_s16(high)));
}

/* What a table has for 16 of the 32 codes that lie 16 apart in 16 bytes. */
static inline void look_up(const unsigned char *at, const int8_t *table, int half, float32x4_t out[4]) {
    const uint8x16_t packed = vld1q_u8(at);
    widen(vqtbl1q_s8(vld1q_s8(table), half ? vshrq_n_u8(packed, 4) : vandq_u8(packed, vdupq_n_u8(15))), out);
}

/* The first or the second half of the codes of a block as numbers, in the order of the weights. */

static inline void widen_q8_0(const unsigned char *block, int half, float32x4_t out[4]) {
    widen(vreinterpretq_s8_u8(vld1q_u8(block + 2 + 16 * half)), out);
}

static inline void widen_q4_0(const unsigned char *block, int half, float32x4_t out[4]) {
    look_up(block + 2, NL_Q4_0_LEVELS, half, out);
}

static inline void widen_iq4_nl(const unsigned char *block, int half, float32x4_t out[4]) {
    look_up(block + 2, NL_IQ4_NL_LEVELS, half, out);
}

/* Weights at once, since the scale alone may be too large or too small for float32. */
static inline void widen_mxfp4(const unsigned char *block, int half, float32x4_t out[4]) {
    look_up(block + 1, NL_MXFP4_DOUBLES, half, out);
    for (int k = 0; k < 4; k++) out[k] = vmulq_n_f32(out[k], nl_half_scale(*block));
}

static inline float scale_q8_0(const unsigned char *block) {
    __fp16 half;
    memcpy(&half, block, sizeof half);
    return half;
}

static inline float scale_q4_0(const unsigned char *block) { return scale_q8_0(block); }
static inline float scale_iq4_nl(const unsigned char *block) { return scale_q8_0(block); }
static inline float scale_mxfp4(const unsigned char *block) { return (void)block, 1; }

/* A block is its scale and its codes. */
#define BLOCKS(name, bytes)                                                                      \
    static inline float32x4_t block_##name(const unsigned char *block, const float *values, float32x4_t sum) { \
        float32x4_t a = vdupq_n_f32(0), b = a, codes[4];                                                \
        for (int half = 0; half < 2; half++) {                                                          \
            const float *of = values + 16 * half;                                                       \
            widen_##name(block, half, codes);                                          \
            a = vfmaq_f32(a, codes[0], vld1q_f32(of));                                                  \
            b = vfmaq_f32(b, codes[1], vld1q_f32(of + 4));                                              \
            a = vfmaq_f32(a, codes[2], vld1q_f32(of + 8));                                              \
            b = vfmaq_f32(b, codes[3], vld1q_f32(of + 12));                                             \
        }                                                                                               \
        return vfmaq_n_f32(sum, vaddq_f32(a, b), scale_##name(block));                                  \
    }                                                                                                   \
    static float dot_##name(const unsigned char *row, uint64_t count, const float *values) {            \
        float32x4_t sum = vdupq_n_f32(0);                                                               \
        for (uint64_t j = 0; j < count; j += 32, row += (bytes)) sum = block_##name(row, values + j, sum); \
        return vaddvq_f32(sum);                                                                         \
    }                                                                                                   \
    static void dots_##name(const unsigned char *const rows[4], uint64_t count, const float *values,    \
                            float *sums) {                                                              \
        float32x4_t a = vdupq_n_f32(0), b = a, c = a, d = a;                                            \
        for (uint64_t j = 0, at = 0; j < count; j += 32, at += (bytes)) {                               \
            a = block_##name(rows[0] + at, values + j, a);                                              \
            b = block_##name(rows[1] + at, values + j, b);                                              \
            c = block_##name(rows[2] + at, values + j, c);                                              \
            d = block_##name(rows[3] + at, values + j, d);                                              \
        }                                                                                               \
        vst1q_f32(sums, sums_of(a, b, c, d));                                                           \
    }                                                                                                   \
    static void add_##name(const unsigned char *row, uint64_t count, float scale, float *values) {      \
        float32x4_t codes[4];                                                                           \
        for (uint64_t j = 0; j < count; j += 32, row += (bytes)) {                                      \
            float by = scale * scale_##name(row);                                                       \
            for (int half = 0; half < 2; half++) {                                                      \
                float *to = values + j + 16 * half;                                                     \
                widen_##name(row, half, codes);                                        \
                for (int k = 0; k < 4; k++)                                                             \
                    vst1q_f32(to + 4 * k, vfmaq_n_f32(vld1q_f32(to + 4 * k), codes[k], by));            \
            }                                                                                           \
        }                                                                                               \
    }                                                                                                   \
    static void adds_##name(const unsigned char *const rows[4], uint64_t count, const float *scales,    \
                            float *values) {                                                            \
        float32x4_t codes[4], sums[4];                                                                  \
        for (uint64_t j = 0; j < count; j += 16) {                                                      \
            const uint64_t at = j / 32 * (bytes);                                                       \
            for (int k = 0; k < 4; k++) sums[k] = vld1q_f32(values + j + 4 * k);                        \
            for (int r = 0; r < 4; r++) {                                                               \
                float by = scales[r] * scale_##name(rows[r] + at);                                      \
                widen_##name(rows[r] + at, j % 32 != 0, codes);                        \
                for (int k = 0; k < 4; k++) sums[k] = vfmaq_n_f32(sums[k], codes[k], by);               \
            }                                                                                           \
            for (int k = 0; k < 4; k++) vst1q_f32(values + j + 4 * k, sums[k]);                         \
        }                                                                                               \
    }

BLOCKS(q8_0, 34)
BLOCKS(q4_0, 18)
BLOCKS(iq4_nl, 18)
BLOCKS(mxfp4, 17)

static void narrow(const float *values, uint64_t count, unsigned char *out) {
    const float32x4_t most = vdupq_n_f32(65504), least = vdupq_n_f32(-65504);
    uint64_t j = 0;
    for (; j + 4 <= count; j += 4) { /* minimum and maximum keep what is not a number */
        float32x4_t v = vmaxq_f32(least, vminq_f32(most, vld1q_f32(values + j)));
        vst1_u8(out + 2 * j, vreinterpret_u8_f16(vcvt_f16_f32(v)));
    }
    nl_narrow_row(values + j, count - j, out + 2 * j);
}

const NlKernels NL_NEON_KERNELS = {
    "neon",
    {dot_f32, dot_f16, dot_bf16, dot_q8_0, dot_q4_0, dot_iq4_nl, dot_mxfp4},
    {add_f32, add_f16, add_bf16, add_q8_0, add_q4_0, add_iq4_nl, add_mxfp4},
    {dots_f32, dots_f16, dots_bf16, dots_q8_0, dots_q4_0, dots_iq4_nl, dots_mxfp4},
    {adds_f32, adds_f16, adds_bf16, adds_q8_0, adds_q4_0, adds_iq4_nl, adds_mxfp4},
    {tile_f32, tile_f16, tile_bf16},
    narrow,
};

#else
typedef int nl_no_neon; /* a file of C must declare something */
#endif
