/* Kernels of ARM against those of any machine, on rows of random bytes and of the extreme codes; prints what it tried. */
#include <float.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "integers.h"

#define COUNT 96
#define ROWS 6

static const NlKernels *const PLAIN = &NL_SCALAR_KERNELS;
static unsigned char rows[ROWS][COUNT * 4];
static const unsigned char *pointers[ROWS];
static float vectors[5][COUNT];

static float random_value(void) { return (float)rand() / (float)RAND_MAX * 2 - 1; }

/* Rows whose weights are finite, and neither huge nor tiny. */
static void fill(int kind) {
    static const unsigned sizes[NL_KINDS] = {4, 2, 2, 34, 18, 18, 17};
    for (int k = 0; k < ROWS; k++) {
        const unsigned blocks = kind < NL_PLAIN_KINDS ? COUNT : COUNT / 32;
        for (unsigned j = 0; j < sizes[kind] * blocks; j++)
            rows[k][j] = k == 0 ? 0x80 : k == 1 ? 0x7f : k == 2 ? 0xff : k == 3 ? 0 : (unsigned char)rand();
        for (unsigned b = 0; b < blocks; b++) {
            unsigned char *at = rows[k] + b * sizes[kind];
            float value = random_value();
            uint16_t half = nl_narrow_f16(value);
            if (kind == NL_F32) memcpy(at, &value, 4);
            else if (kind == NL_BF16) memcpy(at, (unsigned char *)&value + 2, 2);
            else if (kind == NL_MXFP4) at[0] = (unsigned char)(120 + rand() % 10);
            else memcpy(at, &half, 2);
        }
        pointers[k] = rows[k];
    }
}

static int differ(const float *found, const float *expected, int count, float scale, const char *what, int kind) {
    for (int k = 0; k < count; k++) {
        if (fabsf(found[k] - expected[k]) <= scale * 1e-5f) continue;
        printf("%s of kind %d: %g, not %g\n", what, kind, (double)found[k], (double)expected[k]);
        return 1;
    }
    return 0;
}

static int try_kernels(const NlKernels *kernels) {
    puts(kernels->name);
    for (int kind = 0; kind < NL_KINDS; kind++) {
        float found[ROWS * 5], expected[ROWS * 5], sums[2][COUNT], of[ROWS], most = 0;
        fill(kind);
        nl_products(kernels, kind, pointers, ROWS, COUNT, vectors[0], 5, COUNT, found, 5, 1);
        nl_products(PLAIN, kind, pointers, ROWS, COUNT, vectors[0], 5, COUNT, expected, 5, 1);
        for (int k = 0; k < ROWS * 5; k++) most = fmaxf(most, fabsf(expected[k]));
        if (differ(found, expected, ROWS * 5, most, "products", kind)) return 1;
        for (int k = 0; k < ROWS; k++) of[k] = random_value();
        memset(sums, 0, sizeof sums);
        nl_adds(kernels, kind, pointers, ROWS, COUNT, of, sums[0]);
        nl_adds(PLAIN, kind, pointers, ROWS, COUNT, of, sums[1]);
        if (differ(sums[0], sums[1], COUNT, most, "sums", kind)) return 1;
    }
    return 0;
}

static int try_narrow(const NlKernels *kernels) {
    const float values[] = {0, -1.5f, 65519, -1e30f, 1e-8f, 2.98e-8f, 3.1f, 1e-5f, -65504};
    unsigned char found[2 * 9], expected[2 * 9];
    kernels->narrow(values, 9, found);
    nl_narrow_row(values, 9, expected);
    return memcmp(found, expected, sizeof found) != 0;
}

/* Every block is one exact integer; three of them differ by their rounding at most. */
static int try_integers(const NlIntegers *integers) {
    int8_t codes[COUNT];
    float scales[COUNT / 32], found[ROWS], expected[ROWS];
    puts(integers->name);
    for (int kind = NL_Q8_0; kind <= NL_IQ4_NL; kind++) {
        for (int v = 0; v < 5; v++) {
            fill(kind);
            nl_round(vectors[v], COUNT, codes, scales);
            nl_integer_dots(integers, kind, pointers, ROWS, COUNT, codes, scales, found);
            nl_integer_dots(&NL_SCALAR_INTEGERS, kind, pointers, ROWS, COUNT, codes, scales, expected);
            for (int k = 0; k < ROWS; k++)
                if (differ(found + k, expected + k, 1, 100, "integers", kind)) return 1;
        }
    }
    return 0;
}

int main(void) {
    for (int v = 0; v < 5; v++)
        for (int j = 0; j < COUNT; j++) vectors[v][j] = v == 3 ? 1 : v == 4 ? -1 : random_value();
    if (try_kernels(&NL_NEON_KERNELS) || try_narrow(&NL_NEON_KERNELS) || try_integers(&NL_NEON_INTEGERS)) return 1;
    if (nl_integers(NULL) != &NL_DOTPROD_INTEGERS) return 1;
    return try_integers(nl_integers(NULL));
}
