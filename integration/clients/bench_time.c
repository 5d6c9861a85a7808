/* See bench_time.h. */
#include "bench_time.h"

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
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

/* A pair of cache lines each, as some processors fetch the other one of a pair, too. */
static _Alignas(128) atomic_uint ping;
static _Alignas(128) atomic_uint pong;

static void *answer(void *trips)
{
	pin(1);
	for (unsigned i = 1; i <= *(unsigned *)trips; i++) {
		while (atomic_load_explicit(&ping, memory_order_acquire) != i)
			;
		atomic_store_explicit(&pong, i, memory_order_release);
	}
	return NULL;
}

/* The median of round trips of a cache line, in ticks. */
static double cache_line(void)
{
	enum { TRIPS = 5000 };
	static uint64_t ticks[TRIPS];
	unsigned samples = (unsigned)amount(TRIPS), warm_up = samples / 10, trips = samples + warm_up;
	pthread_t thread;

	atomic_store(&ping, 0);
	atomic_store(&pong, 0);
	CHECK(pthread_create(&thread, NULL, answer, &trips) == 0, "pthread_create");
	for (unsigned i = 1; i <= trips; i++) {
		uint64_t start = __rdtsc();
		atomic_store_explicit(&ping, i, memory_order_release);
		while (atomic_load_explicit(&pong, memory_order_acquire) != i)
			;
		if (i > warm_up)
			ticks[i - warm_up - 1] = __rdtsc() - start;
	}
	pthread_join(thread, NULL);
	qsort(ticks, samples, sizeof *ticks, ascending);
	return (double)ticks[samples / 2];
}

void rounds_take(struct rounds *rounds, uint64_t *ticks, size_t count)
{
	int round = rounds->count++;

	CHECK(round < TIMED_ROUNDS, "more rounds than there is room for");
	qsort(ticks, count, sizeof *ticks, ascending);
	rounds->p50[round] = (double)ticks[count / 2];
	rounds->p99[round] = (double)ticks[count * 99 / 100];
	rounds->line[round] = cache_line();
}

void rounds_print(struct rounds *rounds)
{
	double ns = tick_ns();
	size_t count = (size_t)rounds->count;

	printf("line %.1f\np50 %.1f\np99 %.1f\n", median(rounds->line, count) * ns, median(rounds->p50, count) * ns,
	       median(rounds->p99, count) * ns);
}
