/*
 * Generates tokens from a flash layout under a memory limit.
 *
 *     flash_run [OPTION ...] DIRECTORY < requests
 *
 * Exit codes: 0 success, 1 the layout cannot be used or a request failed, 2 wrong usage.
 */
#include <stdio.h>

#include "flash_run.h"

#define PROBE_SECONDS 1.0

/* Measures the storage, and prints a profile of it. */
static int measure(const Settings *settings) {
    NlError error = {NL_OK, ""};
    NlProbe probe;
    char text[2000];
    if (nl_probe_name(settings->probe, &error) != 0 ||
        nl_probe(settings->directory, &settings->options, PROBE_SECONDS, &probe, &error) != 0 ||
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
    if (parse_options(argc, argv, &settings) != 0) {
        fputs("usage: flash_run [--dram SIZE|PERCENT] [--context N] [--batch N] [--threads N] [--queue-depth N]\n"
              "                 [--direct | --no-direct] [--reads io_uring|threads] [--cache linked-s3fifo|s3fifo]\n"
              "                 [--map-dense] [--keys-values f32|f16] [--activations f32|int8]\n"
              "                 [--kernels scalar|avx2|avx512|neon]\n"
              "                 [--temperature T] [--top-k N] [--top-p P] [--seed N] [--stop TOKEN,...] [--device FILE]\n"
              "                 [--plan] [--json] [--end-with-stdin] DIRECTORY < REQUESTS\n"
              "       flash_run --probe NAME [--queue-depth N] [--reads io_uring|threads] DIRECTORY > NAME.json\n",
              stderr);
        return 2;
    }
    if (settings.probe) return measure(&settings);
    if (settings.end_with_stdin && end_with_stdin() != 0) {
        fputs("flash_run: no thread can be started\n", stderr);
        return 1;
    }
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
    return failed || settings.end_with_stdin; /* whoever notices the end first */
}
