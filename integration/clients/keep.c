/*
 * Programs that register, use and deregister the same buffer over and over: the library keeps the region, and nobody may be
 * able to tell but by the clock.
 *
 *   keep list | keep CASE
 */
#include "keep.h"

#include <errno.h>
#include <pthread.h>
#include <string.h>
#include <sys/mman.h>

struct loop loop;
unsigned char *source;
struct ibv_mr *source_mr;

void *map_at(void *at, size_t length)
{
	int flags = MAP_PRIVATE | MAP_ANONYMOUS | (at ? MAP_FIXED : 0);
	void *memory = mmap(at, length, PROT_READ | PROT_WRITE, flags, -1, 0);

	CHECK(memory != MAP_FAILED, "errno %d", errno);
	return memory;
}

enum ibv_wc_status write_by(uint32_t rkey, void *to, uint32_t length)
{
	struct ibv_sge sge = {(uintptr_t)source, length, source_mr->lkey};
	struct ibv_send_wr wr = {.sg_list = &sge,
				 .num_sge = 1,
				 .opcode = IBV_WR_RDMA_WRITE,
				 .send_flags = IBV_SEND_SIGNALED,
				 .wr.rdma = {(uintptr_t)to, rkey}},
			   *bad;
	struct ibv_wc wc;

	CHECK_EQ(ibv_post_send(loop.from, &wr, &bad), 0);
	while (!ibv_poll_cq(loop.cq, 1, &wc))
		;
	return wc.status;
}

void expect_dead(uint32_t rkey, void *to)
{
	enum ibv_wc_status status = write_by(rkey, to, 8);

	CHECK(status == IBV_WC_REM_ACCESS_ERR, "%s", ibv_wc_status_str(status));
	loop = loop_open();
	source_mr = loop_reg(&loop, source, 16 * PAGE);
}

uint32_t round_of(unsigned char *at, size_t length, unsigned char mark)
{
	struct ibv_mr *mr = loop_reg(&loop, at, length);
	uint32_t rkey = mr->rkey;

	CHECK_EQ(mr->lkey, mr->rkey);
	CHECK(mr->addr == at && mr->length == length && mr->pd == loop.pd && mr->context == loop.context);
	for (size_t page = 0; page < length; page += PAGE) {
		memset(source, mark, 64);
		CHECK_EQ(write_by(rkey, at + page, 64), IBV_WC_SUCCESS);
		CHECK_EQ(at[page], mark);
	}
	loop_dereg(mr);
	return rkey;
}

void some_rounds_of(unsigned char *at, size_t length)
{
	for (int round = 0; round < 4; round++)
		round_of(at, length, (unsigned char)(200 + round));
}

void settle(unsigned char *at, size_t length)
{
	/* Where the worker gets no processor in time, a region ends by a message, and is not kept. */
	for (int tries = 0; tries < MOST_TRIES; tries++) {
		some_rounds_of(at, length);
		if (loop_is_shared(at))
			return;
	}
	CHECK(false, "not kept");
}

int mappings(void)
{
	FILE *maps = fopen("/proc/self/maps", "r");
	int count = 0, c;

	CHECK(maps);
	while ((c = getc(maps)) != EOF)
		count += c == '\n';
	fclose(maps);
	return count;
}

uint64_t chance = 88172645463325252u;

unsigned below(unsigned limit)
{
	chance ^= chance << 13, chance ^= chance >> 7, chance ^= chance << 17;
	return (unsigned)(chance >> 20) % limit;
}

/* All others are about regions that are kept: here it is seen that they are. */
static void it_is_kept(void)
{
	unsigned char *at = map_at(NULL, PAGE);

	round_of(at, PAGE, 1);
	CHECK(!loop_is_shared(at), "kept after a single registration");
	settle(at, PAGE);
	CHECK_EQ(ibv_destroy_qp(loop.from), 0);
	CHECK_EQ(ibv_destroy_qp(loop.to), 0);
	loop_dereg(source_mr);
	CHECK_EQ(ibv_dealloc_pd(loop.pd), 0);
	CHECK(!loop_is_shared(at), "kept without its protection domain");
	CHECK_EQ(at[0], 203);
}

