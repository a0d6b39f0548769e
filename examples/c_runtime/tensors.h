/* The tensors of the flash file outside of bundles, by name: from the safetensors header and, for rounded matrices, the
 * index. */
#ifndef NL_TENSORS_H
#define NL_TENSORS_H

#include "index.h"

/* A tensor of at most two dimensions: `rows` of `columns` elements (a vector is one row), each of `row_bytes`. */
typedef struct {
    const NlFormat *format; /* NULL if the tensor is not there */
    uint64_t rows, columns, row_bytes, offset;
} NlTensor;

/* The header; free `json.text` with nl_tensors_close. `entries` point at the names, sorted. */
typedef struct {
    const NlIndex *index;
    NlJson json;
    const char **entries;
    uint64_t count, data;
} NlTensors;

/* Reads the header. Close it also after an error. */
int nl_tensors_open(NlTensors *tensors, const NlIndex *index, NlError *error);
void nl_tensors_close(NlTensors *tensors);

/* Looks a tensor up. It is no error if it is not there (then tensor->format is NULL), but if it cannot be used. */
int nl_tensors_find(const NlTensors *tensors, const char *name, NlTensor *tensor);

#endif
