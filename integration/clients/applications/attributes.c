/*
 * What a program has asked of its memory is so while it is registered and afterwards. See topic.h.
 */
#include "topic.h"

#include <errno.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

enum { LENGTH = 2 * MIB, FLAGS = 256 };

/* Two MiB that begin at a multiple of it, so that a huge page fits. */
static unsigned char *aligned(void)
{
	unsigned char *at = topic_memory(2 * LENGTH, 7);
	unsigned char *inside = (unsigned char *)(((uintptr_t)at + LENGTH - 1) & -(uintptr_t)LENGTH);

	if (inside > at)
		CHECK_EQ(munmap(at, inside - at), 0);
	CHECK_EQ(munmap(inside + LENGTH, at + LENGTH - inside), 0);
	return inside;
}

/* The line `VmFlags` of the mapping that `at` is in, and how many KiB of it are locked. */
static long flags_of(const void *at, char flags[FLAGS])
{
	FILE *smaps = fopen("/proc/self/smaps", "r");
	char line[FLAGS];
	unsigned long from, to;
	bool inside = false;
	long locked = 0;

	CHECK(smaps, "%s", strerror(errno));
	flags[0] = 0;
	while (fgets(line, sizeof(line), smaps)) {
		if (sscanf(line, "%lx-%lx ", &from, &to) == 2)
			inside = from <= (unsigned long)at && (unsigned long)at < to;
		if (inside)
			sscanf(line, "Locked: %ld", &locked);
		if (inside && !strncmp(line, "VmFlags:", 8))
			strcpy(flags, line);
	}
	fclose(smaps);
	CHECK(flags[0], "%p is not mapped", at);
	return locked;
}

static bool has(const char *flags, const char *flag)
{
	char word[8];

	snprintf(word, sizeof(word), " %s ", flag);
	return strstr(flags, word) != NULL;
}

static void unchanged(const char *before, const char *now, const char *when)
{
	CHECK(!strcmp(before, now), "%s: before: %s now: %s", when, before, now);
}

static void huge_pages(void)
{
	struct ibv_pd *pd = topic_open();
	unsigned char *at = aligned();
	char before[FLAGS], now[FLAGS];

	if (madvise(at, LENGTH, MADV_HUGEPAGE))
		topic_unsupported("this kernel has no transparent huge pages");
	flags_of(at, before);
	CHECK_EQ(ibv_dereg_mr(topic_register(pd, at, LENGTH)), 0);
	flags_of(at, now);
	unchanged(before, now, "deregistered");
}

static void not_dumped(void)
{
	struct ibv_pd *pd = topic_open();
	unsigned char *at = aligned();
	char before[FLAGS], now[FLAGS];

	CHECK_EQ(madvise(at, LENGTH, MADV_DONTDUMP), 0);
	flags_of(at, before);
	struct ibv_mr *mr = topic_register(pd, at, LENGTH);

	flags_of(at, now);
	CHECK(has(now, "dd"), "secrets would be dumped while they are registered: %s", now);
	CHECK_EQ(ibv_dereg_mr(mr), 0);
	flags_of(at, now);
	unchanged(before, now, "deregistered");
}

static void locked(void)
{
	struct ibv_pd *pd = topic_open();
	struct rlimit limit;
	unsigned char *at = aligned();
	char before[FLAGS], now[FLAGS];
	size_t length = 32 << 10;

	CHECK_EQ(getrlimit(RLIMIT_MEMLOCK, &limit), 0);
	if (mlock(at, length))
		topic_unsupported("mlock of %zu bytes: %s", length, strerror(errno));
	long kib = flags_of(at, before);
	struct ibv_mr *mr = topic_register(pd, at, length);

	flags_of(at, now);
	CHECK(has(now, "lo"), "what was locked may be swapped out while it is registered: %s", now);
	CHECK_EQ(ibv_dereg_mr(mr), 0);
	CHECK_EQ(flags_of(at, now), kib);
	unchanged(before, now, "deregistered");
	/* The limit has not been used up by the way there and back. */
	for (int i = 0; i < 20; i++)
		CHECK_EQ(ibv_dereg_mr(topic_register(pd, at, length)), 0);
	CHECK_EQ(flags_of(at, now), kib);
	CHECK_EQ(munlock(at, length), 0);
	topic_all(at, LENGTH, 7, "the contents");
}