static void keys_die_and_never_come_again(void)
{
	enum { ROUNDS = 2000 };
	static uint32_t keys[ROUNDS];
	unsigned char *at = map_at(NULL, PAGE);

	for (int round = 0; round < ROUNDS; round++)
		keys[round] = round_of(at, PAGE, (unsigned char)round);
	/* The first two are chance. */
	for (int round = 2; round < ROUNDS; round++)
		for (int before = 2; before < round; before++)
			CHECK(keys[round] != keys[before], "key %#x of round %d came again in round %d", keys[round], before,
			      round);
	at[0] = 77;
	expect_dead(keys[ROUNDS - 1], at);
	struct ibv_mr *mr = loop_reg(&loop, at, PAGE);

	for (int round = ROUNDS - 5; round < ROUNDS; round++)
		expect_dead(keys[round], at);
	CHECK_EQ(at[0], 77);
	(void)mr;
}

static void a_dead_lkey_is_refused(void)
{
	settle(source + 4 * PAGE, PAGE);
	struct ibv_mr *mr = loop_reg(&loop, source + 4 * PAGE, PAGE);
	struct ibv_mr *to = loop_reg(&loop, map_at(NULL, PAGE), PAGE);
	struct ibv_wc wc;

	struct ibv_mr stale = *mr;

	loop_dereg(mr);
	CHECK_EQ(loop_post_write(&loop, 1, to, &stale, 8), 0);
	while (!ibv_poll_cq(loop.cq, 1, &wc))
		;
	CHECK(wc.status == IBV_WC_LOC_PROT_ERR, "%s", ibv_wc_status_str(wc.status));
}

static void other_rights_and_domains_are_other_regions(void)
{
	unsigned char *at = map_at(NULL, PAGE);
	struct ibv_pd *other = ibv_alloc_pd(loop.context);

	settle(at, PAGE);
	for (int round = 0; round < 3; round++) {
		struct ibv_mr *mr = ibv_reg_mr(loop.pd, at, PAGE, IBV_ACCESS_LOCAL_WRITE);

		CHECK(mr);
		uint32_t rkey = mr->rkey;

		expect_dead(rkey, at);
		CHECK_EQ(ibv_dereg_mr(mr), 0);
		mr = ibv_reg_mr(other, at, PAGE, ACCESS);
		CHECK(mr && mr->pd == other);
		expect_dead(mr->rkey, at);
		CHECK_EQ(ibv_dereg_mr(mr), 0);
		mr = ibv_reg_mr_iova(loop.pd, at, PAGE, 0x10000, ACCESS);
		CHECK(mr);
		CHECK_EQ(write_by(mr->rkey, (void *)0x10008, 8), IBV_WC_SUCCESS);
		CHECK_EQ(ibv_dereg_mr(mr), 0);
	}
	CHECK_EQ(ibv_dealloc_pd(other), 0);
}

/* WRITEs are under way while the region is deregistered: none may land after that. */
static void no_write_lands_after_deregistration(void)
{
	unsigned char *at = map_at(NULL, 16 * PAGE);

	settle(at, 16 * PAGE);
	for (int round = 0; round < 3000; round++) {
		struct ibv_mr *mr = loop_reg(&loop, at, 16 * PAGE);
		struct ibv_sge sge = {(uintptr_t)source, 16 * PAGE, source_mr->lkey};
		struct ibv_send_wr wr = {.sg_list = &sge,
					 .num_sge = 1,
					 .opcode = IBV_WR_RDMA_WRITE,
					 .send_flags = IBV_SEND_SIGNALED,
					 .wr.rdma = {(uintptr_t)at, mr->rkey}},
				   *bad;
		struct ibv_wc wc;
		int posted = 0, polled = 0, spin = round % 997;
		bool failed = false;

		memset(source, 0xee, 16 * PAGE);
		for (; posted < 8; posted++)
			CHECK_EQ(ibv_post_send(loop.from, &wr, &bad), 0);
		while (spin--)
			__builtin_ia32_pause();
		loop_dereg(mr);
		/* From here on the memory is the program's alone. */
		memset(at, 0x11, 16 * PAGE);
		while (polled < posted) {
			int n = ibv_poll_cq(loop.cq, 1, &wc);

			if (n > 0)
				failed |= wc.status != IBV_WC_SUCCESS;
			polled += n;
		}
		for (int i = 0; i < 16 * PAGE; i++)
			CHECK(at[i] == 0x11, "round %d: a WRITE landed at byte %d after ibv_dereg_mr", round, i);
		if (failed) {
			loop_dereg(source_mr);
			loop_close(&loop);
			loop = loop_open();
			source_mr = loop_reg(&loop, source, 16 * PAGE);
		}
	}
}

