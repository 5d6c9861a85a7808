/*
 * Programs that register, use and deregister the same buffer over and over: the library keeps the region, and nobody may be
 * able to tell but by the clock.
 *
 *   keep list | keep CASE
 */
#include "loop.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <spawn.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

enum { PAGE = 4096, ACCESS = IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_WRITE | IBV_ACCESS_REMOTE_READ };

static struct loop loop;
/* What is written from: registered all the time. */
static unsigned char *source;
static struct ibv_mr *source_mr;

static void *map_at(void *at, size_t length)
{
	int flags = MAP_PRIVATE | MAP_ANONYMOUS | (at ? MAP_FIXED : 0);
	void *memory = mmap(at, length, PROT_READ | PROT_WRITE, flags, -1, 0);

	CHECK(memory != MAP_FAILED, "errno %d", errno);
	return memory;
}

/* A WRITE with this key: what its completion says. The queue pairs are made anew after an error. */
static enum ibv_wc_status write_by(uint32_t rkey, void *to, uint32_t length)
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

static void expect_dead(uint32_t rkey, void *to)
{
	enum ibv_wc_status status = write_by(rkey, to, 8);

	CHECK(status == IBV_WC_REM_ACCESS_ERR, "%s", ibv_wc_status_str(status));
	loop = loop_open();
	source_mr = loop_reg(&loop, source, 16 * PAGE);
}

/* Registers, writes `mark` into every page, checks, deregisters. */
static uint32_t round_of(unsigned char *at, size_t length, unsigned char mark)
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

/* Brings a buffer to where it is kept between two rounds. */
static void settle(unsigned char *at, size_t length)
{
	for (int round = 0; round < 4; round++)
		round_of(at, length, (unsigned char)(200 + round));
}

static int mappings(void)
{
	FILE *maps = fopen("/proc/self/maps", "r");
	int count = 0, c;

	CHECK(maps);
	while ((c = getc(maps)) != EOF)
		count += c == '\n';
	fclose(maps);
	return count;
}

static bool is_shared(const void *at)
{
	unsigned long from, to;
	char line[512], permissions[8];
	FILE *maps = fopen("/proc/self/maps", "r");
	bool shared = false;

	CHECK(maps);
	while (fgets(line, sizeof(line), maps)) {
		CHECK_EQ(sscanf(line, "%lx-%lx %7s", &from, &to, permissions), 3);
		if (from <= (uintptr_t)at && (uintptr_t)at < to)
			shared = permissions[3] == 's';
	}
	fclose(maps);
	return shared;
}

