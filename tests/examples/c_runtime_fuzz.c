/*
 * Opens damaged layouts and computes with them: whatever the damage, the library must return, with an error or without.
 *
 *     c_runtime_fuzz LAYOUT SCRATCH SEED CASES
 *
 * In turn the index, the config, a device profile, the flash file and its header are changed by some flips, cuts and copies of bytes and by
 * other numbers; or the file is cut while the model is open. Prints how many cases were refused, by code.
 */
#define _GNU_SOURCE
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "neuralink.h"

#define ROOM (1u << 22)

static uint64_t state;

static uint64_t draw(uint64_t below) {
    uint64_t mixed = state += UINT64_C(0x9E3779B97F4A7C15);
    mixed = (mixed ^ mixed >> 30) * UINT64_C(0xBF58476D1CE4E5B9);
    mixed = (mixed ^ mixed >> 27) * UINT64_C(0x94D049BB133111EB);
    return (mixed ^ mixed >> 31) % below;
}

static size_t read_file(const char *folder, const char *name, unsigned char *to) {
    char path[4096];
    size_t size;
    FILE *file;
    snprintf(path, sizeof path, "%s/%s", folder, name);
    if (!(file = fopen(path, "rb"))) abort();
    size = fread(to, 1, ROOM, file);
    fclose(file);
    return size;
}

static void write_file(const char *folder, const char *name, const unsigned char *from, size_t size) {
    char path[4096];
    FILE *file;
    snprintf(path, sizeof path, "%s/%s", folder, name);
    if (!(file = fopen(path, "wb")) || fwrite(from, 1, size, file) != size) abort();
    fclose(file);
}

/* Another number in place of one that starts within the first `reach` bytes. */
static void change_number(unsigned char *text, size_t reach) {
    size_t at = draw(reach);
    while (at < reach && (text[at] < '0' || text[at] > '9')) at++;
    for (; at < reach && text[at] >= '0' && text[at] <= '9'; at++)
        if (draw(2)) text[at] = (unsigned char)('0' + draw(10));
}

/* Changes a file in memory within its first `reach` bytes; returns its new size. */
static size_t damage(unsigned char *text, size_t size, size_t reach) {
    size_t from = draw(reach), to = draw(reach), count = 1 + draw(24);
    if (from + count > reach) count = reach - from;
    if (to + count > reach) to = reach - count;
    switch (draw(6)) {
        case 0: text[from] ^= (unsigned char)(1u << draw(8)); return size;
        case 1: memmove(text + to, text + from, count); return size;
        case 2: return draw(20) ? size : from;
        case 3: memmove(text + from, text + from + count, size - from - count); return size - count;
        default: change_number(text, reach); return size;
    }
}

int main(int argc, char **argv) {
    static unsigned char source[ROOM], changed[ROOM];
    static const char *const names[] = {"model.flash.json", "config.json", "model.flash.safetensors", "device.json"};
    uint64_t codes[6] = {0};
    if (argc != 5) return 2;
    state = strtoull(argv[3], NULL, 10);
    for (unsigned long k = strtoul(argv[4], NULL, 10); k > 0; k--) {
        NlError error = {NL_OK, ""};
        NlOptions options = {0};
        NlModel *model;
        const uint32_t tokens[] = {3, 1, 4, 1, 5};
        char device[4096];
        const char *name = names[draw(4)];
        int cut = draw(8) == 0, last = name == names[2];
        size_t size = read_file(argv[1], name, source), reach = size, now = size;
        uint64_t header = 0;
        for (int byte = 7; last && byte >= 0; byte--) header = header << 8 | source[byte];
        if (last && draw(2)) reach = 8 + (size_t)header;
        memcpy(changed, source, size);
        if (!cut)
            for (uint64_t times = 1 + draw(3); times > 0; times--) now = damage(changed, now, reach < now ? reach : now);
        if (now == 0) now = 1;
        write_file(argv[2], name, changed, now);
        options.cache_share = draw(2) ? 0.3 : 0;
        options.dram = draw(3) ? 0 : 1;
        options.threads = 1 + (uint32_t)draw(2);
        options.queue_depth = 4;
        options.context = draw(2) ? 16 : 0;
        options.half_sequence = (int)draw(2);
        snprintf(device, sizeof device, "%s/%s", argv[2], names[3]);
        if (name == names[3] || draw(4) == 0) options.device = device;
        if (options.dram) { /* about the least that would do */
            NlMemory memory;
            NlError ignored = {NL_OK, ""};
            nl_plan(argv[2], &options, &memory, &ignored);
            options.dram = memory.least + 1 + draw(1000000);
        }
        model = nl_open(argv[2], &options, &error);
        if (model) {
            char path[4096];
            snprintf(path, sizeof path, "%s/%s", argv[2], names[2]);
            if (cut && truncate(path, (off_t)draw(reach)) != 0) abort();
            if (nl_tokens(model, tokens, 5, &error)) nl_tokens(model, tokens, 1, &error);
        }
        if ((!model && error.code == NL_OK) || (error.code != NL_OK && !*error.text)) return 3;
        codes[error.code]++;
        nl_close(model);
        write_file(argv[2], name, source, size);
        if (cut) write_file(argv[2], names[2], changed, read_file(argv[1], names[2], changed));
    }
    for (int code = 0; code < 6; code++) printf("%d %llu\n", code, (unsigned long long)codes[code]);
    return 0;
}