/* Threads register and deregister buffers of their own and a common one. */
static unsigned char *common;

static void *busy(void *argument)
{
	unsigned char *at = map_at(NULL, 4 * PAGE);

	for (int round = 0; round < 2000; round++) {
		struct ibv_mr *mr = loop_reg(&loop, at, 4 * PAGE), *other = loop_reg(&loop, common, PAGE);

		CHECK(mr->addr == at && other->addr == common && mr->rkey != other->rkey);
		at[round % (4 * PAGE)] = (unsigned char)(uintptr_t)argument;
		loop_dereg(other);
		loop_dereg(mr);
	}
	for (int byte = 0; byte < 2000; byte++)
		CHECK_EQ(at[byte], (unsigned char)(uintptr_t)argument);
	return NULL;
}

static void threads(void)
{
	pthread_t thread[4];

	common = map_at(NULL, PAGE);
	for (uintptr_t i = 0; i < 4; i++)
		CHECK_EQ(pthread_create(&thread[i], NULL, busy, (void *)(i + 1)), 0);
	for (int i = 0; i < 4; i++)
		CHECK_EQ(pthread_join(thread[i], NULL), 0);
}

static const struct {
	const char *name;
	void (*run)(void);
	/* Started by a test of its own. */
	bool special;
} cases[] = {
	{"it_is_kept", it_is_kept, false},
	{"keys_die_and_never_come_again", keys_die_and_never_come_again, false},
	{"a_dead_lkey_is_refused", a_dead_lkey_is_refused, false},
	{"other_rights_and_domains_are_other_regions", other_rights_and_domains_are_other_regions, false},
	{"memory_changes_between_two_registrations", memory_changes_between_two_registrations, false},
	{"advice_between_two_registrations", advice_between_two_registrations, false},
	{"unmapped_memory_is_not_registered", unmapped_memory_is_not_registered, false},
	{"overlapping_registrations", overlapping_registrations, false},
	{"the_same_twice_at_once", the_same_twice_at_once, false},
	{"forks_keep_memory_apart", forks_keep_memory_apart, false},
	{"a_child_has_a_life_of_its_own", a_child_has_a_life_of_its_own, false},
	{"no_write_lands_after_deregistration", no_write_lands_after_deregistration, false},
	{"threads", threads, false},
	{"what_is_kept_is_bounded", what_is_kept_is_bounded, false},
	{"random_sequences", random_sequences, false},
	{"scribbled_words", scribbled_words, false},
	{"quotas_are_whole", quotas_are_whole, true},
	{"another_process_finds_room", another_process_finds_room, true},
	{"take_all", take_all, true},
};

int main(int argc, char **argv)
{
	for (size_t i = 0; i < sizeof(cases) / sizeof(*cases); i++) {
		if (argc == 2 && !strcmp(argv[1], "list") && !cases[i].special)
			puts(cases[i].name);
		if (argc == 2 && !strcmp(argv[1], cases[i].name)) {
			loop = loop_open();
			source = map_at(NULL, 16 * PAGE);
			source_mr = loop_reg(&loop, source, 16 * PAGE);
			cases[i].run();
			return 0;
		}
	}
	return argc == 2 && !strcmp(argv[1], "list") ? 0 : 2;
}
