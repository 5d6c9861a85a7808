/* Cases of `keep`: how much is kept, and who else may need it. */
#include "keep.h"

#include <errno.h>
#include <spawn.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

/* Whether any of buffers at equal distances is kept: which one, nobody says, but the latest more likely than others. */
static bool any_is_kept(const unsigned char *at, size_t distance, int count)
{
	while (count > 0)
		if (loop_is_shared(at + (size_t)--count * distance))
			return true;
	return false;
}

/* Many more buffers than are kept, over and over: mappings and memory stay bounded, and domains and devices can be ended. */
void what_is_kept_is_bounded(void)
{
	enum { MANY = 600 };
	unsigned char *at = map_at(NULL, (size_t)MANY * 2 * PAGE);
	int before = mappings();

	for (int round = 0; round < 3; round++)
		for (int i = 0; i < MANY; i++)
			round_of(at + (size_t)i * 2 * PAGE, PAGE, (unsigned char)i);
	CHECK(any_is_kept(at, 2 * PAGE, MANY), "nothing was kept");
	CHECK(mappings() <= before + 2 * 256 + 16, "%d mappings before, %d after", before, mappings());
	for (int i = 0; i < MANY; i++)
		CHECK_EQ(at[(size_t)i * 2 * PAGE], (unsigned char)i);
	loop_dereg(source_mr);
	loop_close(&loop);
	CHECK(mappings() <= before + 16, "%d mappings before, %d when the device is closed", before, mappings());
}

/* Under quotas of 64 regions and 64 MiB: what is kept leaves room for all that the policy allows. */
enum { REGIONS = 64, ALL = 64 << 20 };

static void take_all_regions(void)
{
	unsigned char *at = map_at(NULL, (REGIONS + 1) * PAGE);
	struct ibv_mr *mr[REGIONS];

	for (int i = 0; i < REGIONS; i++)
		mr[i] = loop_reg(&loop, at + i * PAGE, PAGE);
	CHECK(!ibv_reg_mr(loop.pd, at + REGIONS * PAGE, PAGE, ACCESS) && errno == ENOMEM, "errno %d", errno);
	for (int i = 0; i < REGIONS; i++)
		loop_dereg(mr[i]);
	munmap(at, (REGIONS + 1) * PAGE);
}

static void take_all_bytes(void)
{
	unsigned char *at = map_at(NULL, ALL + PAGE);
	struct ibv_mr *mr = loop_reg(&loop, at, ALL);

	CHECK(!ibv_reg_mr(loop.pd, at + ALL, 1, ACCESS) && errno == ENOMEM, "errno %d", errno);
	loop_dereg(mr);
	munmap(at, ALL + PAGE);
}

void quotas_are_whole(void)
{
	enum { BUFFERS = 16 };
	unsigned char *at = map_at(NULL, (size_t)BUFFERS * 8 * PAGE);

	loop_dereg(source_mr);
	for (int round = 0; round < 5; round++) {
		int tries = 0;

		/* Taking all makes the library forget what came before, more or less of it as its addresses are. */
		do {
			CHECK(tries++ < MOST_TRIES, "nothing was kept in round %d", round);
			for (int i = 0; i < BUFFERS; i++)
				loop_dereg(loop_reg(&loop, at + (size_t)i * 8 * PAGE, 4 * PAGE));
		} while (!any_is_kept(at, 8 * PAGE, BUFFERS));
		if (round % 2)
			take_all_regions();
		else
			take_all_bytes();
	}
}

void take_all(void)
{
	loop_dereg(source_mr);
	take_all_bytes();
	take_all_regions();
}

/* One process keeps, and another needs the quota. */
void another_process_finds_room(void)
{
	unsigned char *at = map_at(NULL, 8 * PAGE);
	char *arguments[] = {"keep", "take_all", NULL};
	pid_t child;
	int status;

	settle(at, 8 * PAGE);
	loop_dereg(source_mr);
	at[5 * PAGE] = 123;
	CHECK_EQ(posix_spawn(&child, "/proc/self/exe", NULL, NULL, arguments, environ), 0);
	CHECK_EQ(waitpid(child, &status, 0), child);
	CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0, "the other process ended with %#x", status);
	/* It was revoked meanwhile: the next registration is an ordinary one, and of the same memory. */
	source_mr = loop_reg(&loop, source, 16 * PAGE);
	struct ibv_mr *mr = loop_reg(&loop, at, 8 * PAGE);

	loop_write(&loop, source_mr, source, mr, at + 5 * PAGE, 1);
	CHECK_EQ(source[0], 123);
	loop_dereg(mr);
	settle(at, 8 * PAGE);
}

/* Another process of the container scribbles on the key words and the questions: verbs may fail, nothing else. */
void scribbled_words(void)
{
	unsigned char *at = map_at(NULL, 4 * PAGE);
	unsigned long from, to;
	char line[512];
	FILE *maps = fopen("/proc/self/maps", "r");
	uint64_t *words = NULL;
	size_t count = 0;

	settle(at, 4 * PAGE);
	CHECK(maps);
	while (fgets(line, sizeof(line), maps))
		if (strstr(line, "ringfence-bells") && sscanf(line, "%lx-%lx", &from, &to) == 2) {
			words = (uint64_t *)from;
			count = (to - from) / 8;
		}
	fclose(maps);
	CHECK(words && count > 512, "no key words are mapped");
	for (int round = 0; round < 300; round++) {
		for (int i = 0; i < 200; i++) {
			size_t index = round % 2 ? 512 + below((unsigned)count - 512) : below(96);
			uint64_t value = i % 3 == 0 ? chance : i % 3 == 1 ? source_mr->lkey : (chance << 33) | source_mr->rkey;

			__atomic_store_n(&words[index], value, __ATOMIC_RELAXED);
		}
		struct ibv_mr *mr = ibv_reg_mr(loop.pd, at, 4 * PAGE, ACCESS);

		if (mr)
			ibv_dereg_mr(mr);
		at[round] = (unsigned char)round;
	}
	for (int round = 0; round < 300; round++)
		CHECK_EQ(at[round], (unsigned char)round);
	/* The proxy serves the next one. */
	memset(words + 512, 0, count * 8 - 4096);
	memset(words, 0, 1024);
	loop = loop_open();
	source_mr = loop_reg(&loop, source, 16 * PAGE);
	some_rounds_of(map_at(NULL, PAGE), PAGE);
}
