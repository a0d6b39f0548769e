#include "activations.h"

#include <math.h>
#include <string.h>

enum { RELU, FATRELU, RELU_SQUARED, SILU, GELU, GELU_TANH };

static const struct {
    const char *name;
    int kind;
} NAMES[] = {
    {"relu", RELU}, {"fatrelu", FATRELU}, {"relu2", RELU_SQUARED},    {"silu", SILU},
    {"swish", SILU}, {"gelu", GELU},      {"gelu_pytorch_tanh", GELU_TANH}, {"gelu_new", GELU_TANH},
};

int nl_activation(const char *name, double cut, NlActivation *activation, NlError *error) {
    activation->cut = (float)cut;
    for (unsigned k = 0; k < sizeof NAMES / sizeof *NAMES; k++) {
        if (strcmp(name, NAMES[k].name) != 0) continue;
        activation->kind = NAMES[k].kind;
        return 0;
    }
    return nl_fail(error, NL_NOT_SUPPORTED, "the activation %s is not among those of this runtime", name);
}

static float activated(const NlActivation *activation, float v) {
    switch (activation->kind) {
        case RELU: return v > 0 || isnan(v) ? v : 0;
        case FATRELU: return v > activation->cut || isnan(v) ? v : 0;
        case RELU_SQUARED: return v > 0 || isnan(v) ? v * v : 0;
        case SILU: return v / (1 + expf(-v));
        case GELU: return v * 0.5f * (1 + erff(v * 0.70710678118654752f));
        default: return 0.5f * v * (1 + tanhf(0.79788456080286536f * (v + 0.044715f * v * v * v)));
    }
}

void nl_activate(const NlActivation *activation, float *values, unsigned long count) {
    for (unsigned long j = 0; j < count; j++) values[j] = activated(activation, values[j]);
}
