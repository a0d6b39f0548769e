/*
 * Weight formats: how the numbers of a part of a bundle are stored. docs/weight_formats.md says what every byte is.
 * Rows are little-endian whatever this machine is, and values are exact.
 */
#ifndef NL_WEIGHT_FORMATS_H
#define NL_WEIGHT_FORMATS_H

#include <stdint.h>

#define NL_MAX_HIDDEN (UINT64_C(1) << 23)

typedef struct {
    const char *name;
    unsigned block_weights, block_bytes;
    void (*decode)(const unsigned char *row, uint64_t hidden, float *values); /* NULL if only the size is known */
} NlFormat;

/* ggml's block formats, as the index names them, and formats of weights as they are in the source, by dtype. An entry
 * without a name ends each list. */
extern const NlFormat NL_BLOCK_FORMATS[], NL_SOURCE_FORMATS[];

/* Bytes of a row of `hidden` weights, at most NL_MAX_HIDDEN; 0 if they do not fill whole blocks. */
uint64_t nl_row_bytes(const NlFormat *format, uint64_t hidden);

/* The entry of a list that the JSON string at `at` names, or NULL. */
const NlFormat *nl_find_format(const NlFormat *formats, const char *at);

/* What a code of four bits stands for: in q4_0, iq4_nl, and twice what it stands for in mxfp4. */
extern const int8_t NL_Q4_0_LEVELS[16], NL_IQ4_NL_LEVELS[16], NL_MXFP4_DOUBLES[16];

/* Half of the scale of a block of mxfp4, 2^(exponent - 128). */
float nl_half_scale(unsigned exponent);

/* The value of a float16. */
float nl_widen_f16(uint32_t half);

/* The float16 nearest to a value, of two the even one; beyond the largest, the largest. */
uint16_t nl_narrow_f16(float value);

/* The same for `count` values, little-endian. */
void nl_narrow_row(const float *values, uint64_t count, unsigned char *out);

#endif
