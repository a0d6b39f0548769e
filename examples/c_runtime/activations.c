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

void nl_activate(const NlActivation *activation, float *values, unsigned long count) {
    for (unsigned long j = 0; j < count; j++) {
        float v = values[j];
        switch (activation->kind) {
            case RELU: v = v > 0 || isnan(v) ? v : 0; break;
            case FATRELU: v = v > activation->cut || isnan(v) ? v : 0; break;
            case RELU_SQUARED: v = v > 0 || isnan(v) ? v * v : 0; break;
            case SILU: v = v / (1 + expf(-v)); break;
            case GELU: v = v * 0.5f * (1 + erff(v * 0.70710678118654752f)); break;
            default: v = 0.5f * v * (1 + tanhf(0.79788456080286536f * (v + 0.044715f * v * v * v))); break;
        }
        values[j] = v;
    }
}
