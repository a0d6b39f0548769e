/*
 * Memory as a promise. Everything a model holds is carved out of one mapping. Carving is a function of the model alone,
 * so that it is done twice: from an arena without memory, which only counts what will be needed and for what, and from
 * one with that many bytes.
 */
#ifndef NL_ARENA_H
#define NL_ARENA_H

#include <stdint.h>

#include "error.h"

/* What memory is for. */
enum { NL_DENSE, NL_RESIDENT, NL_SEQUENCE, NL_WORKING, NL_USES };

typedef struct {
    unsigned char *memory; /* NULL while only counting */
    uint64_t bytes, used, uses[NL_USES];
} NlArena;

/* `bytes` of memory for a use, aligned to 64 bytes, or to a page if they are that many; NULL while counting. */
void *nl_carve(NlArena *arena, int use, uint64_t bytes);

/* Memory of its own, zeroed, in whole pages; NULL if there is none. */
void *nl_map(uint64_t bytes);
void nl_unmap(void *memory, uint64_t bytes);

/* Bytes that the process holds right now; 0 if the system does not say. */
uint64_t nl_resident_bytes(void);

#endif
