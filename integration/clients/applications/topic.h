/*
 * What a program does with memory, threads, children and descriptors that it has registered or opened: cases that work on
 * a device with a kernel driver. Each program of this directory is one topic.
 *
 *   TOPIC list | TOPIC CASE
 *
 * A case that cannot be run where it is says why and ends with `UNSUPPORTED`.
 */
#pragma once

#include "../loop.h"

#include <stddef.h>
#include <sys/types.h>

enum { PAGE = 4096, MIB = 1 << 20, UNSUPPORTED = 77 };

struct topic_case {
	const char *name;
	void (*run)(void);
};

/* `cases` ends with one without a name. Returns the program's status. */
int topic_main(const struct topic_case *cases, int argc, char **argv);

/* A protection domain of the first device. */
struct ibv_pd *topic_open(void);
/* New private memory, every byte of it `value`. */
unsigned char *topic_memory(size_t length, int value);
/* `ibv_reg_mr` that must succeed. */
struct ibv_mr *topic_register(struct ibv_pd *pd, void *at, size_t length);
/* All bytes must be `value`. */
void topic_all(const volatile unsigned char *at, size_t length, int value, const char *what);
/* Waits for the child, which must end with status 0. */
void topic_ended_well(pid_t child, const char *what);
/* How many mappings the process has. */
int topic_mappings(void);
/* How many descriptors. */
int topic_descriptors(void);
/* Seconds of a clock that only goes forward. */
double topic_now(void);
/* Ends the program as one that cannot be run here. */
__attribute__((noreturn, format(printf, 1, 2))) void topic_unsupported(const char *format, ...);