/* All others are about regions that are kept: here it is seen that they are. */
static void it_is_kept(void)
{
	unsigned char *at = map_at(NULL, PAGE);

	round_of(at, PAGE, 1);
	CHECK(!is_shared(at), "kept after a single registration");
	settle(at, PAGE);
	CHECK(is_shared(at), "not kept");
	CHECK_EQ(ibv_destroy_qp(loop.from), 0);
	CHECK_EQ(ibv_destroy_qp(loop.to), 0);
	loop_dereg(source_mr);
	CHECK_EQ(ibv_dealloc_pd(loop.pd), 0);
	CHECK(!is_shared(at), "kept without its protection domain");
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

/* Whatever the program does to the memory between two registrations, the next one is of what stands there then. */
static void memory_changes_between_two_registrations(void)
{
	enum { LENGTH = 8 * PAGE };
	unsigned char *at = map_at(NULL, LENGTH);

	for (int round = 0; round < 40; round++) {
		unsigned char *middle = at + 3 * PAGE, expected = (unsigned char)round;

		settle(at, LENGTH);
		switch (round % 7) {
		case 0:
			munmap(at, LENGTH);
			map_at(at, LENGTH);
			expected = 0;
			break;
		case 1:
			map_at(middle, PAGE);
			expected = 0;
			break;
		case 2: {
			void *fresh = map_at(NULL, LENGTH);

			memset(fresh, expected, LENGTH);
			CHECK(mremap(fresh, LENGTH, LENGTH, MREMAP_MAYMOVE | MREMAP_FIXED, at) == at);
			break;
		}
		case 3: {
			/* Away and back again: the same memory. */
			void *aside = map_at(NULL, LENGTH);

			memset(at, expected, LENGTH);
			CHECK(mremap(at, LENGTH, LENGTH, MREMAP_MAYMOVE | MREMAP_FIXED, aside) == aside);
			CHECK(mremap(aside, LENGTH, LENGTH, MREMAP_MAYMOVE | MREMAP_FIXED, at) == at);
			break;
		}
		case 4:
			memset(at, expected, LENGTH);
			CHECK_EQ(mprotect(at, LENGTH, PROT_READ), 0);
			CHECK(!ibv_reg_mr(loop.pd, at, LENGTH, ACCESS));
			CHECK_EQ(mprotect(at, LENGTH, PROT_READ | PROT_WRITE), 0);
			break;
		default:
			memset(at, expected, LENGTH);
		}
		CHECK(*middle == expected, "round %d: %d, expected %d", round, *middle, expected);
		struct ibv_mr *mr = loop_reg(&loop, at, LENGTH);

		CHECK(*middle == expected, "round %d: %d, expected %d, when registered", round, *middle, expected);
		/* The device sees what the program sees. */
		*middle = 91;
		loop_write(&loop, source_mr, source, mr, middle, 1);
		CHECK_EQ(source[0], 91);
		loop_dereg(mr);
	}
}

static void advice_between_two_registrations(void)
{
	unsigned char *at = map_at(NULL, 8 * PAGE);

	for (int round = 0; round < 10; round++) {
		settle(at, 8 * PAGE);
		CHECK_EQ(madvise(at + 3 * PAGE, PAGE, MADV_DONTNEED), 0);
		if (round % 2)
			CHECK_EQ(at[3 * PAGE], 0);
		struct ibv_mr *mr = loop_reg(&loop, at, 8 * PAGE);

		CHECK(at[3 * PAGE] == 0 && at[2 * PAGE] == 203 && at[4 * PAGE] == 203, "round %d: %d %d %d", round, at[2 * PAGE],
		      at[3 * PAGE], at[4 * PAGE]);
		loop_dereg(mr);
	}
}

static void unmapped_memory_is_not_registered(void)
{
	unsigned char *at = map_at(NULL, 4 * PAGE);

	settle(at, 4 * PAGE);
	munmap(at + PAGE, PAGE);
	CHECK(!ibv_reg_mr(loop.pd, at, 4 * PAGE, ACCESS));
	CHECK_EQ(errno, EFAULT);
	map_at(at + PAGE, PAGE);
	round_of(at, 4 * PAGE, 9);
}

static void overlapping_registrations(void)
{
	unsigned char *at = map_at(NULL, 16 * PAGE);

	/* Each is kept, restored and ended while others have its pages. */
	for (int round = 0; round < 30; round++) {
		struct ibv_mr *mr[4];

		for (int i = 0; i < 4; i++)
			mr[i] = loop_reg(&loop, at + i * 2 * PAGE + (round % 3) * 100, 8 * PAGE);
		for (int i = 0; i < 4; i++) {
			memset(source, round + i, 64);
			CHECK_EQ(write_by(mr[i]->rkey, at + 7 * PAGE + 512, 64), IBV_WC_SUCCESS);
			CHECK_EQ(at[7 * PAGE + 512], (unsigned char)(round + i));
			loop_dereg(mr[i]);
		}
	}
}

static void the_same_twice_at_once(void)
{
	unsigned char *at = map_at(NULL, PAGE);

	for (int round = 0; round < 10; round++) {
		struct ibv_mr *one = loop_reg(&loop, at, PAGE), *two = loop_reg(&loop, at, PAGE);
		uint32_t key = one->rkey;

		CHECK(one != two && one->rkey != two->rkey);
		loop_dereg(one);
		CHECK_EQ(write_by(two->rkey, at, 8), IBV_WC_SUCCESS);
		loop_dereg(two);
		if (round == 9)
			expect_dead(key, at);
	}
}

static void forks_keep_memory_apart(void)
{
	unsigned char *at = map_at(NULL, 4 * PAGE);

	settle(at, 4 * PAGE);
	for (int round = 0; round < 5; round++) {
		int ends[2], status;

		memset(at, round, 4 * PAGE);
		CHECK_EQ(pipe(ends), 0);
		pid_t child = fork();

		if (child == 0) {
			char go;

			/* The parent writes meanwhile, and the child must not see it, nor the parent the child's. */
			CHECK_EQ(at[PAGE], (unsigned char)round);
			CHECK_EQ(read(ends[0], &go, 1), 1);
			CHECK_EQ(at[PAGE], (unsigned char)round);
			memset(at, 255, 4 * PAGE);
			CHECK(!ibv_reg_mr(loop.pd, at, 4 * PAGE, ACCESS), "registered in a child");
			_exit(0);
		}
		round_of(at, 4 * PAGE, 66);
		CHECK_EQ(write(ends[1], "", 1), 1);
		CHECK_EQ(waitpid(child, &status, 0), child);
		CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0, "the child ended with %#x", status);
		CHECK_EQ(at[PAGE], 66);
		round_of(at, 4 * PAGE, 67);
		close(ends[0]);
		close(ends[1]);
	}
}

