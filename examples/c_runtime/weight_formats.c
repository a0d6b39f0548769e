#include "weight_formats.h"

#include <stddef.h>
#include <string.h>

#include "json.h"

#define BLOCK 32
#define HALF (BLOCK / 2)

const int8_t NL_Q4_0_LEVELS[16] = {-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7};
const int8_t NL_IQ4_NL_LEVELS[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};
const int8_t NL_MXFP4_DOUBLES[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};

static uint32_t little_16(const unsigned char *bytes) { return bytes[0] | (uint32_t)bytes[1] << 8; }

static float from_bits(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

float nl_half_scale(unsigned exponent) {
    return from_bits(exponent < 2 ? 0x200000u << exponent : (uint32_t)(exponent - 1) << 23); /* the first two are subnormal */
}

float nl_widen_f16(uint32_t half) {
    uint32_t magnitude = half & 0x7fff, sign = (half & 0x8000) << 16;
    if (magnitude < 0x400) return (sign ? -1.0f : 1.0f) * (float)magnitude * 0x1p-24f; /* zero or subnormal */
    /* The exponent's bias is 112 larger; infinity and NaN have the largest exponent in both. */
    return from_bits(sign | ((magnitude << 13) + ((magnitude < 0x7c00 ? 112u : 224u) << 23)));
}

uint16_t nl_narrow_f16(float value) {
    uint32_t bits, magnitude, sign, shift, half, rest;
    memcpy(&bits, &value, sizeof bits);
    sign = bits >> 16 & 0x8000;
    magnitude = bits & 0x7fffffff;
    if (magnitude > 0x7f800000) return (uint16_t)(sign | 0x7e00);  /* not a number */
    if (magnitude >= 0x477ff000) return (uint16_t)(sign | 0x7bff); /* 65,520, which would round to infinity */
    if (magnitude < 0x33000000) return (uint16_t)sign;             /* less than half of the smallest */
    /* Bits to drop: those of the longer mantissa, and below the normal numbers more of them. */
    shift = magnitude < 0x38800000 ? 126 - (magnitude >> 23) : 13;
    if (shift > 13) magnitude = (magnitude & 0x7fffff) | 0x800000;
    else magnitude -= 0x38000000; /* another bias of exponents */
    half = magnitude >> shift;
    rest = magnitude & ((1u << shift) - 1);
    if (rest > 1u << (shift - 1) || (rest == 1u << (shift - 1) && half & 1)) half++;
    return (uint16_t)(sign | half);
}

void nl_narrow_row(const float *values, uint64_t count, unsigned char *out) {
    for (uint64_t j = 0; j < count; j++) {
        uint16_t half = nl_narrow_f16(values[j]);
        out[2 * j] = (unsigned char)half;
        out[2 * j + 1] = (unsigned char)(half >> 8);
    }
}

static void decode_f32(const unsigned char *row, uint64_t hidden, float *values) {
    for (uint64_t j = 0; j < hidden; j++, row += 4) values[j] = from_bits(little_16(row) | little_16(row + 2) << 16);
}

static void decode_f16(const unsigned char *row, uint64_t hidden, float *values) {
    for (uint64_t j = 0; j < hidden; j++) values[j] = nl_widen_f16(little_16(row + 2 * j));
}

static void decode_bf16(const unsigned char *row, uint64_t hidden, float *values) {
    for (uint64_t j = 0; j < hidden; j++) values[j] = from_bits(little_16(row + 2 * j) << 16);
}

static void decode_q8_0(const unsigned char *row, uint64_t hidden, float *values) {
    for (uint64_t begin = 0; begin < hidden; begin += BLOCK, row += 2 + BLOCK) {
        float scale = nl_widen_f16(little_16(row));
        for (int j = 0; j < BLOCK; j++) {
            int code = row[2 + j];
            values[begin + (uint64_t)j] = scale * (float)(code < 128 ? code : code - 256);
        }
    }
}

/* 16 bytes of codes, weights 16 apart in each. */
static void look_up(const unsigned char *codes, const int8_t *levels, float scale, float *values) {
    for (int j = 0; j < HALF; j++) {
        values[j] = scale * (float)levels[codes[j] & 15];
        values[HALF + j] = scale * (float)levels[codes[j] >> 4];
    }
}

static void decode_q4_0(const unsigned char *row, uint64_t hidden, float *values) {
    for (uint64_t begin = 0; begin < hidden; begin += BLOCK, row += 2 + HALF)
        look_up(row + 2, NL_Q4_0_LEVELS, nl_widen_f16(little_16(row)), values + begin);
}

static void decode_iq4_nl(const unsigned char *row, uint64_t hidden, float *values) {
    for (uint64_t begin = 0; begin < hidden; begin += BLOCK, row += 2 + HALF)
        look_up(row + 2, NL_IQ4_NL_LEVELS, nl_widen_f16(little_16(row)), values + begin);
}

static void decode_mxfp4(const unsigned char *row, uint64_t hidden, float *values) {
    for (uint64_t begin = 0; begin < hidden; begin += BLOCK, row += 1 + HALF)
        look_up(row + 1, NL_MXFP4_DOUBLES, nl_half_scale(*row), values + begin);
}

const NlFormat NL_BLOCK_FORMATS[] = {
    {"q8_0", BLOCK, 2 + BLOCK, decode_q8_0},
    {"q4_0", BLOCK, 2 + HALF, decode_q4_0},
    {"iq4_nl", BLOCK, 2 + HALF, decode_iq4_nl},
    {"mxfp4", BLOCK, 1 + HALF, decode_mxfp4},
    {NULL, 0, 0, NULL},
};

const NlFormat NL_SOURCE_FORMATS[] = {
    {"F32", 1, 4, decode_f32}, {"F16", 1, 2, decode_f16},   {"BF16", 1, 2, decode_bf16},   {"F64", 1, 8, NULL},
    {"F8_E4M3", 1, 1, NULL},   {"F8_E5M2", 1, 1, NULL},     {"F8_E4M3FNUZ", 1, 1, NULL},   {"F8_E5M2FNUZ", 1, 1, NULL},
    {"F8_E8M0", 1, 1, NULL},   {"BOOL", 1, 1, NULL},        {"U8", 1, 1, NULL},            {"I8", 1, 1, NULL},
    {"U16", 1, 2, NULL},       {"I16", 1, 2, NULL},         {"U32", 1, 4, NULL},           {"I32", 1, 4, NULL},
    {"U64", 1, 8, NULL},       {"I64", 1, 8, NULL},         {"C64", 1, 8, NULL},           {NULL, 0, 0, NULL},
};

uint64_t nl_row_bytes(const NlFormat *format, uint64_t hidden) {
    if (hidden > NL_MAX_HIDDEN || hidden % format->block_weights) return 0;
    return hidden / format->block_weights * format->block_bytes;
}

const NlFormat *nl_find_format(const NlFormat *formats, const char *at) {
    for (; formats->name; formats++)
        if (nl_json_is(at, formats->name)) return formats;
    return NULL;
}