/* A program that has locked all that it has and will have, within whatever limit there is. */
static void everything_locked(void)
{
	struct ibv_pd *pd = topic_open();
	unsigned char *at = topic_memory(LENGTH, 7);
	bool done = mlockall(MCL_CURRENT | MCL_FUTURE) == 0;

	for (int i = 0; i < 20; i++) {
		struct ibv_mr *mr = topic_register(pd, at, LENGTH);

		topic_all(at, LENGTH, 7, "registered");
		CHECK_EQ(ibv_dereg_mr(mr), 0);
		topic_all(at, LENGTH, 7, "deregistered");
	}
	if (!done)
		topic_unsupported("the limit RLIMIT_MEMLOCK is too low for mlockall(); registering was well without it");
}

/* A child must find zeros, whether it is made beside a registration or after it. */
static void child_finds_zeros(unsigned char *at, size_t length, const char *when)
{
	pid_t child = fork();

	CHECK(child >= 0, "%s", strerror(errno));
	if (!child) {
		topic_all(at, length, 0, when);
		_exit(0);
	}
	topic_ended_well(child, when);
	topic_all(at, length, 7, "the parent's");
}

static void wiped_on_fork(void)
{
	struct ibv_pd *pd = topic_open();
	unsigned char *at = aligned();
	char before[FLAGS], now[FLAGS];

	CHECK_EQ(madvise(at, LENGTH, MADV_WIPEONFORK), 0);
	flags_of(at, before);
	struct ibv_mr *mr = topic_register(pd, at, LENGTH);

	child_finds_zeros(at, LENGTH, "a child beside a registration");
	CHECK_EQ(ibv_dereg_mr(mr), 0);
	flags_of(at, now);
	unchanged(before, now, "deregistered");
	child_finds_zeros(at, LENGTH, "a child after it");
}

/* As OpenSSL does with the state of its random numbers, which may lie in what is registered already. */
static void wiped_on_fork_later(void)
{
	struct ibv_pd *pd = topic_open();
	unsigned char *at = aligned();
	struct ibv_mr *mr = topic_register(pd, at, LENGTH);

	CHECK(madvise(at, LENGTH, MADV_WIPEONFORK) == 0, "%s", strerror(errno));
	child_finds_zeros(at, LENGTH, "a child beside a registration");
	CHECK_EQ(ibv_dereg_mr(mr), 0);
	child_finds_zeros(at, LENGTH, "a child after it");
}

/* What libraries do around buffers of their own, by `ibv_fork_init` or without it. */
static void not_forked(void)
{
	struct ibv_pd *pd = topic_open();
	unsigned char *at = aligned();
	struct ibv_mr *mr = topic_register(pd, at, LENGTH);

	CHECK_EQ(madvise(at, LENGTH, MADV_DONTFORK), 0);
	CHECK_EQ(madvise(at, LENGTH, MADV_DOFORK), 0);
	pid_t child = fork();

	if (!child) {
		topic_all(at, LENGTH, 7, "the child's");
		memset(at, 9, LENGTH);
		_exit(0);
	}
	topic_ended_well(child, "a child after MADV_DOFORK");
	topic_all(at, LENGTH, 7, "the parent's");
	CHECK_EQ(madvise(at, LENGTH, MADV_DONTFORK), 0);
	CHECK_EQ(ibv_dereg_mr(mr), 0);
	CHECK_EQ(madvise(at, LENGTH, MADV_DOFORK), 0);
	topic_all(at, LENGTH, 7, "deregistered");
}

static void policy_of_nodes(void)
{
	enum { DEFAULT = 0, PREFERRED = 1, ADDRESS = 2 };
	struct ibv_pd *pd = topic_open();
	unsigned char *at = aligned();
	unsigned long mask = 1, found[16] = {0};
	int mode = -1;

	if (syscall(SYS_mbind, at, LENGTH, PREFERRED, &mask, 8 * sizeof(mask), 0))
		topic_unsupported("mbind: %s", strerror(errno));
	CHECK_EQ(ibv_dereg_mr(topic_register(pd, at, LENGTH)), 0);
	CHECK_EQ(syscall(SYS_get_mempolicy, &mode, found, 8 * sizeof(found), at, ADDRESS), 0);
	CHECK_EQ(mode, PREFERRED);
	CHECK_EQ(found[0], mask);
}

int main(int argc, char **argv)
{
	static const struct topic_case cases[] = {
		{"huge_pages", huge_pages},
		{"not_dumped", not_dumped},
		{"locked", locked},
		{"everything_locked", everything_locked},
		{"wiped_on_fork", wiped_on_fork},
		{"wiped_on_fork_later", wiped_on_fork_later},
		{"not_forked", not_forked},
		{"policy_of_nodes", policy_of_nodes},
		{NULL, NULL},
	};

	return topic_main(cases, argc, argv);
}
