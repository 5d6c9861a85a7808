/* Cases of `keep`: what programs do to memory that is kept. */
#include "keep.h"

#include <errno.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

/* Whatever the program does to the memory between two registrations, the next one is of what stands there then. */
void memory_changes_between_two_registrations(void)
{
	enum { LENGTH = 8 * PAGE };

	for (int round = 0; round < 42; round++) {
		/* Another buffer each time: one that has changed is not kept again so soon. */
		unsigned char *at = map_at(NULL, LENGTH), *middle = at + 3 * PAGE, expected = (unsigned char)round;

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

void advice_between_two_registrations(void)
{
	for (int round = 0; round < 10; round++) {
		unsigned char *at = map_at(NULL, 8 * PAGE);

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

void unmapped_memory_is_not_registered(void)
{
	unsigned char *at = map_at(NULL, 4 * PAGE);

	settle(at, 4 * PAGE);
	munmap(at + PAGE, PAGE);
	CHECK(!ibv_reg_mr(loop.pd, at, 4 * PAGE, ACCESS));
	CHECK_EQ(errno, EFAULT);
	map_at(at + PAGE, PAGE);
	round_of(at, 4 * PAGE, 9);
}

void overlapping_registrations(void)
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

void the_same_twice_at_once(void)
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

void forks_keep_memory_apart(void)
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

void a_child_has_a_life_of_its_own(void)
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

/* Random sequences, against a model of what every page must hold. */
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
		if (below(2)) {
			buffer->at = map_at(NULL, PAGES * PAGE);
			memset(buffer->value, 0, PAGES);
		} else if (below(4) == 0) {
			/* Another domain, with its end. */
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

void random_sequences(void)
{
	const char *seed = getenv("SEED");

	for (int i = 0; i < BUFFERS; i++)
		buffers[i].at = map_at(NULL, PAGES * PAGE);
	for (unsigned run = 0; run < 8; run++) {
		chance = 88172645463325252u + (seed ? strtoul(seed, NULL, 0) : 0) * 8 + run;
		for (int steps = 0; steps < 2500; steps++)
			step();
	}
	for (int i = 0; i < BUFFERS; i++)
		check_buffer(&buffers[i]);
}
