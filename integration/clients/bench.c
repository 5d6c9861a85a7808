/*
 * Measures one thing, beside its floor where it has one, and prints lines "name value".
 *
 *   bench cache-line            round trips of a cache line between two cores, ns
 *   bench latency [inline]      8-byte WRITE, post to polled completion, ns
 *   bench rate                  8-byte WRITEs in batches of 32, per second
 *   bench bandwidth BYTES       WRITEs of that size over 64 MiB, beside memcpy, bytes per second
 *   bench register BYTES        ibv_reg_mr of fresh memory beside pwrite into a new memory file, ns
 *   bench again BYTES BUFFERS   register, WRITE from, deregister these buffers in turn, beside pwrite into a memory file, ns
 *   bench rounds COUNT          mappings, and KiB of memory, after so many more of such rounds of 4 KiB
 *   bench cap BYTES SECONDS [read]
 *                               bytes completed in each window of 100 ms, by WRITEs or READs
 */
#include "loop.h"

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>
#include <x86intrin.h>

enum { WALK = 64 << 20, SAMPLES = 200000, WARM_UP = 20000, BATCH = 32, ROUNDS = 5 };

static uint64_t now_ns(void)
{
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

/* Nanoseconds of one tick: the time stamp counter costs a tenth of a clock call. */
static double tick_ns(void)
{
	uint64_t ns = now_ns(), ticks = __rdtsc();
	while (now_ns() - ns < 50000000)
		;
	return (double)(now_ns() - ns) / (double)(__rdtsc() - ticks);
}

static void pin(int core)
{
	cpu_set_t set;
	CPU_ZERO(&set);
	CPU_SET(core, &set);
	CHECK(sched_setaffinity(0, sizeof set, &set) == 0, "sched_setaffinity");
}

static int ascending(const void *a, const void *b)
{
	uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;
	return (x > y) - (x < y);
}

static void print_percentiles(uint64_t *ticks, size_t count)
{
	double ns = tick_ns();
	qsort(ticks, count, sizeof *ticks, ascending);
	printf("p50 %.1f\np99 %.1f\np999 %.1f\n", (double)ticks[count / 2] * ns, (double)ticks[count * 99 / 100] * ns,
	       (double)ticks[count * 999 / 1000] * ns);
}

static _Alignas(64) atomic_uint ping, pong_line[32];

static void *answer(void *unused)
{
	(void)unused;
	pin(1);
	for (unsigned i = 1; i <= SAMPLES + WARM_UP; i++) {
		while (atomic_load_explicit(&ping, memory_order_acquire) != i)
			;
		atomic_store_explicit(&pong_line[16], i, memory_order_release);
	}
	return NULL;
}

static void cache_line(void)
{
	uint64_t *ticks = calloc(SAMPLES, sizeof *ticks);
	pthread_t thread;
	pin(0);
	pthread_create(&thread, NULL, answer, NULL);
	for (unsigned i = 1; i <= SAMPLES + WARM_UP; i++) {
		uint64_t start = __rdtsc();
		atomic_store_explicit(&ping, i, memory_order_release);
		while (atomic_load_explicit(&pong_line[16], memory_order_acquire) != i)
			;
		if (i > WARM_UP)
			ticks[i - WARM_UP - 1] = __rdtsc() - start;
	}
	pthread_join(thread, NULL);
	print_percentiles(ticks, SAMPLES);
}

static void *memory(size_t length)
{
	void *at = mmap(NULL, length, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	CHECK(at != MAP_FAILED, "mmap");
	memset(at, 1, length);
	return at;
}

static struct ibv_send_wr write_of(struct ibv_sge *sge, struct ibv_mr *to, int flags)
{
	struct ibv_send_wr wr = { .sg_list = sge, .num_sge = 1, .opcode = IBV_WR_RDMA_WRITE, .send_flags = (unsigned)flags };
	wr.wr.rdma.remote_addr = (uintptr_t)to->addr;
	wr.wr.rdma.rkey = to->rkey;
	return wr;
}

static void poll_for(struct ibv_cq *cq, int count)
{
	struct ibv_wc wc[16];
	while (count > 0) {
		int got = ibv_poll_cq(cq, count < 16 ? count : 16, wc);
		CHECK(got >= 0, "ibv_poll_cq");
		for (int i = 0; i < got; i++)
			CHECK(wc[i].status == IBV_WC_SUCCESS, "%s", ibv_wc_status_str(wc[i].status));
		count -= got;
	}
}

static void latency(int flags)
{
	uint64_t *ticks = calloc(SAMPLES, sizeof *ticks);
	struct loop loop = loop_open();
	struct ibv_mr *from = loop_reg(&loop, memory(4096), 4096), *to = loop_reg(&loop, memory(4096), 4096);
	struct ibv_sge sge = { .addr = (uintptr_t)from->addr, .length = 8, .lkey = from->lkey };
	struct ibv_send_wr wr = write_of(&sge, to, IBV_SEND_SIGNALED | flags), *bad;
	struct ibv_wc wc;

	pin(0);
	for (unsigned i = 0; i < SAMPLES + WARM_UP; i++) {
		uint64_t start = __rdtsc();
		CHECK(ibv_post_send(loop.from, &wr, &bad) == 0, "ibv_post_send");
		while (ibv_poll_cq(loop.cq, 1, &wc) == 0)
			;
		if (i >= WARM_UP)
			ticks[i - WARM_UP] = __rdtsc() - start;
		CHECK(wc.status == IBV_WC_SUCCESS, "completion");
	}
	print_percentiles(ticks, SAMPLES);
}

static void rate(void)
{
	struct loop loop = loop_open();
	struct ibv_mr *from = loop_reg(&loop, memory(4096), 4096), *to = loop_reg(&loop, memory(4096), 4096);
	struct ibv_sge sge = { .addr = (uintptr_t)from->addr, .length = 8, .lkey = from->lkey };
	struct ibv_send_wr wr[BATCH], *bad;
	uint64_t posted = 0, completed = 0, start = 0, end;

	for (int i = 0; i < BATCH; i++) {
		wr[i] = write_of(&sge, to, i == BATCH - 1 ? IBV_SEND_SIGNALED : 0);
		wr[i].next = i == BATCH - 1 ? NULL : &wr[i + 1];
	}
	pin(0);
	end = now_ns() + 500000000;
	for (int measured = 0; measured < 2; measured++) {
		uint64_t base = completed;
		start = now_ns();
		end = start + (measured ? 2000000000u : 500000000u);
		while (now_ns() < end) {
			/* Three batches under way keep the worker busy while this side polls. */
			while (posted - completed < 3 * BATCH) {
				CHECK(ibv_post_send(loop.from, wr, &bad) == 0, "ibv_post_send");
				posted += BATCH;
			}
			poll_for(loop.cq, 1);
			completed += BATCH;
		}
		if (measured)
			printf("rate %.0f\n", (double)(completed - base) * 1e9 / (double)(now_ns() - start));
	}
}

static int descending(const void *a, const void *b)
{
	double x = *(const double *)a, y = *(const double *)b;
	return (x < y) - (x > y);
}

static void bandwidth(uint32_t bytes)
{
	char *plain_from = memory(WALK), *plain_to = memory(WALK);
	struct loop loop = loop_open();
	struct ibv_mr *from = loop_reg(&loop, memory(WALK), WALK), *to = loop_reg(&loop, memory(WALK), WALK);
	struct ibv_sge sge = { .length = bytes, .lkey = from->lkey };
	struct ibv_send_wr wr = write_of(&sge, to, IBV_SEND_SIGNALED), *bad;
	double copies[ROUNDS], writes[ROUNDS];
	int walks = 4;

	pin(0);
	for (int round = -1; round < ROUNDS; round++) {
		uint64_t start = now_ns();
		for (int walk = 0; walk < walks; walk++)
			for (size_t at = 0; at < WALK; at += bytes)
				memcpy(plain_to + at, plain_from + at, bytes);
		uint64_t middle = now_ns();
		int outstanding = 0;
		for (int walk = 0; walk < walks; walk++)
			for (size_t at = 0; at < WALK; at += bytes) {
				sge.addr = (uintptr_t)from->addr + at;
				wr.wr.rdma.remote_addr = (uintptr_t)to->addr + at;
				if (outstanding == BATCH) {
					poll_for(loop.cq, 1);
					outstanding--;
				}
				CHECK(ibv_post_send(loop.from, &wr, &bad) == 0, "ibv_post_send");
				outstanding++;
			}
		poll_for(loop.cq, outstanding);
		uint64_t end = now_ns();
		if (round >= 0) {
			copies[round] = (double)walks * WALK * 1e9 / (double)(middle - start);
			writes[round] = (double)walks * WALK * 1e9 / (double)(end - middle);
		}
	}
	qsort(copies, ROUNDS, sizeof *copies, descending);
	qsort(writes, ROUNDS, sizeof *writes, descending);
	printf("memcpy %.0f\nwrite %.0f\n", copies[ROUNDS / 2], writes[ROUNDS / 2]);
}

static void reg(size_t bytes)
{
	enum { MANY = 101 };
	struct loop loop = loop_open();
	double regs[MANY], pwrites[MANY];
	/* What takes microseconds must be warm to say anything. */
	int rounds = bytes <= 1 << 20 ? MANY : ROUNDS;

	for (int round = 0; round < rounds; round++) {
		char *at = memory(bytes);
		uint64_t start = now_ns();
		int fd = (int)syscall(SYS_memfd_create, "floor", 0);
		CHECK(fd >= 0 && ftruncate(fd, (off_t)bytes) == 0, "memfd");
		for (size_t done = 0; done < bytes;) {
			ssize_t step = pwrite(fd, at + done, bytes - done, (off_t)done);
			CHECK(step > 0, "pwrite");
			done += (size_t)step;
		}
		uint64_t middle = now_ns();
		close(fd);
		uint64_t again = now_ns();
		struct ibv_mr *mr = loop_reg(&loop, at, bytes);
		uint64_t end = now_ns();
		pwrites[round] = (double)(middle - start);
		regs[round] = (double)(end - again);
		loop_dereg(mr);
		munmap(at, bytes);
	}
	qsort(regs, (size_t)rounds, sizeof *regs, descending);
	qsort(pwrites, (size_t)rounds, sizeof *pwrites, descending);
	printf("pwrite %.0f\nregister %.0f\n", pwrites[rounds / 2], regs[rounds / 2]);
}

static void use_once(struct loop *loop, struct ibv_mr *to, void *at, uint32_t bytes)
{
	struct ibv_mr *from = loop_reg(loop, at, bytes);
	struct ibv_sge sge = { .addr = (uintptr_t)at, .length = bytes, .lkey = from->lkey };
	struct ibv_send_wr wr = write_of(&sge, to, IBV_SEND_SIGNALED), *bad;

	CHECK(ibv_post_send(loop->from, &wr, &bad) == 0, "ibv_post_send");
	poll_for(loop->cq, 1);
	loop_dereg(from);
}

static void again(size_t bytes, int buffers)
{
	enum { SLICES = 41 };
	struct loop loop = loop_open();
	struct ibv_mr *to = loop_reg(&loop, memory(bytes), bytes);
	char *at[64];
	double rounds[SLICES], pwrites[SLICES];
	int fd = (int)syscall(SYS_memfd_create, "floor", 0), slice_rounds = bytes > 262144 ? 32 : 320;

	CHECK(fd >= 0 && buffers >= 1 && buffers <= 64, "memfd, or buffers");
	for (int i = 0; i < buffers; i++)
		at[i] = memory(bytes);
	pin(0);
	/* Floor and figure take turns, so that a change of the machine's mood meets both; the first slices warm up. */
	for (int slice = -4; slice < SLICES; slice++) {
		uint64_t start = now_ns();
		for (int i = 0; i < slice_rounds; i++)
			CHECK(pwrite(fd, at[i % buffers], bytes, 0) == (ssize_t)bytes, "pwrite");
		uint64_t middle = now_ns();
		for (int i = 0; i < slice_rounds; i++)
			use_once(&loop, to, at[i % buffers], (uint32_t)bytes);
		uint64_t end = now_ns();
		if (slice >= 0) {
			pwrites[slice] = (double)(middle - start) / slice_rounds;
			rounds[slice] = (double)(end - middle) / slice_rounds;
		}
	}
	qsort(rounds, SLICES, sizeof *rounds, descending);
	qsort(pwrites, SLICES, sizeof *pwrites, descending);
	printf("pwrite %.0f\nagain %.0f\n", pwrites[SLICES / 2], rounds[SLICES / 2]);
}

static long lines_of(const char *path)
{
	FILE *file = fopen(path, "r");
	long lines = 0;
	int c;

	CHECK(file, "%s", path);
	while ((c = getc(file)) != EOF)
		lines += c == '\n';
	fclose(file);
	return lines;
}

static long resident_kib(void)
{
	FILE *file = fopen("/proc/self/statm", "r");
	long pages;

	CHECK(file && fscanf(file, "%*d %ld", &pages) == 1, "statm");
	fclose(file);
	return pages * 4;
}

static void rounds(int count)
{
	struct loop loop = loop_open();
	struct ibv_mr *to = loop_reg(&loop, memory(4096), 4096);
	char *at[16];

	for (int i = 0; i < 16; i++)
		at[i] = memory(4096);
	for (int i = 0; i < 100; i++)
		use_once(&loop, to, at[i % 16], 4096);
	long mappings = lines_of("/proc/self/maps"), kib = resident_kib();
	for (int i = 0; i < count; i++)
		use_once(&loop, to, at[i % 16], 4096);
	printf("mappings %ld\nkib %ld\n", lines_of("/proc/self/maps") - mappings, resident_kib() - kib);
}

static void cap(uint32_t bytes, int seconds, enum ibv_wr_opcode opcode)
{
	struct loop loop = loop_open();
	struct ibv_mr *from = loop_reg(&loop, memory(1 << 20), 1 << 20), *to = loop_reg(&loop, memory(1 << 20), 1 << 20);
	struct ibv_sge sge = { .addr = (uintptr_t)from->addr, .length = bytes, .lkey = from->lkey };
	struct ibv_send_wr wr = write_of(&sge, to, IBV_SEND_SIGNALED), *bad;
	wr.opcode = opcode;
	const uint64_t window = 100000000;
	struct ibv_wc wc[16];
	uint64_t total = 0;
	int outstanding = 0;

	/* The first window is a warm-up, which also empties the bucket. */
	uint64_t edge = now_ns() + window, stop = edge + (uint64_t)seconds * 1000000000u;
	for (int windows = -1; edge <= stop;) {
		for (; outstanding < BATCH; outstanding++)
			CHECK(ibv_post_send(loop.from, &wr, &bad) == 0, "ibv_post_send");
		int got = ibv_poll_cq(loop.cq, 16, wc);
		uint64_t now = now_ns();
		if (now >= edge) {
			if (windows++ >= 0)
				printf("window %.0f\n", (double)total * (double)window / (double)(now - edge + window));
			total = 0;
			edge = now + window;
		}
		outstanding -= got;
		total += (uint64_t)got * bytes;
	}
}

int main(int argc, char **argv)
{
	const char *what = argc > 1 ? argv[1] : "";
	uint64_t bytes = argc > 2 ? strtoull(argv[2], NULL, 0) : 0;

	if (!strcmp(what, "cache-line"))
		cache_line();
	else if (!strcmp(what, "latency"))
		latency(argc > 2 ? IBV_SEND_INLINE : 0);
	else if (!strcmp(what, "rate"))
		rate();
	else if (!strcmp(what, "bandwidth") && bytes)
		bandwidth((uint32_t)bytes);
	else if (!strcmp(what, "register") && bytes)
		reg(bytes);
	else if (!strcmp(what, "again") && bytes && argc > 3)
		again(bytes, atoi(argv[3]));
	else if (!strcmp(what, "rounds") && bytes)
		rounds((int)bytes);
	else if (!strcmp(what, "cap") && bytes && argc > 3)
		cap((uint32_t)bytes, atoi(argv[3]), argc > 4 ? IBV_WR_RDMA_READ : IBV_WR_RDMA_WRITE);
	else
		return fprintf(stderr, "usage: see the head of bench.c\n"), 2;
	return 0;
}
