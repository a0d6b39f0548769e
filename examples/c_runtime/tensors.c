#include "tensors.h"

#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#define MAX_HEADER_BYTES UINT64_C(100000000)
#define MAX_ROWS (UINT64_C(1) << 26)

/* Orders names as they are in the text, up to the closing quotation mark. */
static int compare_names(const char *a, const char *b) {
    for (; *a == *b && *a != '"'; a++, b++) {}
    if (*a == *b) return 0;
    if (*a == '"') return -1;
    if (*b == '"') return 1;
    return (unsigned char)*a < (unsigned char)*b ? -1 : 1;
}

static int compare_entries(const void *a, const void *b) {
    return compare_names(*(const char *const *)a + 1, *(const char *const *)b + 1);
}

int nl_tensors_open(NlTensors *tensors, const NlIndex *index, NlError *error) {
    unsigned char size[8];
    NlJson *json = &tensors->json;
    const char *at, *value;
    uint64_t bytes = 0;
    char *text;
    memset(tensors, 0, sizeof *tensors);
    tensors->index = index;
    json->name = index->name;
    json->error = error;
    if (index->file_bytes < 8) return nl_fail(error, NL_BAD_LAYOUT, "%s: has no header", json->name);
    if (nl_read_at(index->file, size, 8, 0, error) != 0) return -1;
    for (int k = 7; k >= 0; k--) bytes = bytes << 8 | size[k];
    if (bytes < 2 || bytes > MAX_HEADER_BYTES || bytes > index->file_bytes - 8)
        return nl_fail(error, NL_BAD_LAYOUT, "%s: a header of %" PRIu64 " bytes", json->name, bytes);
    if (!(text = malloc((size_t)bytes + 1))) return nl_fail(error, NL_NO_MEMORY, "out of memory");
    text[bytes] = '\0';
    json->text = text;
    json->end = text + bytes;
    tensors->data = 8 + bytes;
    if (nl_read_at(index->file, text, bytes, 8, error) != 0 || nl_json_check(json) != 0) return -1;
    at = json->text;
    for (int more = nl_json_key(json, &at, &value, 1); more; more = nl_json_key(json, &at, &value, 0)) tensors->count++;
    tensors->entries = malloc((size_t)(tensors->count + 1) * sizeof *tensors->entries);
    if (!tensors->entries) return nl_fail(error, NL_NO_MEMORY, "out of memory");
    tensors->count = 0;
    at = json->text;
    for (int more = nl_json_key(json, &at, &value, 1); more; more = nl_json_key(json, &at, &value, 0))
        tensors->entries[tensors->count++] = at;
    qsort(tensors->entries, (size_t)tensors->count, sizeof *tensors->entries, compare_entries);
    for (uint64_t k = 1; k < tensors->count; k++)
        if (compare_entries(&tensors->entries[k - 1], &tensors->entries[k]) == 0)
            return nl_fail(error, NL_BAD_LAYOUT, "%s: a tensor is there twice", json->name);
    return 0;
}

void nl_tensors_close(NlTensors *tensors) {
    free((char *)tensors->json.text);
    free(tensors->entries);
    tensors->json.text = NULL;
    tensors->entries = NULL;
    tensors->count = 0;
}

/* Where a rounded matrix is and in which format: what the index has in `dense`. 1 if it is there. */
static int find_rounded(const NlIndex *index, const char *name, NlTensor *tensor) {
    const NlJson *json = &index->json;
    const char *at, *place, *found, *format;
    if (nl_json_find(json, json->text, "dense", &at) != 0) return -1;
    if (!at) return 0;
    for (int more = nl_json_item(json, &at, 1); more; more = nl_json_item(json, &at, 0)) {
        if (!(place = nl_json_member(json, at, "place")) || !(found = nl_json_member(json, place, "tensor"))) return -1;
        if (!nl_json_is(found, name)) continue;
        if (!(format = nl_json_member(json, at, "weights")) ||
            nl_json_number(json, at, "columns", 1, NL_MAX_HIDDEN, &tensor->columns) != 0)
            return -1;
        tensor->format = nl_find_format(NL_BLOCK_FORMATS, format);
        if (!tensor->format)
            return nl_fail(json->error, NL_BAD_LAYOUT, NL_INDEX_NAME ": %s is in an unknown format", name);
        return 1;
    }
    return 0;
}

int nl_tensors_find(const NlTensors *tensors, const char *name, NlTensor *tensor) {
    const NlJson *json = &tensors->json;
    uint64_t low = 0, high = tensors->count, sizes[2] = {1, 1}, limits[2], dimensions = 0, count = 0;
    const char *entry = NULL, *at, *dtype;
    char key[320];
    const NlFormat *stored;
    int rounded;
    size_t length = strlen(name);
    memset(tensor, 0, sizeof *tensor);
    if (length + 2 > sizeof key) return nl_fail(json->error, NL_BAD_LAYOUT, "a name of a tensor is too long");
    memcpy(key, name, length);
    memcpy(key + length, "\"", 2);
    while (low < high) {
        uint64_t middle = (low + high) / 2;
        int order = compare_names(key, tensors->entries[middle] + 1);
        if (order == 0) {
            const char *value;
            entry = tensors->entries[middle];
            value = strchr(entry + 1 + length, ':'); /* of the key, which was checked to have one */
            entry = value + 1 + strspn(value + 1, " \t\r\n");
            break;
        }
        if (order < 0) high = middle;
        else low = middle + 1;
    }
    if (!entry) return 0;
    if (!(dtype = nl_json_member(json, entry, "dtype")) || !(at = nl_json_member(json, entry, "shape"))) return -1;
    if (!(stored = nl_find_format(NL_SOURCE_FORMATS, dtype)))
        return nl_fail(json->error, NL_BAD_LAYOUT, "%s: %s has an unknown dtype", json->name, name);
    for (int more = nl_json_item(json, &at, 1); more; more = nl_json_item(json, &at, 0), dimensions++)
        if (dimensions == 2 || nl_json_whole(json, at, name, 1, MAX_ROWS, &sizes[dimensions]) != 0)
            return nl_fail(json->error, NL_BAD_LAYOUT, "%s: %s has more than two dimensions", json->name, name);
    if (!(at = nl_json_member(json, entry, "data_offsets"))) return -1;
    for (int more = nl_json_item(json, &at, 1); more; more = nl_json_item(json, &at, 0), count++)
        if (count == 2 || nl_json_whole(json, at, "data_offsets", 0, tensors->index->file_bytes, &limits[count]) != 0)
            return nl_fail(json->error, NL_BAD_LAYOUT, "%s: %s has no two data_offsets", json->name, name);
    if (count != 2 || limits[1] < limits[0] || limits[1] > tensors->index->file_bytes - tensors->data)
        return nl_fail(json->error, NL_BAD_LAYOUT, "%s: %s lies outside the file", json->name, name);
    tensor->offset = tensors->data + limits[0];
    tensor->rows = dimensions == 2 ? sizes[0] : 1;
    tensor->columns = dimensions == 2 ? sizes[1] : sizes[0];
    tensor->format = stored;
    if ((rounded = find_rounded(tensors->index, name, tensor)) < 0) return -1;
    tensor->row_bytes = tensor->columns <= NL_MAX_HIDDEN ? nl_row_bytes(tensor->format, tensor->columns) : 0;
    if (tensor->row_bytes == 0 || tensor->row_bytes * tensor->rows != limits[1] - limits[0])
        return nl_fail(json->error, NL_BAD_LAYOUT, "%s: %s has %" PRIu64 " bytes, not what its shape takes", json->name,
                       name, limits[1] - limits[0]);
    return 0;
}
