/* What flash_run prints besides tokens: plans, facts, figures. */
#include <inttypes.h>
#include <math.h>
#include <stdio.h>

#include "flash_run.h"

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

/* Says so if the cache takes less than what one token uses. It still pays for itself: what is used more often stays. */
static void print_cycle(const NlMemory *memory) {
    if (memory->cache == 0 || memory->cache >= memory->cycle || memory->total < memory->least) return;
    fprintf(stderr, "flash_run: the cache takes %.1f MB, but a token uses %.1f MB of bundles: most are read again; --dram ",
            (double)memory->cache / 1e6, (double)memory->cycle / 1e6);
    if (memory->cycle_dram) fprintf(stderr, "%.0fMB would take them\n", ceil((double)memory->cycle_dram / 1e6));
    else fprintf(stderr, "%.0f%% would take them\n", ceil(100 * (double)memory->cycle / (double)memory->flash));
}

void print_memory(const Settings *settings, const NlMemory *memory) {
    if (settings->json) {
        printf("memory {\"programs_bytes\": %" PRIu64 ", \"dense_bytes\": %" PRIu64 ", \"resident_bytes\": %" PRIu64
               ", \"sequence_bytes\": %" PRIu64 ", \"working_bytes\": %" PRIu64 ", \"tables_bytes\": %" PRIu64
               ", \"system_bytes\": %" PRIu64 ", \"cache_bytes\": %" PRIu64
               ", \"planned_bytes\": %" PRIu64 ", \"least_bytes\": %" PRIu64
               ", \"flash_bytes\": %" PRIu64 ", \"cached_bundles\": %" PRIu64 ", \"bundles\": %" PRIu64
               ", \"streamed_bytes\": %" PRIu64 ", \"cycle_bytes\": %" PRIu64 ", \"cycle_dram_bytes\": %" PRIu64
               ", \"batch\": %" PRIu64 ", \"context\": %" PRIu64 "}\n",
               memory->programs, memory->dense, memory->resident, memory->sequence, memory->working, memory->tables,
               memory->system, memory->cache, memory->total, memory->least, memory->flash, memory->cached, memory->bundles,
               memory->streamed, memory->cycle, memory->cycle_dram, memory->batch, memory->context);
        return;
    }
    fprintf(stderr,
            "memory: %.1f MB = %.1f of cache (%.1f %% of the bundles) + %.1f of dense weights + %.1f of resident rows + "
            "%.1f for %" PRIu64 " tokens + %.1f to work with + %.1f of tables + %.1f of programs and the system; at least %.1f\n",
            (double)memory->total / 1e6, (double)memory->cache / 1e6,
            100 * (double)memory->cached / (double)(memory->bundles ? memory->bundles : 1), (double)memory->dense / 1e6,
            (double)memory->resident / 1e6, (double)memory->sequence / 1e6, memory->context,
            (double)memory->working / 1e6, (double)memory->tables / 1e6, (double)(memory->programs + memory->system) / 1e6,
            (double)memory->least / 1e6);
    print_cycle(memory);
}

void print_model(const Settings *settings, const NlModel *model) {
    NlFacts facts;
    NlMemory memory;
    nl_facts(model, &facts);
    nl_memory(model, &memory);
    print_memory(settings, &memory);
    if (settings->json)
        printf("model {\"type\": \"%s\", \"kernels\": \"%s\", \"activations\": \"%s\", \"reads\": \"%s\", "
               "\"direct\": %s, \"layers\": %u, \"hidden\": %u, \"vocabulary\": %u, \"context\": %u}\n",
               facts.type, facts.kernels, facts.rounded ? "int8" : "f32", facts.reads, facts.direct ? "true" : "false",
               facts.layers, facts.hidden, facts.vocabulary, facts.context);
    else
        fprintf(stderr, "model: %s, kernels %s%s, reads by %s%s\n", facts.type, facts.kernels,
                facts.rounded ? " with activations in 8 bits" : "", facts.reads,
                facts.direct ? " past the page cache" : "");
    if (*facts.note) fprintf(stderr, "flash_run: %s\n", facts.note);
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

void print_figures(const Settings *settings, const Phase *prompt, const Phase *tokens) {
    static const Phase none;
    if (settings->json) printf("figures {");
    print_phase(settings, "prompt", prompt);
    if (settings->json || tokens) print_phase(settings, settings->json ? "tokens" : "text", tokens ? tokens : &none);
    if (settings->json) printf("\"peak_bytes\": %" PRIu64 "}\n", peak_bytes());
    else fprintf(stderr, "memory: %.1f MB at most in use\n", (double)peak_bytes() / 1e6);
}
