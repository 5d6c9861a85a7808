/*
 * What registering does not use up: descriptors, mappings, memory. See topic.h.
 */
#include "topic.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <unistd.h>

/* Neither a region nor a cycle may add to them; a few are for what is made once. */
enum { REGIONS = 2000, NOFILE = 1024, CYCLES = 40000, ONCE = 16, LARGE = 180 * MIB };

/* Regions of a page each, more than there may be descriptors. */
static void fdmr(void)
{
	struct ibv_pd *pd = topic_open();
	struct rlimit limit;
	static struct ibv_mr *mrs[REGIONS];

	CHECK_EQ(getrlimit(RLIMIT_NOFILE, &limit), 0);
	if (limit.rlim_cur > NOFILE)
		limit.rlim_cur = NOFILE;
	CHECK_EQ(setrlimit(RLIMIT_NOFILE, &limit), 0);
	unsigned char *at = topic_memory(2UL * REGIONS * PAGE, 1);
	int before = topic_descriptors(), now;

	for (int i = 0; i < REGIONS; i++) {
		mrs[i] = ibv_reg_mr(pd, at + 2UL * i * PAGE, PAGE, IBV_ACCESS_LOCAL_WRITE);
		CHECK(mrs[i], "region %d, %d descriptors: %s", i, topic_descriptors(), strerror(errno));
	}
	now = topic_descriptors();
	CHECK(now <= before + ONCE, "%d descriptors before, %d now", before, now);
	CHECK(open("/dev/null", O_RDONLY) >= 0, "the program's own open: %s", strerror(errno));
	for (int i = 0; i < REGIONS; i++)
		CHECK_EQ(ibv_dereg_mr(mrs[i]), 0);
	topic_all(at, 2UL * REGIONS * PAGE, 1, "the contents");
}

/* Another page is registered and deregistered each time, every second one of a buffer. */
static void cycles(bool downwards)
{
	struct ibv_pd *pd = topic_open();
	unsigned char *at = topic_memory(2UL * CYCLES * PAGE, 1);
	int before = topic_mappings();
	double began = topic_now();

	for (int i = 0; i < CYCLES; i++) {
		int place = downwards ? CYCLES - 1 - i : i;
		struct ibv_mr *mr = ibv_reg_mr(pd, at + 2UL * place * PAGE, PAGE, IBV_ACCESS_LOCAL_WRITE);

		CHECK(mr, "cycle %d, %d mappings: %s", i, topic_mappings(), strerror(errno));
		int error = ibv_dereg_mr(mr);

		CHECK(!error, "cycle %d, %d mappings: %s", i, topic_mappings(), strerror(error));
		/* What may be kept for the next time is bounded. */
		if (i % 5000 == 4999) {
			int now = topic_mappings();

			printf("cycle %d: %d mappings, %.0f us a cycle\n", i, now, (topic_now() - began) / 5000 * 1e6);
			CHECK(now < before + 1200, "cycle %d: %d mappings before, %d now", i, before, now);
			began = topic_now();
		}
	}
	topic_all(at, 2UL * CYCLES * PAGE, 1, "the contents");
}

static void vma_upwards(void) { cycles(false); }
static void vma_downwards(void) { cycles(true); }

/* In a container that may have 300 MiB: there is not room for two of them. */
static void large_deregistered(void)
{
	struct ibv_pd *pd = topic_open();
	unsigned char *at = topic_memory(LARGE, 7);
	struct ibv_mr *mr = topic_register(pd, at, LARGE);

	for (size_t i = 0; i < LARGE; i += PAGE)
		CHECK_EQ(at[i], 7);
	CHECK_EQ(ibv_dereg_mr(mr), 0);
	for (size_t i = 0; i < LARGE; i += PAGE)
		CHECK_EQ(at[i], 7);
}

/* Nothing is there that could be registered, and no signal says so, however much the program may write to files. */
static void past_the_end_of_a_file(void)
{
	char name[] = "/tmp/resources.XXXXXX";
	struct ibv_pd *pd = topic_open();
	int file = mkstemp(name);
	struct rlimit none = {0, 0};

	CHECK(file >= 0, "%s", strerror(errno));
	CHECK_EQ(unlink(name), 0);
	CHECK_EQ(write(file, "one page", 8), 8);
	unsigned char *at = mmap(NULL, 4 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE, file, 0);

	CHECK(at != MAP_FAILED, "%s", strerror(errno));
	for (int limited = 0; limited < 2; limited++) {
		CHECK(!ibv_reg_mr(pd, at, 4 * PAGE, IBV_ACCESS_LOCAL_WRITE) && errno == EFAULT, "%s", strerror(errno));
		CHECK(!ibv_reg_mr(pd, at + PAGE, 2 * PAGE, 0) && errno == EFAULT, "%s", strerror(errno));
		CHECK_EQ(ibv_dereg_mr(topic_register(pd, at, PAGE)), 0);
		CHECK_EQ(memcmp(at, "one page", 9), 0);
		CHECK_EQ(setrlimit(RLIMIT_FSIZE, &none), 0);
	}
}

int main(int argc, char **argv)
{
	static const struct topic_case cases[] = {
		{"fdmr", fdmr},
		{"vma_upwards", vma_upwards},
		{"vma_downwards", vma_downwards},
		{"large_deregistered", large_deregistered},
		{"past_the_end_of_a_file", past_the_end_of_a_file},
		{NULL, NULL},
	};

	return topic_main(cases, argc, argv);
}
