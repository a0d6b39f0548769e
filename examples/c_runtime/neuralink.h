/*
 * The C API of neuralink flash layouts: text from a model whose FFN weights stay in flash, under a memory limit.
 *
 *     NlError error = {0};
 *     NlOptions options = {0};
 *     options.dram = 1200000000;
 *     NlModel *model = nl_open("model-flash", &options, &error);
 *     if (!model) { fprintf(stderr, "%s\n", error.text); return 1; }
 *     const float *logits = nl_tokens(model, prompt, prompt_tokens, &error);
 *     ...
 *     nl_close(model);
 *
 * Functions that can fail enter an error and return -1 or NULL; nothing exits, prints, or keeps state outside of the
 * model. A model belongs to one thread at a time; it has threads of its own. After NL_BAD_OPTION it is as it was, and so it
 * is where nl_shrink finds a limit too small. After a read that failed it can only be closed: calls repeat the error.
 *
 * embed.c is a program that uses this file alone. In C++ write {} where {0} is meant.
 */
#ifndef NEURALINK_H
#define NEURALINK_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* What went wrong. The numbers are stable. */
typedef enum {
    NL_OK = 0,
    NL_BAD_OPTION = 1,    /* an argument that cannot be used */
    NL_BAD_LAYOUT = 2,    /* the layout is missing, malformed or damaged */
    NL_NOT_SUPPORTED = 3, /* a model, activation or format that this library does not compute */
    NL_IO = 4,            /* a read failed, or the file changed while it was open */
    NL_NO_MEMORY = 5      /* the memory allowed is too little, or the system has none left */
} NlCode;

/* An error: a code and one line of text. Start with {0}. */
typedef struct {
    NlCode code;
    char text[400];
} NlError;

/* How to open a model. {0} is a good start; `dram` or `cache_share` says how much memory to use. */
typedef struct {
    uint64_t dram;        /* all the bytes that the process may hold, with what it holds already */
    double cache_share;   /* without `dram`: share of the bundles to cache, 0 to 1; the rest comes on top */
    uint32_t context;     /* tokens that a sequence can have; 0 for 1,024, or what the model has if that is less */
    uint32_t batch;       /* tokens of a prompt computed at once; 0 for as many as fit well, at most 64 */
    uint32_t threads;     /* threads that compute; 0 for one per processor */
    uint32_t queue_depth; /* reads in flight; 0 for 32 */
    int direct;           /* past the page cache: 0 where the file system can, 1 insist, 2 never */
    int reads;            /* 0 for io_uring where there is one, else threads; 1 insist on io_uring; 2 threads */
    int map_dense;        /* map dense weights from the file: pages the system may drop, but a file that is cut while it
                             is open then ends the process */
    int half_sequence;    /* keys and values in float16: half the memory, and no longer quite exact */
    int round_activations; /* multiply rows of q8_0, q4_0 and iq4_nl with activations in 8 bits: faster, and not exact */
    int plain_cache;      /* plain S3-FIFO, without admission aligned to linking */
    const char *device;   /* path of a device profile: which gaps are worth reading across; NULL for those of the index */
    const char *kernels;  /* "scalar", "avx2", "avx512" or "neon"; NULL for the best that the processor has */
} NlOptions;

/* Bytes that a model takes, by what for. `total` is their sum without `flash`. */
typedef struct {
    uint64_t programs; /* what the process held before: program, libraries, the index */
    uint64_t dense;    /* weights outside of FFN blocks */
    uint64_t resident; /* FFN rows that decide firing, and biases */
    uint64_t sequence; /* keys and values of a sequence's tokens */
    uint64_t working;  /* activations, and buffers of reads */
    uint64_t tables;   /* of the caches */
    uint64_t system;   /* page tables, and what else the system keeps for the process: limits of containers count it */
    uint64_t cache;    /* cached bundles */
    uint64_t total;
    uint64_t least;    /* the least total that would do */
    uint64_t flash;    /* bundles in flash */
    uint64_t cached;   /* bundles that the caches have room for */
    uint64_t bundles;  /* all bundles */
    uint64_t batch;    /* tokens of a prompt computed at once */
    uint64_t context;  /* tokens that a sequence can have */
    uint64_t streamed; /* weights that do not fit and are read anew for every token, or batch of a prompt; of those that
                          only some tokens need, what a token needs on average */
    uint64_t cycle;    /* bundles that fire for a token, on average over the tokens that made the order */
    uint64_t cycle_dram; /* if the cache is smaller than that: the `dram` with which it would not be; else, or without, 0 */
} NlMemory;