static void a_child_has_a_life_of_its_own(void)
{
	unsigned char *at = map_at(NULL, 4 * PAGE);
	int status;

	settle(at, 4 * PAGE);
	pid_t child = fork();

	loop = loop_open();
	source = map_at(NULL, 16 * PAGE);
	source_mr = loop_reg(&loop, source, 16 * PAGE);
	for (int round = 0; round < 50; round++)
		round_of(at, 4 * PAGE, (unsigned char)round);
	if (child == 0)
		_exit(0);
	CHECK_EQ(waitpid(child, &status, 0), child);
	CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0, "the child ended with %#x", status);
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

/* Many more buffers than are kept, over and over: mappings and memory stay bounded, and domains and devices can be ended. */
static void what_is_kept_is_bounded(void)
{
	enum { MANY = 600 };
	unsigned char *at = map_at(NULL, (size_t)MANY * 2 * PAGE);
	int before = mappings();

	for (int round = 0; round < 3; round++)
		for (int i = 0; i < MANY; i++)
			round_of(at + (size_t)i * 2 * PAGE, PAGE, (unsigned char)i);
	CHECK(mappings() <= before + 2 * 256 + 16, "%d mappings before, %d after", before, mappings());
	for (int i = 0; i < MANY; i++)
		CHECK_EQ(at[(size_t)i * 2 * PAGE], (unsigned char)i);
	loop_dereg(source_mr);
	loop_close(&loop);
	CHECK(mappings() <= before + 16, "%d mappings before, %d when the device is closed", before, mappings());
}

/* Random sequences, against a model of what every page must hold. */
static uint64_t state = 1;

static unsigned below(unsigned limit)
{
	state ^= state << 13, state ^= state >> 7, state ^= state << 17;
	return (unsigned)(state >> 20) % limit;
}

enum { BUFFERS = 5, PAGES = 6, HELD = 2 };

static struct buffer {
	unsigned char *at;
	unsigned char value[PAGES];
	struct ibv_mr *mr[HELD];
} buffers[BUFFERS];

static void check_buffer(const struct buffer *buffer)
{
	for (int page = 0; page < PAGES; page++)
		CHECK(buffer->at[page * PAGE + 7] == buffer->value[page], "page %d is %d, expected %d", page,
		      buffer->at[page * PAGE + 7], buffer->value[page]);
}

