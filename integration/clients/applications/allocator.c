/*
 * What an allocator gives as zeroed is zero, whatever was registered there before. To be run with an allocator preloaded.
 * See topic.h.
 */
#include "topic.h"

#include <errno.h>
#include <pthread.h>
#include <string.h>

enum { ROUNDS = 200 };

static struct ibv_pd *pd;

/* Freed before it is deregistered, as programs with a cache of regions do, or after. */
static void rounds(size_t length, bool freed_first)
{
	for (int round = 0; round < ROUNDS; round++) {
		unsigned char *at = malloc(length);

		CHECK(at);
		memset(at, 0x5a, length);
		struct ibv_mr *mr = topic_register(pd, at, length);

		memset(at, 0x5b, length);
		if (freed_first)
			free(at);
		CHECK_EQ(ibv_dereg_mr(mr), 0);
		if (!freed_first) {
			topic_all(at, length, 0x5b, "deregistered");
			free(at);
		}
		at = calloc(1, length);
		CHECK(at);
		for (size_t i = 0; i < length; i++)
			CHECK(at[i] == 0, "round %d: byte %zu of calloc's is %#x", round, i, at[i]);
		free(at);
	}
}

static const size_t lengths[] = {4096, 65536, 1 << 20};

static void *of_all_lengths(void *freed_first)
{
	for (size_t i = 0; i < sizeof(lengths) / sizeof(*lengths); i++)
		rounds(lengths[i], freed_first != NULL);
	return NULL;
}

static void calloc_after_free(void)
{
	pd = topic_open();
	of_all_lengths((void *)1);
}

static void calloc_after_dereg(void)
{
	pd = topic_open();
	of_all_lengths(NULL);
}

/* Threads have arenas of their own, which shrink and grow in another way. */
static void in_threads(void)
{
	pthread_t threads[2];

	pd = topic_open();
	for (int i = 0; i < 2; i++)
		CHECK_EQ(pthread_create(&threads[i], NULL, of_all_lengths, i ? &threads : NULL), 0);
	for (int i = 0; i < 2; i++)
		CHECK_EQ(pthread_join(threads[i], NULL), 0);
}

static void buffer_grows(void)
{
	pd = topic_open();
	for (size_t length = 4096; length <= 4 * MIB; length *= 2) {
		unsigned char *at = malloc(length);

		memset(at, 7, length);
		struct ibv_mr *mr = topic_register(pd, at, length);

		at = realloc(at, 2 * length);
		CHECK(at, "%s", strerror(errno));
		topic_all(at, length, 7, "after realloc");
		memset(at, 9, 2 * length);
		CHECK_EQ(ibv_dereg_mr(mr), 0);
		topic_all(at, 2 * length, 9, "deregistered");
		CHECK_EQ(ibv_dereg_mr(topic_register(pd, at, 2 * length)), 0);
		topic_all(at, 2 * length, 9, "deregistered again");
		free(at);
	}
}

int main(int argc, char **argv)
{
	static const struct topic_case cases[] = {
		{"calloc_after_free", calloc_after_free},
		{"calloc_after_dereg", calloc_after_dereg},
		{"in_threads", in_threads},
		{"buffer_grows", buffer_grows},
		{NULL, NULL},
	};

	return topic_main(cases, argc, argv);
}