/* What fetching took, from nl_open on. */
typedef struct {
    uint64_t looked_up, hits;          /* neurons that fired, and those of them that were in memory */
    uint64_t reads, bytes_read;        /* read operations, and what they brought */
    uint64_t bytes_useful;             /* bytes of the bundles that were missing */
    uint64_t bytes_streamed;           /* of bytes_read: weights that did not fit in memory */
    double io_seconds;                 /* time in which nothing but waiting for reads was left to do */
} NlCounters;

/* What a model is. */
typedef struct {
    const char *type, *kernels, *reads; /* model type; which kernels compute; how reads are in flight */
    int rounded;                        /* whether activations are rounded */
    int direct;                         /* whether reads go past the page cache */
    const char *note;                   /* a line on what is not as asked or as usual, or "" */
    uint32_t layers, hidden, vocabulary, context;
} NlFacts;

typedef struct NlModel NlModel;

/* Opens a layout. NULL with an error. The directory has a bundled layout made with `relayout --resident gate`. */
NlModel *nl_open(const char *directory, const NlOptions *options, NlError *error);
void nl_close(NlModel *model);

/* What a layout will need with these options, without opening it for good. If the memory allowed is too little, `memory`
 * is filled, memory->least says what would do, and it returns -1. */
int nl_plan(const char *directory, const NlOptions *options, NlMemory *memory, NlError *error);

void nl_memory(const NlModel *model, NlMemory *memory);
void nl_counters(const NlModel *model, NlCounters *counters);
void nl_facts(const NlModel *model, NlFacts *facts);

/* Goes on with the model's sequence by some tokens. Returns the logits that follow the last one, `vocabulary` of them,
 * there until the next call; NULL with an error. */
const float *nl_tokens(NlModel *model, const uint32_t *tokens, uint32_t count, NlError *error);

/* Goes on with the sequence by two tokens or more. `mean` becomes the mean negative log-likelihood, natural, of all but the
 * first of them, each after those before it: perplexity is exp of that. There are no logits to choose from afterwards. */
int nl_perplexity(NlModel *model, const uint32_t *tokens, uint32_t count, double *mean, NlError *error);

/* Tokens that the sequence has, and cutting it to its first `length`. */
uint32_t nl_length(const NlModel *model);
void nl_cut(NlModel *model, uint32_t length);

/* How to choose a token: the likeliest at temperature 0, else drawn from the `top_k` likeliest (0 for all), and of those
 * from the likeliest that together have probability `top_p`. */
typedef struct {
    float temperature, top_p;
    uint32_t top_k;
    uint64_t seed; /* changes with every draw */
} NlSampling;

/* Chooses from the logits of the last nl_tokens. */
uint32_t nl_choose(NlModel *model, NlSampling *sampling);

/* The FFN of a layer, its experts included: out and in are `[tokens, hidden]`, at most `batch` tokens at a time. */
int nl_ffn(NlModel *model, uint32_t layer, const float *in, uint32_t tokens, float *out, NlError *error);

/* Reads of `bytes` bytes at random places: `reads` of them took `seconds`. A batch of twice as many as are in flight takes
 * `batch_seconds`: it starts with nothing in flight, and ends so. */
#define NL_PROBED 5u
typedef struct {
    uint64_t bytes, reads;
    double seconds, batch_seconds;
} NlProbePoint;

/* What was measured on the storage of a layout. */
typedef struct {
    NlProbePoint points[NL_PROBED]; /* by ascending size; `count` of them */
    uint32_t count, depth;          /* `depth` reads in flight */
    double single_seconds;          /* of a read of the smallest size with nothing else in flight */
    int direct;                     /* past the page cache: without, it is memory that was measured */
    const char *reads;
    uint64_t file_bytes;
} NlProbe;

/* Measures random reads of the layout's flash file for about `seconds` at each size, with the options' queue_depth,
 * direct and reads. */
int nl_probe(const char *directory, const NlOptions *options, double seconds, NlProbe *probe, NlError *error);

/* Checks that a profile can have this name: before the time that measuring takes. */
int nl_probe_name(const char *name, NlError *error);

/* Writes a device profile for `neuralink cluster --device` from what was measured, as a text of less than `size` bytes;
 * 2,000 are enough. */
int nl_probe_profile(const NlProbe *probe, const char *name, char *text, size_t size, NlError *error);

/* Under memory pressure: a new, smaller limit, as `dram`. What is cached is lost, except for pinned bundles. */
int nl_shrink(NlModel *model, uint64_t dram, NlError *error);

#ifdef __cplusplus
}
#endif
#endif
