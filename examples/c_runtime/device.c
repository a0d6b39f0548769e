#include "device.h"

#include <math.h>
#include <stdlib.h>

#include "files.h"

#define MAX_PROFILE_BYTES (UINT64_C(1) << 20)
#define MOST_BUNDLES 1e15

/* A positive number of an object; 1, 0 if it is not there, -1 on error. */
static int positive(const NlJson *json, const char *object, const char *key, double *out) {
    const char *at;
    if (nl_json_find(json, object, key, &at) != 0) return -1;
    if (!at) return 0;
    if (nl_json_real(json, at, key, out) != 0) return -1;
    return *out > 0 ? 1 : nl_fail(json->error, NL_BAD_LAYOUT, "%s: %s is not above 0", json->name, key);
}

/* Fits a + b * s to the seconds of reads of s bytes, with the least squares of relative errors. */
static int fit(const NlJson *json, NlDevice *device) {
    const char *at = nl_json_member(json, json->text, "reads");
    double aa = 0, ab = 0, bb = 0, a = 0, b = 0, determinant, operation, per_byte, before = 0;
    int count = 0;
    if (!at) return -1;
    for (int more = nl_json_item(json, &at, 1); more; more = nl_json_item(json, &at, 0), count++) {
        double bytes, rate, x, y;
        int has_bytes = positive(json, at, "bytes", &bytes), has_rate = positive(json, at, "bytes_per_second", &rate);
        if (has_bytes < 0 || has_rate < 0) return -1;
        if (!has_bytes || !has_rate || bytes <= before)
            return nl_fail(json->error, NL_BAD_LAYOUT, "%s: reads are not sizes and rates by ascending size", json->name);
        before = bytes;
        x = rate / bytes; /* one over the seconds of a read: what relative errors are weighted with */
        y = rate;
        aa += x * x;
        ab += x * y;
        bb += y * y;
        a += x;
        b += y;
    }
    determinant = aa * bb - ab * ab;
    operation = (a * bb - b * ab) / determinant;
    per_byte = (b * aa - a * ab) / determinant;
    if (count < 2 || !(operation > 0) || !(per_byte > 0) || !isfinite(operation) || !isfinite(per_byte))
        return nl_fail(json->error, NL_BAD_LAYOUT, "%s: no positive cost per read and per byte fits its reads", json->name);
    device->operation_seconds = operation;
    device->bytes_per_second = 1 / per_byte;
    return 0;
}

static int parse(const NlJson *json, NlDevice *device) {
    const char *pages;
    uint64_t version;
    int operation, rate;
    if (nl_json_string(json, json->text, "format", "neuralink-device") != 0 ||
        nl_json_number(json, json->text, "version", 1, 1, &version) != 0 ||
        nl_json_find(json, json->text, "page_bytes", &pages) != 0)
        return -1;
    device->page_bytes = 4096;
    if (pages && nl_json_whole(json, pages, "page_bytes", 1, 65536, &device->page_bytes) != 0) return -1;
    operation = positive(json, json->text, "operation_seconds", &device->operation_seconds);
    rate = positive(json, json->text, "bytes_per_second", &device->bytes_per_second);
    if (operation < 0 || rate < 0) return -1;
    return operation && rate ? 0 : fit(json, device);
}

int nl_device_read(NlDevice *device, const char *path, NlError *error) {
    NlJson json = {0};
    int result = nl_read_json(NULL, path, MAX_PROFILE_BYTES, &json, error);
    if (result == 0) result = parse(&json, device);
    free((char *)json.text);
    return result;
}

static uint64_t common_divisor(uint64_t a, uint64_t b) {
    while (b) {
        uint64_t rest = a % b;
        a = b;
        b = rest;
    }
    return a;
}

uint64_t nl_device_gap(const NlDevice *device, uint64_t stride) {
    /* Bytes that a read moves beyond its own, on average over all slots that it may start at. */
    double rounding = (double)(device->page_bytes - common_divisor(stride, device->page_bytes));
    double ratio = (device->operation_seconds * device->bytes_per_second + rounding) / (double)stride;
    if (!(ratio < MOST_BUNDLES)) ratio = MOST_BUNDLES;
    return ratio > 1 ? (uint64_t)ceil(ratio) - 1 : 0;
}
