/* The options of flash_run. */
#define _GNU_SOURCE
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>

#include "flash_run.h"

/* `1.2GB`, `64MiB`, a number of bytes, or `20%` of the bundles. */
static int parse_dram(const char *text, NlOptions *options) {
    static const struct {
        const char *name;
        double bytes;
    } units[] = {{"", 1},       {"b", 1},           {"kb", 1e3},           {"mb", 1e6},
                 {"gb", 1e9},   {"kib", 1024},      {"mib", 1024 * 1024.0}, {"gib", 1024 * 1024 * 1024.0}};
    char *rest;
    double value = strtod(text, &rest);
    if (*text < '0' || *text > '9' || value > 1e18) return -1;
    if (!strcmp(rest, "%")) {
        options->dram = 0;
        options->cache_share = value / 100;
        return value <= 100 ? 0 : -1;
    }
    for (unsigned k = 0; k < sizeof units / sizeof *units; k++) {
        if (strcasecmp(rest, units[k].name) != 0) continue;
        options->dram = (uint64_t)(value * units[k].bytes);
        options->cache_share = 0;
        return options->dram > 0 && value * units[k].bytes < 1e18 ? 0 : -1;
    }
    return -1;
}

int parse_whole(const char *text, uint64_t most, uint64_t *out) {
    char *rest;
    errno = 0;
    *out = strtoull(text, &rest, 10);
    return *text < '0' || *text > '9' || *rest || errno || *out > most ? -1 : 0;
}

static int parse_real(const char *text, float least, float most, float *out) {
    char *rest;
    *out = strtof(text, &rest);
    return !*text || *rest || !(*out >= least && *out <= most) ? -1 : 0;
}

static int parse_stops(char *text, Settings *settings) {
    for (char *word = strtok(text, ","); word; word = strtok(NULL, ",")) {
        uint64_t token;
        if (settings->stop_count == MOST_STOPS || parse_whole(word, UINT32_MAX, &token) != 0) return -1;
        settings->stops[settings->stop_count++] = (uint32_t)token;
    }
    return 0;
}

/* An option with a value; -1 if it is wrong. */
static int parse_value(const char *name, char *value, Settings *settings) {
    NlOptions *options = &settings->options;
    static const char *const names[] = {"--context", "--batch", "--threads", "--queue-depth", "--top-k"};
    uint32_t *const places[] = {&options->context, &options->batch, &options->threads, &options->queue_depth,
                                &settings->sampling.top_k};
    uint64_t number;
    for (unsigned k = 0; k < sizeof names / sizeof *names; k++) {
        if (strcmp(name, names[k]) != 0) continue;
        if (parse_whole(value, UINT32_MAX, &number) != 0) return -1;
        *places[k] = (uint32_t)number;
        return 0;
    }
    if (!strcmp(name, "--dram")) return parse_dram(value, options);
    if (!strcmp(name, "--seed")) return parse_whole(value, UINT64_MAX, &settings->sampling.seed);
    if (!strcmp(name, "--temperature")) return parse_real(value, 0, 1e6f, &settings->sampling.temperature);
    if (!strcmp(name, "--top-p")) return parse_real(value, 1e-9f, 1, &settings->sampling.top_p);
    if (!strcmp(name, "--stop")) return parse_stops(value, settings);
    if (!strcmp(name, "--kernels")) return options->kernels = value, 0;
    if (!strcmp(name, "--device")) return options->device = value, 0;
    if (!strcmp(name, "--probe")) return settings->probe = value, 0;
    if (!strcmp(name, "--cache")) {
        options->plain_cache = !strcmp(value, "s3fifo");
        return options->plain_cache || !strcmp(value, "linked-s3fifo") ? 0 : -1;
    }
    if (!strcmp(name, "--keys-values")) {
        options->half_sequence = !strcmp(value, "f16");
        return options->half_sequence || !strcmp(value, "f32") ? 0 : -1;
    }
    if (!strcmp(name, "--activations")) {
        options->round_activations = !strcmp(value, "int8");
        return options->round_activations || !strcmp(value, "f32") ? 0 : -1;
    }
    if (!strcmp(name, "--reads")) {
        options->reads = !strcmp(value, "io_uring") ? 1 : 2;
        return options->reads == 1 || !strcmp(value, "threads") ? 0 : -1;
    }
    return -1;
}

int parse_options(int argc, char **argv, Settings *settings) {
    int only_names = 0;
    memset(settings, 0, sizeof *settings);
    settings->options.cache_share = 0.2;
    settings->sampling.top_p = 1;
    for (int k = 1; k < argc; k++) {
        if (only_names || strncmp(argv[k], "--", 2) != 0) {
            if (settings->directory) return -1;
            settings->directory = argv[k];
        } else if (!argv[k][2]) {
            only_names = 1; /* what follows is no option */
        } else if (!strcmp(argv[k], "--json")) {
            settings->json = 1;
        } else if (!strcmp(argv[k], "--plan")) {
            settings->only_plan = 1;
        } else if (!strcmp(argv[k], "--end-with-stdin")) {
            settings->end_with_stdin = 1;
        } else if (!strcmp(argv[k], "--direct")) {
            settings->options.direct = 1;
        } else if (!strcmp(argv[k], "--no-direct")) {
            settings->options.direct = 2;
        } else if (!strcmp(argv[k], "--map-dense")) {
            settings->options.map_dense = 1;
        } else if (k + 1 == argc || parse_value(argv[k], argv[k + 1], settings) != 0) {
            fprintf(stderr, "flash_run: %s is no option, or its value is wrong\n", argv[k]);
            return -1;
        } else {
            k++;
        }
    }
    return settings->directory ? 0 : -1;
}
