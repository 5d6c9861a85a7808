/*
 * Registration of ordinary memory: whatever kind it is, whoever else uses its pages, it keeps its contents and is plain
 * private memory again afterwards.
 *
 *   memory list | memory CASE
 */
#include "loop.h"

#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <pthread.h>
#include <stdatomic.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

enum { PAGE = 4096 };

static struct loop loop;

static void *map(size_t length)
{
	void *at = mmap(NULL, length, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	CHECK(at != MAP_FAILED, "errno %d", errno);
	return at;
}

/* Bytes travel from `at` to a buffer of their own and, changed, back. */
static void round_trip(unsigned char *at, size_t length, struct ibv_mr *mr)
{
	unsigned char *other = map(length);
	struct ibv_mr *other_mr = loop_reg(&loop, other, length);

	loop_fill(at, length, 1);
	loop_write(&loop, other_mr, other, mr, at, length);
	loop_check_filled(other, length, 1);
	loop_fill(other, length, 2);
	loop_write(&loop, mr, at, other_mr, other, length);
	loop_check_filled(at, length, 2);
	loop_dereg(other_mr);
	munmap(other, length);
}

static void contents_survive(void)
{
	unsigned char *at = map(40 * PAGE);

	loop_fill(at, 40 * PAGE, 3);
	struct ibv_mr *mr = loop_reg(&loop, at, 40 * PAGE);

	loop_check_filled(at, 40 * PAGE, 3);
	loop_dereg(mr);
	loop_check_filled(at, 40 * PAGE, 3);
}

static void private_again_after_dereg(void)
{
	unsigned char *at = map(16 * PAGE);
	struct ibv_mr *mr = loop_reg(&loop, at, 16 * PAGE);

	loop_fill(at, 16 * PAGE, 4);
	loop_dereg(mr);
	for (int page = 0; page < 16; page++)
		CHECK(!loop_is_shared(at + page * PAGE), "page %d", page);
	loop_check_filled(at, 16 * PAGE, 4);
	/* Private memory reads as zeros after this; a shared mapping would keep its contents. */
	CHECK_EQ(madvise(at, 16 * PAGE, MADV_DONTNEED), 0);
	for (int i = 0; i < 16 * PAGE; i++)
		CHECK_EQ(at[i], 0);
}

static void unaligned(void)
{
	unsigned char *at = map(8 * PAGE);

	for (int offset = 1; offset < 2 * PAGE; offset += 777) {
		for (int length = 1; length < 4 * PAGE; length += 3001) {
			loop_fill(at, 8 * PAGE, 5);
			struct ibv_mr *mr = loop_reg(&loop, at + offset, length);

			round_trip(at + offset, length, mr);
			loop_dereg(mr);
			/* The neighbours on the first and last page. */
			loop_check_filled(at, offset, 5);
			for (int i = offset + length; i < 8 * PAGE; i++)
				CHECK_EQ(at[i], (unsigned char)(i * 131 + i / 256 + 5 * 29));
		}
	}
}

static void outside_the_range_is_out_of_reach(void)
{
	unsigned char *at = map(2 * PAGE);
	struct ibv_mr *mr = loop_reg(&loop, at + 100, 200);
	struct ibv_wc wc;
	int n;

	/* The page is shared, the region is 200 bytes. */
	struct ibv_sge sge = {(uintptr_t)at + 99, 1, mr->lkey};
	struct ibv_send_wr wr = {.sg_list = &sge, .num_sge = 1, .opcode = IBV_WR_RDMA_WRITE}, *bad;

	wr.wr.rdma.remote_addr = (uintptr_t)at + 100;
	wr.wr.rdma.rkey = mr->rkey;
	CHECK_EQ(ibv_post_send(loop.from, &wr, &bad), 0);
	while (!(n = ibv_poll_cq(loop.cq, 1, &wc)))
		;
	CHECK_EQ(n, 1);
	CHECK_EQ(wc.status, IBV_WC_LOC_PROT_ERR);
}

static void overlapping(void)
{
	unsigned char *at = map(10 * PAGE);
	struct ibv_mr *left = loop_reg(&loop, at + 10, 5 * PAGE);
	struct ibv_mr *right = loop_reg(&loop, at + 3 * PAGE + 5, 5 * PAGE);
	struct ibv_mr *all = loop_reg(&loop, at, 10 * PAGE);

	round_trip(at, 10 * PAGE, all);
	round_trip(at + 10, 5 * PAGE, left);
	loop_dereg(all);
	round_trip(at + 3 * PAGE + 5, 5 * PAGE, right);
	loop_dereg(left);
	round_trip(at + 3 * PAGE + 5, 5 * PAGE, right);
	/* Two regions see one and the same memory. */
	left = loop_reg(&loop, at, 8 * PAGE);
	at[4 * PAGE] = 1;
	at[2 * PAGE] = 2;
	loop_write(&loop, right, at + 4 * PAGE, left, at + 2 * PAGE, 1);
	CHECK_EQ(at[4 * PAGE], 2);
	loop_fill(at, 10 * PAGE, 6);
	loop_dereg(right);
	loop_dereg(left);
	loop_check_filled(at, 10 * PAGE, 6);
	for (int page = 0; page < 10; page++)
		CHECK(!loop_is_shared(at + page * PAGE), "page %d", page);
}

static void the_same_twice(void)
{
	unsigned char *at = map(4 * PAGE);
	struct ibv_mr *one = loop_reg(&loop, at, 4 * PAGE), *two = loop_reg(&loop, at, 4 * PAGE);

	loop_dereg(one);
	round_trip(at, 4 * PAGE, two);
	CHECK(loop_is_shared(at));
	loop_dereg(two);
	CHECK(!loop_is_shared(at));
}

static void many_small_ones_on_a_page(void)
{
	enum { COUNT = 200 };
	unsigned char *at = map(PAGE);
	struct ibv_mr *mrs[COUNT];

	for (int i = 0; i < COUNT; i++)
		mrs[i] = loop_reg(&loop, at + 20 * i, 20);
	for (int i = 0; i < COUNT; i += 2)
		loop_dereg(mrs[i]);
	for (int i = 1; i < COUNT; i += 2)
		round_trip(at + 20 * i, 20, mrs[i]);
	for (int i = 1; i < COUNT; i += 2)
		loop_dereg(mrs[i]);
	CHECK(!loop_is_shared(at));
}

static void heap(void)
{
	unsigned char *blocks[64];
	struct ibv_mr *mrs[64];

	/* Small blocks live in the brk heap, beside the allocator's own words. */
	for (int i = 0; i < 64; i++) {
		blocks[i] = malloc(100 + i * 37);
		mrs[i] = loop_reg(&loop, blocks[i], 100 + i * 37);
	}
	for (int i = 0; i < 64; i++)
		round_trip(blocks[i], 100 + i * 37, mrs[i]);
	for (int i = 0; i < 64; i++) {
		loop_dereg(mrs[i]);
		free(blocks[i]);
	}
	for (int i = 0; i < 1000; i++)
		free(malloc(i * 100));
}

__attribute__((noinline)) static unsigned descend(unsigned depth)
{
	volatile unsigned char frame[1000];

	for (size_t i = 0; i < sizeof(frame); i++)
		frame[i] = depth;
	return depth ? descend(depth - 1) + frame[7] : frame[3];
}

static void stack(void)
{
	unsigned char local[3000];
	struct ibv_mr *mr = loop_reg(&loop, local, sizeof(local));

	round_trip(local, sizeof(local), mr);
	/* The stack's pages go on to be a stack, and it grows. */
	descend(1000);
	round_trip(local, sizeof(local), mr);
	loop_dereg(mr);
	loop_check_filled(local, sizeof(local), 2);
}

static void *on_own_stack(void *unused)
{
	(void)unused;
	stack();
	return NULL;
}

static void stack_of_a_thread(void)
{
	pthread_t thread;

	CHECK_EQ(pthread_create(&thread, NULL, on_own_stack, NULL), 0);
	CHECK_EQ(pthread_join(thread, NULL), 0);
}

static unsigned char in_data[5000] = {1}, in_bss[5000];
static const unsigned char in_rodata[5000] = {9, 8, 7};

static void static_memory(void)
{
	struct ibv_mr *data = loop_reg(&loop, in_data, sizeof(in_data));
	struct ibv_mr *bss = loop_reg(&loop, in_bss, sizeof(in_bss));

	round_trip(in_data, sizeof(in_data), data);
	round_trip(in_bss, sizeof(in_bss), bss);
	loop_dereg(data);
	loop_dereg(bss);
}

/* Constants may be sent, and nothing else: a registration for local reading needs no right to write. */
static void read_only_memory(void)
{
	struct ibv_mr *mr = ibv_reg_mr(loop.pd, (void *)in_rodata, sizeof(in_rodata), 0);

	CHECK(mr, "errno %d", errno);
	unsigned char *at = map(2 * PAGE);
	struct ibv_mr *to = loop_reg(&loop, at, 2 * PAGE);

	loop_write(&loop, to, at, mr, (void *)in_rodata, sizeof(in_rodata));
	CHECK_EQ(memcmp(at, in_rodata, sizeof(in_rodata)), 0);
	loop_dereg(mr);
	CHECK(!ibv_reg_mr(loop.pd, (void *)in_rodata, sizeof(in_rodata), IBV_ACCESS_LOCAL_WRITE));
	CHECK_EQ(errno, EFAULT);
}

static void unmapped_memory(void)
{
	unsigned char *at = map(8 * PAGE);

	loop_fill(at, 8 * PAGE, 7);
	CHECK_EQ(munmap(at + 4 * PAGE, PAGE), 0);
	CHECK(!ibv_reg_mr(loop.pd, at, 8 * PAGE, IBV_ACCESS_LOCAL_WRITE));
	CHECK_EQ(errno, EFAULT);
	/* Nothing has been half done. */
	loop_check_filled(at, 4 * PAGE, 7);
	for (int page = 0; page < 8; page++)
		CHECK(!loop_is_shared(at + page * PAGE), "page %d", page);
	CHECK(!ibv_reg_mr(loop.pd, NULL, PAGE, IBV_ACCESS_LOCAL_WRITE));
}

/*
 * Memory that is shared already stays the same memory for those who share it: it is registered as it is, or, by a device
 * that cannot, refused and left alone.
 */
static void shared_file(void)
{
	int fd = memfd_create("shared", 0);

	CHECK_EQ(ftruncate(fd, 4 * PAGE), 0);
	unsigned char *at = mmap(NULL, 4 * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	unsigned char *elsewhere = mmap(NULL, 4 * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	struct ibv_mr *mr = ibv_reg_mr(loop.pd, at + 5, 2 * PAGE,
				       IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_WRITE | IBV_ACCESS_REMOTE_READ);

	if (mr) {
		round_trip(at + 5, 2 * PAGE, mr);
		loop_check_filled(elsewhere + 5, 2 * PAGE, 2);
		elsewhere[5] ^= 0xff;
		CHECK_EQ(at[5], elsewhere[5]);
		loop_dereg(mr);
	} else {
		CHECK_EQ(errno, EOPNOTSUPP);
	}
	for (int i = 0; i < 4 * PAGE; i += 100) {
		elsewhere[i] = at[i] + 1;
		CHECK_EQ(at[i], elsewhere[i]);
	}
}

/* Each thread counts in a word of its own, all over the range; not one step may get lost. */
enum { COUNTERS = 6, COUNTED_PAGES = 64 };
static _Atomic bool stop_counting;

struct counter {
	volatile uint64_t *words;
	uint64_t steps;
};

static void *count(void *argument)
{
	struct counter *counter = argument;

	while (!atomic_load(&stop_counting)) {
		counter->words[(counter->steps % COUNTED_PAGES) * (PAGE / 8)]++;
		counter->steps++;
	}
	return NULL;
}

static void threads_write_meanwhile(void)
{
	unsigned char *at = map(COUNTED_PAGES * PAGE);
	struct counter counters[COUNTERS];
	pthread_t threads[COUNTERS];

	for (int i = 0; i < COUNTERS; i++) {
		counters[i] = (struct counter){(uint64_t *)at + i * 11, 0};
		CHECK_EQ(pthread_create(&threads[i], NULL, count, &counters[i]), 0);
	}
	for (int i = 0; i < 60; i++) {
		struct ibv_mr *mr = loop_reg(&loop, at, COUNTED_PAGES * PAGE);

		usleep(2000);
		loop_dereg(mr);
		usleep(1000);
	}
	atomic_store(&stop_counting, true);
	for (int i = 0; i < COUNTERS; i++) {
		uint64_t found = 0;

		CHECK_EQ(pthread_join(threads[i], NULL), 0);
		for (int page = 0; page < COUNTED_PAGES; page++)
			found += counters[i].words[page * (PAGE / 8)];
		CHECK_EQ(found, counters[i].steps);
	}
}

/* System calls write to memory, too, while it changes hands. */
static void *read_pipe(void *argument)
{
	int *fds = argument;
	static unsigned char expected;
	volatile unsigned char *at = *(unsigned char **)(fds + 2);
	uint64_t steps = 0;

	while (!atomic_load(&stop_counting)) {
		CHECK_EQ(write(fds[1], &expected, 1), 1);
		CHECK_EQ(read(fds[0], (void *)at, 1), 1);
		CHECK_EQ(*at, expected);
		expected++;
		steps++;
	}
	CHECK(steps > 0);
	return NULL;
}

static void system_calls_write_meanwhile(void)
{
	struct {
		int fds[2];
		unsigned char *at;
	} argument;
	pthread_t thread;

	argument.at = map(16 * PAGE);
	CHECK_EQ(pipe(argument.fds), 0);
	CHECK_EQ(pthread_create(&thread, NULL, read_pipe, &argument), 0);
	for (int i = 0; i < 60; i++) {
		struct ibv_mr *mr = loop_reg(&loop, argument.at, 16 * PAGE);

		usleep(1000);
		loop_dereg(mr);
	}
	atomic_store(&stop_counting, true);
	CHECK_EQ(pthread_join(thread, NULL), 0);
}

static void child_ended_well(pid_t child)
{
	int status;

	CHECK_EQ(waitpid(child, &status, 0), child);
	CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0, "the child's status is %#x", status);
}

/* What a forked child writes is its own, and the parent's registrations go on. */
static void fork_keeps_memory_apart(void)
{
	unsigned char *at = map(6 * PAGE), local[100];
	struct ibv_mr *mr = loop_reg(&loop, at + 100, 4 * PAGE), *stack_mr = loop_reg(&loop, local, sizeof(local));

	loop_fill(at, 6 * PAGE, 8);
	pid_t child = fork();

	if (!child) {
		loop_check_filled(at, 6 * PAGE, 8);
		memset(at, 0xaa, 6 * PAGE);
		memset(local, 0xaa, sizeof(local));
		free(malloc(100000));
		_exit(0);
	}
	child_ended_well(child);
	loop_check_filled(at, 6 * PAGE, 8);
	round_trip(at + 100, 4 * PAGE, mr);
	round_trip(local, sizeof(local), stack_mr);
	/* And end, with everything as it was, for one more child. */
	loop_fill(at, 6 * PAGE, 9);
	loop_dereg(mr);
	loop_dereg(stack_mr);
	loop_check_filled(at, 6 * PAGE, 9);
	for (int page = 0; page < 6; page++)
		CHECK(!loop_is_shared(at + page * PAGE), "page %d", page);
	child = fork();
	if (!child) {
		loop_check_filled(at, 6 * PAGE, 9);
		_exit(0);
	}
	child_ended_well(child);
}

static void fork_with_fork_init(void)
{
	CHECK_EQ(ibv_fork_init(), 0);
	fork_keeps_memory_apart();
}

static atomic_bool stop_registering;

static void *register_small_ones(void *unused)
{
	(void)unused;
	unsigned char *at = map(16 * PAGE);

	loop_fill(at, 16 * PAGE, 3);
	for (int i = 0; !atomic_load(&stop_registering); i++)
		loop_dereg(loop_reg(&loop, at, (size_t)(1 + i % 16) * PAGE));
	loop_check_filled(at, 16 * PAGE, 3);
	return NULL;
}

/* A fork has the allocator's locks, and waits for whoever registers. */
static void forks_beside_registrations(void)
{
	pthread_t thread;

	CHECK_EQ(pthread_create(&thread, NULL, register_small_ones, NULL), 0);
	for (int i = 0; i < 200; i++) {
		pid_t child = fork();

		CHECK(child >= 0, "errno %d", errno);
		if (!child)
			_exit(0);
		child_ended_well(child);
	}
	atomic_store(&stop_registering, true);
	CHECK_EQ(pthread_join(thread, NULL), 0);
}

static void realloc_keeps_contents(void)
{
	size_t length = 300000;
	unsigned char *at = malloc(length);
	struct ibv_mr *mr = loop_reg(&loop, at, length);

	loop_fill(at, length, 9);
	loop_dereg(mr);
	at = realloc(at, 10 * length);
	loop_check_filled(at, length, 9);
	mr = loop_reg(&loop, at, 10 * length);
	round_trip(at, 10 * length, mr);
	loop_dereg(mr);
	free(at);
}

static void unmapped_while_registered(void)
{
	unsigned char *at = map(8 * PAGE);
	struct ibv_mr *mr = loop_reg(&loop, at, 8 * PAGE);

	CHECK_EQ(munmap(at, 8 * PAGE), 0);
	/* Somebody else's memory at the same place is not touched by the dereg. */
	unsigned char *again = mmap(at, 8 * PAGE, PROT_READ | PROT_WRITE,
				    MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0);
	CHECK(again == at);
	loop_fill(again, 8 * PAGE, 10);
	loop_dereg(mr);
	loop_check_filled(again, 8 * PAGE, 10);
	mr = loop_reg(&loop, again, 8 * PAGE);
	round_trip(again, 8 * PAGE, mr);
	loop_dereg(mr);
}

/* As nobody, without CAP_IPC_LOCK, with the 64 KiB that Docker grants. */
static void beyond_the_memlock_limit(void)
{
	struct rlimit limit = {65536, 65536};
	size_t length = 64 << 20;

	CHECK_EQ(setrlimit(RLIMIT_MEMLOCK, &limit), 0);
	CHECK_EQ(setgroups(0, NULL), 0);
	CHECK_EQ(setgid(65534), 0);
	CHECK_EQ(setuid(65534), 0);
	unsigned char *at = map(length);
	struct ibv_mr *mr = loop_reg(&loop, at, length);

	round_trip(at, length, mr);
	loop_dereg(mr);
}

static void at_another_address(void)
{
	unsigned char *at = map(2 * PAGE), *other = map(2 * PAGE);
	uint64_t iova = 0x1234560000;
	struct ibv_mr *mr = ibv_reg_mr_iova(loop.pd, at, 2 * PAGE, iova, IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_WRITE);

	CHECK(mr, "errno %d", errno);
	struct ibv_mr *other_mr = loop_reg(&loop, other, 2 * PAGE);

	loop_fill(other, 2 * PAGE, 11);
	loop_write(&loop, mr, (void *)(uintptr_t)iova, other_mr, other, 2 * PAGE);
	loop_check_filled(at, 2 * PAGE, 11);
}

static void busy_objects(void)
{
	unsigned char *at = map(PAGE);
	struct ibv_pd *pd = ibv_alloc_pd(loop.context);
	struct ibv_mr *mr = ibv_reg_mr(pd, at, PAGE, 0);

	CHECK(mr, "errno %d", errno);
	CHECK_EQ(ibv_dealloc_pd(pd), EBUSY);
	CHECK_EQ(ibv_destroy_cq(loop.cq), EBUSY);
	loop_dereg(mr);
	CHECK_EQ(ibv_dealloc_pd(pd), 0);
}

static const struct {
	const char *name;
	void (*run)(void);
} cases[] = {
	{"contents_survive", contents_survive},
	{"private_again_after_dereg", private_again_after_dereg},
	{"unaligned", unaligned},
	{"outside_the_range_is_out_of_reach", outside_the_range_is_out_of_reach},
	{"overlapping", overlapping},
	{"the_same_twice", the_same_twice},
	{"many_small_ones_on_a_page", many_small_ones_on_a_page},
	{"heap", heap},
	{"stack", stack},
	{"stack_of_a_thread", stack_of_a_thread},
	{"static_memory", static_memory},
	{"read_only_memory", read_only_memory},
	{"unmapped_memory", unmapped_memory},
	{"shared_file", shared_file},
	{"threads_write_meanwhile", threads_write_meanwhile},
	{"system_calls_write_meanwhile", system_calls_write_meanwhile},
	{"fork_keeps_memory_apart", fork_keeps_memory_apart},
	{"fork_with_fork_init", fork_with_fork_init},
	{"forks_beside_registrations", forks_beside_registrations},
	{"realloc_keeps_contents", realloc_keeps_contents},
	{"unmapped_while_registered", unmapped_while_registered},
	{"beyond_the_memlock_limit", beyond_the_memlock_limit},
	{"at_another_address", at_another_address},
	{"busy_objects", busy_objects},
};

int main(int argc, char **argv)
{
	for (size_t i = 0; i < sizeof(cases) / sizeof(*cases); i++) {
		if (argc == 2 && !strcmp(argv[1], "list"))
			puts(cases[i].name);
		if (argc == 2 && !strcmp(argv[1], cases[i].name)) {
			loop = loop_open();
			cases[i].run();
			return 0;
		}
	}
	return argc == 2 && !strcmp(argv[1], "list") ? 0 : 2;
}
