/* What a model applies to the values of a gate, or of an up projection without one. */
#ifndef NL_ACTIVATIONS_H
#define NL_ACTIVATIONS_H

#include "error.h"

typedef struct {
    int kind;
    float cut; /* FATReLU: values up to it become 0 */
} NlActivation;

/* The activation of a name, as transformers calls it. -1 with an error if it is not known here. */
int nl_activation(const char *name, double cut, NlActivation *activation, NlError *error);

/* Applies it to `count` values in place. */
void nl_activate(const NlActivation *activation, float *values, unsigned long count);

#endif
