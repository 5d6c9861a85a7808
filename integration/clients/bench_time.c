/* See bench_time.h. */
#include "bench_time.h"

#include <sched.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>
#include <x86intrin.h>

uint64_t now_ns(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

double tick_ns(void)
{
	uint64_t ns = now_ns(), ticks = __rdtsc();

	while (now_ns() - ns < 50000000)
		;
	return (double)(now_ns() - ns) / (double)(__rdtsc() - ticks);
}

void pin(int core)
{
	cpu_set_t set;

	/* On a machine of one core there is nothing to choose. */
	if (core >= sysconf(_SC_NPROCESSORS_ONLN))
		return;
	CPU_ZERO(&set);
	CPU_SET(core, &set);
	CHECK(sched_setaffinity(0, sizeof set, &set) == 0, "sched_setaffinity");
}

void *memory(size_t length)
{
	void *at = mmap(NULL, length, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	CHECK(at != MAP_FAILED, "mmap");
	memset(at, 1, length);
	return at;
}

uint64_t amount(uint64_t count)
{
	if (!getenv("BENCH_QUICK"))
		return count;
	return count > 100 ? count / 100 : 1;
}

static int ascending(const void *a, const void *b)
{
	uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;

	return (x > y) - (x < y);
}

void print_percentiles(uint64_t *ticks, size_t count)
{
	double ns = tick_ns();

	qsort(ticks, count, sizeof *ticks, ascending);
	printf("p50 %.1f\np99 %.1f\np999 %.1f\n", (double)ticks[count / 2] * ns, (double)ticks[count * 99 / 100] * ns,
	       (double)ticks[count * 999 / 1000] * ns);
}

static int ascending_doubles(const void *a, const void *b)
{
	double x = *(const double *)a, y = *(const double *)b;

	return (x > y) - (x < y);
}

double median(double *values, size_t count)
{
	qsort(values, count, sizeof *values, ascending_doubles);
	return values[count / 2];
}
