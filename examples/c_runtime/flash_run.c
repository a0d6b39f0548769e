/*
 * Generates tokens from a flash layout under a memory limit.
 *
 *     flash_run [OPTION ...] DIRECTORY < requests
 *
 * Requests are lines of words, answered in order; README.md describes them:
 *
 *     generate N TOKEN ...    a new sequence: `token T` for each of at most N new tokens, then `figures`
 *     continue N TOKEN ...    the same, going on with the sequence
 *     logits TOKEN ...        a new sequence: `logits V ...`, the logits after its last token
 *     shrink BYTES            a smaller memory limit from now on: `memory`
 *
 * Exit codes: 0 success, 1 the layout cannot be used or a request failed, 2 wrong usage.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <time.h>

#include "neuralink.h"

#define MOST_STOPS 64
#define PROBE_SECONDS 1.0

typedef struct {
    NlOptions options;
    NlSampling sampling;
    const char *directory, *probe; /* the layout; the name of the device to measure */
    uint32_t stops[MOST_STOPS], stop_count;
    int json, only_plan;
} Settings;

static double now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (double)time.tv_sec + 1e-9 * (double)time.tv_nsec;
}

/* The most that the process has held; 0 if the system does not say. */
static uint64_t peak_bytes(void) {
    char line[256];
    uint64_t kilobytes = 0;
    FILE *status = fopen("/proc/self/status", "r");
    while (status && fgets(line, sizeof line, status))
        if (sscanf(line, "VmHWM: %" SCNu64, &kilobytes) == 1) break;
    if (status) fclose(status);
    return kilobytes * 1024;
}

/* ---- options ---- */

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

