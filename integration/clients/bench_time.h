/* Time, processors and memory for programs that measure. */
#pragma once

#include "check.h"

#include <stddef.h>

uint64_t now_ns(void);
/* Nanoseconds of one tick: the time stamp counter costs a tenth of a clock call. */
double tick_ns(void);
/* From now on the thread runs on this core. */
void pin(int core);
/* Fresh memory that is there. */
void *memory(size_t length);

/* `count`, or a little of it where BENCH_QUICK is set: then the figures mean nothing, and only that they come is asked. */
uint64_t amount(uint64_t count);

/*
 * Times of several rounds, each beside round trips of a cache line between the first two cores: what is a neighbour's core in one
 * second is on the other side of the machine in the next, if a hypervisor wants it so.
 */
enum { TIMED_ROUNDS = 21, TIMED = 10000, TIMED_WARM_UP = 1000 };
struct rounds {
	int count;
	double line[TIMED_ROUNDS], p50[TIMED_ROUNDS], p99[TIMED_ROUNDS];
};
/* Takes the times of a round, in ticks, which it sorts; the calling thread is on core 0. */
void rounds_take(struct rounds *rounds, uint64_t *ticks, size_t count);
/* Prints, in nanoseconds, the medians of the rounds' medians and of what one in a hundred exceeds in each round. */
void rounds_print(struct rounds *rounds);
/* Sorts. */
double median(double *values, size_t count);
