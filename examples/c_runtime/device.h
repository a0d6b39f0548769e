/* A device profile (device.schema.json in the package): what a read costs, and so which gaps are cheaper to read across than to skip. */
#ifndef NL_DEVICE_H
#define NL_DEVICE_H

#include <stdint.h>

#include "error.h"

/* A read of s bytes costs operation_seconds + s / bytes_per_second, and moves every page that it touches. */
typedef struct {
    double operation_seconds, bytes_per_second;
    uint64_t page_bytes;
} NlDevice;

/* Reads a profile. Where it has only measured reads, the line closest to them in relative terms is the model. */
int nl_device_read(NlDevice *device, const char *path, NlError *error);

/* The longest gap, in bundles of `stride` bytes, that is cheaper to read across than to skip. */
uint64_t nl_device_gap(const NlDevice *device, uint64_t stride);

#endif