static int parse_whole(const char *text, uint64_t most, uint64_t *out) {
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

static int parse(int argc, char **argv, Settings *settings) {
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

/* ---- answers ---- */

static void print_memory(const Settings *settings, const NlMemory *memory) {
    if (settings->json) {
        printf("memory {\"programs_bytes\": %" PRIu64 ", \"dense_bytes\": %" PRIu64 ", \"resident_bytes\": %" PRIu64
               ", \"sequence_bytes\": %" PRIu64 ", \"working_bytes\": %" PRIu64 ", \"tables_bytes\": %" PRIu64
               ", \"cache_bytes\": %" PRIu64 ", \"planned_bytes\": %" PRIu64 ", \"least_bytes\": %" PRIu64
               ", \"flash_bytes\": %" PRIu64 ", \"cached_bundles\": %" PRIu64 ", \"bundles\": %" PRIu64
               ", \"streamed_bytes\": %" PRIu64 ", \"batch\": %" PRIu64 ", \"context\": %" PRIu64 "}\n",
               memory->programs, memory->dense, memory->resident, memory->sequence, memory->working, memory->tables,
               memory->cache, memory->total, memory->least, memory->flash, memory->cached, memory->bundles,
               memory->streamed, memory->batch, memory->context);
        return;
    }
    fprintf(stderr,
            "memory: %.1f MB = %.1f of cache (%.1f %% of the bundles) + %.1f of dense weights + %.1f of resident rows + "
            "%.1f for %" PRIu64 " tokens + %.1f to work with + %.1f of tables + %.1f of programs; at least %.1f\n",
            (double)memory->total / 1e6, (double)memory->cache / 1e6,
            100 * (double)memory->cached / (double)(memory->bundles ? memory->bundles : 1), (double)memory->dense / 1e6,
            (double)memory->resident / 1e6, (double)memory->sequence / 1e6, memory->context,
            (double)memory->working / 1e6, (double)memory->tables / 1e6, (double)memory->programs / 1e6,
            (double)memory->least / 1e6);
}

static void print_model(const Settings *settings, const NlModel *model) {
    NlFacts facts;
    NlMemory memory;
    nl_facts(model, &facts);
    nl_memory(model, &memory);
    print_memory(settings, &memory);
    if (settings->json)
        printf("model {\"type\": \"%s\", \"kernels\": \"%s\", \"activations\": \"%s\", \"reads\": \"%s\", \"direct\": %s, \"layers\": %u, "
               "\"hidden\": %u, \"vocabulary\": %u, \"context\": %u}\n",
               facts.type, facts.kernels, facts.rounded ? "int8" : "f32", facts.reads, facts.direct ? "true" : "false",
               facts.layers, facts.hidden, facts.vocabulary, facts.context);
    else
        fprintf(stderr, "model: %s, kernels %s%s, reads by %s%s\n", facts.type, facts.kernels,
                facts.rounded ? " with activations in 8 bits" : "", facts.reads,
                facts.direct ? " past the page cache" : "");
    if (*facts.note) fprintf(stderr, "flash_run: %s\n", facts.note);
}

typedef struct {
    uint64_t tokens;
    double seconds;
    NlCounters counters;
} Phase;

static NlCounters minus(NlCounters a, NlCounters b) {
    a.looked_up -= b.looked_up;
    a.hits -= b.hits;
    a.reads -= b.reads;
    a.bytes_read -= b.bytes_read;
    a.bytes_useful -= b.bytes_useful;
    a.bytes_streamed -= b.bytes_streamed;
    a.io_seconds -= b.io_seconds;
    return a;
}

static void print_phase(const Settings *settings, const char *name, const Phase *phase) {
    const NlCounters *of = &phase->counters;
    double tokens = phase->tokens ? (double)phase->tokens : 1, seconds = phase->seconds > 0 ? phase->seconds : 1e-9;
    double looked_up = of->looked_up ? (double)of->looked_up : 1;
    if (settings->json)
        printf("\"%s\": {\"tokens\": %" PRIu64 ", \"seconds\": %.9g, \"looked_up\": %" PRIu64 ", \"hits\": %" PRIu64
               ", \"reads\": %" PRIu64 ", \"bytes_read\": %" PRIu64 ", \"bytes_useful\": %" PRIu64
               ", \"bytes_streamed\": %" PRIu64 ", \"io_seconds\": %.9g}, ",
               name, phase->tokens, phase->seconds, of->looked_up, of->hits, of->reads, of->bytes_read,
               of->bytes_useful, of->bytes_streamed, of->io_seconds);
    else
        fprintf(stderr,
                "%s: %" PRIu64 " tokens in %.3f s (%.1f tokens/s), %.0f %% of it waiting for reads; per token %.0f neurons, "
                "%.1f %% of them in memory, %.1f reads, %.1f kB\n",
                name, phase->tokens, phase->seconds, (double)phase->tokens / seconds, 100 * of->io_seconds / seconds,
                (double)of->looked_up / tokens, 100 * (double)of->hits / looked_up, (double)of->reads / tokens,
                (double)of->bytes_read / tokens / 1e3);
}

/* ---- requests ---- */

static int is_stop(const Settings *settings, uint32_t token) {
    for (uint32_t k = 0; k < settings->stop_count; k++)
        if (settings->stops[k] == token) return 1;
    return 0;
}

static int generate(NlModel *model, Settings *settings, uint64_t wanted, const uint32_t *tokens, uint32_t count,
                    NlError *error) {
    Phase phases[2];
    NlCounters before, after;
    double began = now(), ended;
    memset(phases, 0, sizeof phases);
    nl_counters(model, &before);
    if (!nl_tokens(model, tokens, count, error)) return -1;
    for (uint64_t made = 1;; made++) {
        uint32_t token = nl_choose(model, &settings->sampling);
        ended = now();
        nl_counters(model, &after);
        Phase *phase = &phases[made > 1];
        phase->tokens = made > 1 ? phase->tokens + 1 : count;
        phase->seconds += ended - began;
        phase->counters = minus(after, before);
        if (made == 1) before = after;
        began = ended;
        printf("token %" PRIu32 "\n", token);
        if (fflush(stdout) != 0) return 0; /* nobody listens */
        if (made == wanted || is_stop(settings, token)) break;
        if (!nl_tokens(model, &token, 1, error)) return -1;
    }
    if (settings->json) printf("figures {");
    print_phase(settings, "prompt", &phases[0]);
    print_phase(settings, settings->json ? "tokens" : "text", &phases[1]);
    if (settings->json) printf("\"peak_bytes\": %" PRIu64 "}\n", peak_bytes());
    else fprintf(stderr, "memory: %.1f MB at most in use\n", (double)peak_bytes() / 1e6);
    return 0;
}

static int print_logits(NlModel *model, const uint32_t *tokens, uint32_t count, NlError *error) {
    NlFacts facts;
    const float *logits = nl_tokens(model, tokens, count, error);
    if (!logits) return -1;
    nl_facts(model, &facts);
    printf("logits");
    for (uint32_t k = 0; k < facts.vocabulary; k++) printf(" %.9g", (double)logits[k]);
    putchar('\n');
    return 0;
}

/* The numbers that follow in a request, in memory of its own. */
static int parse_tokens(uint32_t **tokens, uint32_t *count) {
    uint32_t room = 0;
    *tokens = NULL;
    *count = 0;
    for (char *word = strtok(NULL, " "); word; word = strtok(NULL, " ")) {
        uint64_t token;
        if (parse_whole(word, UINT32_MAX, &token) != 0) return -1;
        if (*count == room) {
            uint32_t *more = room > UINT32_MAX / 8 ? NULL : realloc(*tokens, (room = room ? 2 * room : 64) * sizeof **tokens);
            if (!more) return -1;
            *tokens = more;
        }
        (*tokens)[(*count)++] = (uint32_t)token;
    }
    return 0;
}

static int answer(NlModel *model, Settings *settings, char *line, NlError *error) {
    const char *word = strtok(line, " \r\n"), *number;
    uint64_t wanted = 1;
    uint32_t *tokens = NULL, count = 0;
    NlMemory memory;
    int result = -1, known;
    if (!word) return 0;
    known = !strcmp(word, "generate") || !strcmp(word, "continue") || !strcmp(word, "shrink");
    if (known && (!(number = strtok(NULL, " ")) || parse_whole(number, UINT64_MAX, &wanted) != 0 || !wanted)) known = -1;
    if (known == 0) known = !strcmp(word, "logits");
    if (known < 1 || parse_tokens(&tokens, &count) != 0 || (count == 0) != !strcmp(word, "shrink")) {
        error->code = NL_BAD_OPTION;
        snprintf(error->text, sizeof error->text, "a request is `generate N TOKEN ...`, `continue N TOKEN ...`, "
                                                  "`logits TOKEN ...` or `shrink BYTES`");
    } else if (!strcmp(word, "shrink")) {
        if ((result = nl_shrink(model, wanted, error)) == 0) {
            nl_memory(model, &memory);
            print_memory(settings, &memory);
        }
    } else {
        if (strcmp(word, "continue") != 0) nl_cut(model, 0);
        result = !strcmp(word, "logits") ? print_logits(model, tokens, count, error)
                                         : generate(model, settings, wanted, tokens, count, error);
    }
    free(tokens);
    return result;
}

static int serve(NlModel *model, Settings *settings) {
    char *line = NULL;
    size_t room = 0;
    int failed = 0;
    while (fflush(stdout) == 0 && getline(&line, &room, stdin) > 0) {
        NlError error = {NL_OK, ""};
        line[strcspn(line, "\r\n")] = '\0';
        if (answer(model, settings, line, &error) == 0) continue;
        printf("error %d %s\n", (int)error.code, error.text);
        failed = 1;
    }
    free(line);
    return failed || ferror(stdout);
}

/* Measures the storage, and prints a profile of it. */
static int measure(const Settings *settings) {
    NlError error = {NL_OK, ""};
    NlProbe probe;
    char text[2000];
    if (nl_probe(settings->directory, &settings->options, PROBE_SECONDS, &probe, &error) != 0 ||
        nl_probe_profile(&probe, settings->probe, text, sizeof text, &error) != 0) {
        fprintf(stderr, "flash_run: %s\n", error.text);
        return 1;
    }
    if (!probe.direct) fputs("flash_run: reads went through the page cache: this is no figure of the storage\n", stderr);
    return fputs(text, stdout) < 0 || fflush(stdout) != 0;
}

int main(int argc, char **argv) {
    NlError error = {NL_OK, ""};
    NlMemory memory;
    Settings settings;
    NlModel *model;
    int failed;
    if (parse(argc, argv, &settings) != 0) {
        fputs("usage: flash_run [--dram SIZE|PERCENT] [--context N] [--batch N] [--threads N] [--queue-depth N]\n"
              "                 [--direct | --no-direct] [--reads io_uring|threads] [--cache linked-s3fifo|s3fifo]\n"
              "                 [--map-dense] [--keys-values f32|f16] [--activations f32|int8] [--kernels scalar|avx2|neon]\n"
              "                 [--temperature T] [--top-k N] [--top-p P] [--seed N] [--stop TOKEN,...] [--device FILE] [--plan] [--json] DIRECTORY < REQUESTS\n"
              "       flash_run --probe NAME [--queue-depth N] [--reads io_uring|threads] DIRECTORY > NAME.json\n",
              stderr);
        return 2;
    }
    if (settings.probe) return measure(&settings);
    if (settings.only_plan) {
        failed = nl_plan(settings.directory, &settings.options, &memory, &error);
        if (memory.least) print_memory(&settings, &memory);
        if (failed) fprintf(stderr, "flash_run: %s\n", error.text);
        return failed ? 1 : 0;
    }
    if (!(model = nl_open(settings.directory, &settings.options, &error))) {
        if (settings.json) printf("error %d %s\n", (int)error.code, error.text);
        fprintf(stderr, "flash_run: %s\n", error.text);
        return 1;
    }
    print_model(&settings, model);
    failed = serve(model, &settings);
    nl_close(model);
    return failed;
}
