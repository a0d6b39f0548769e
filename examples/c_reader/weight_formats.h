/*
 * Weight formats: how the numbers of a part of a bundle are stored. docs/weight_formats.md says what every byte is.
 * Rows are little-endian whatever this machine is, and values are exact.
 */
#ifndef WEIGHT_FORMATS_H
#define WEIGHT_FORMATS_H

#include <stdint.h>

#define MAX_HIDDEN (UINT64_C(1) << 23)

typedef struct {
    const char *name;
    unsigned block_weights, block_bytes;
    void (*decode)(const unsigned char *row, uint64_t hidden, float *values); /* NULL if only the size is known */
} WeightFormat;

/* ggml's block formats, as the index names them, and formats of weights as they are in the source, by dtype. An entry
 * without a name ends each list. */
extern const WeightFormat BLOCK_FORMATS[], SOURCE_FORMATS[];

/* Bytes of a row of `hidden` weights, at most MAX_HIDDEN; 0 if they do not fill whole blocks. */
uint64_t row_bytes(const WeightFormat *format, uint64_t hidden);

#endif
