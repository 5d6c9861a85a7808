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

/* Sorts times in ticks, and prints the median and what few exceed. */
void print_percentiles(uint64_t *ticks, size_t count);
/* Sorts. */
double median(double *values, size_t count);