static void step(void)
{
	struct buffer *buffer = &buffers[below(BUFFERS)];
	struct ibv_mr **mr = &buffer->mr[below(HELD)];
	unsigned page = below(PAGES), value = below(256);
	bool free = !buffer->mr[0] && !buffer->mr[1];
	int status;

	switch (below(free ? 16 : 12)) {
	case 0 ... 5:
		if (*mr) {
			loop_dereg(*mr);
			*mr = NULL;
		} else {
			/* Often the same, sometimes a part. */
			unsigned first = below(4) ? 0 : page;

			*mr = loop_reg(&loop, buffer->at + first * PAGE, (PAGES - first) * PAGE);
		}
		break;
	case 6 ... 9:
		if (*mr && (unsigned char *)(*mr)->addr <= buffer->at + page * PAGE) {
			memset(source, (int)value, 64);
			CHECK_EQ(write_by((*mr)->rkey, buffer->at + page * PAGE, 64), IBV_WC_SUCCESS);
			buffer->value[page] = (unsigned char)value;
		}
		break;
	case 10:
		buffer->at[page * PAGE + 7] = buffer->value[page] = (unsigned char)value;
		break;
	case 11: {
		if (below(8))
			break;
		pid_t child = fork();

		if (child == 0) {
			for (int i = 0; i < BUFFERS; i++) {
				check_buffer(&buffers[i]);
				memset(buffers[i].at, 99, PAGES * PAGE);
			}
			_exit(0);
		}
		CHECK_EQ(waitpid(child, &status, 0), child);
		CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0, "the child ended with %#x", status);
		break;
	}
	case 12:
		/* A part, or all, is other memory from now on. */
		page = below(2) ? page : 0;
		map_at(buffer->at + page * PAGE, (PAGES - page) * PAGE);
		memset(buffer->value + page, 0, PAGES - page);
		break;
	case 13: {
		unsigned char *aside = map_at(NULL, PAGES * PAGE);

		CHECK(mremap(buffer->at, PAGES * PAGE, PAGES * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, aside) == aside);
		if (below(2))
			CHECK(mremap(aside, PAGES * PAGE, PAGES * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, buffer->at) == buffer->at);
		else
			buffer->at = aside;
		break;
	}
	case 14:
		CHECK_EQ(mprotect(buffer->at + page * PAGE, PAGE, PROT_READ), 0);
		CHECK(!ibv_reg_mr(loop.pd, buffer->at, PAGES * PAGE, ACCESS));
		CHECK_EQ(mprotect(buffer->at + page * PAGE, PAGE, PROT_READ | PROT_WRITE), 0);
		break;
	default:
		/* Another domain, with its end. */
		if (below(8) == 0) {
			struct ibv_pd *pd = ibv_alloc_pd(loop.context);

			for (int round = 0; round < 3; round++) {
				struct ibv_mr *other = ibv_reg_mr(pd, buffer->at, PAGES * PAGE, ACCESS);

				CHECK(other);
				CHECK_EQ(ibv_dereg_mr(other), 0);
			}
			CHECK_EQ(ibv_dealloc_pd(pd), 0);
		}
	}
	check_buffer(buffer);
}

static void random_sequences(void)
{
	const char *seed = getenv("SEED");

	for (int i = 0; i < BUFFERS; i++)
		buffers[i].at = map_at(NULL, PAGES * PAGE);
	for (unsigned run = 0; run < 8; run++) {
		state = 88172645463325252u + (seed ? strtoul(seed, NULL, 0) : 0) * 8 + run;
		for (int steps = 0; steps < 2500; steps++)
			step();
	}
	for (int i = 0; i < BUFFERS; i++)
		check_buffer(&buffers[i]);
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

static void quotas_are_whole(void)
{
	unsigned char *at[16];

	loop_dereg(source_mr);
	for (int i = 0; i < 16; i++)
		at[i] = map_at(NULL, 4 * PAGE);
	for (int round = 0; round < 5; round++) {
		for (int i = 0; i < 16; i++)
			loop_dereg(loop_reg(&loop, at[i], 4 * PAGE));
		CHECK(round == 0 || is_shared(at[15]), "nothing was kept");
		if (round % 2)
			take_all_regions();
		else
			take_all_bytes();
	}
}

static void take_all(void)
{
	loop_dereg(source_mr);
	take_all_bytes();
	take_all_regions();
}

/* One process keeps, and another needs the quota. */
static void another_process_finds_room(void)
{
	unsigned char *at = map_at(NULL, 8 * PAGE);
	char *arguments[] = {"keep", "take_all", NULL};
	pid_t child;
	int status;

	loop_dereg(source_mr);
	for (int round = 0; round < 5; round++)
		loop_dereg(loop_reg(&loop, at, 8 * PAGE));
	CHECK(is_shared(at), "not kept");
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
static void scribbled_words(void)
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
			size_t index = round % 2 ? 512 + below((unsigned)count - 512) : below(48);
			uint64_t value = i % 3 == 0 ? state : i % 3 == 1 ? source_mr->lkey : (state << 33) | source_mr->rkey;

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
	memset(words, 0, 512);
	loop = loop_open();
	source_mr = loop_reg(&loop, source, 16 * PAGE);
	unsigned char *fresh = map_at(NULL, PAGE);

	settle(fresh, PAGE);
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
