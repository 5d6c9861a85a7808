/*
 * Measures requests to a process that only lies there: of another container if RINGFENCE_FAR names its socket, else of the same.
 * Prints lines "name value". BENCH_QUICK in the environment makes it short, and of no use but to see that it works.
 *
 *   bench_pair latency [inline | idle N]      8-byte WRITE, post to polled completion, ns, and a cache line's round trip between
 *                                             two cores meanwhile; beside N idle queue pairs
 *   bench_pair rate OPCODE [idle N]           8 bytes in batches of 32, per second; `send` to a receiver that polls
 *   bench_pair bandwidth OPCODE BYTES [OFFSET]
 *                                             over 64 MiB, OFFSET bytes into a page, beside memcpy, bytes per second
 *   bench_pair cap BYTES SECONDS [read]       bytes completed in each window of 100 ms; and `away`, for how many nanoseconds of it
 *                                             a processor was taken away from the whole machine
 *   bench_pair share BYTES QPS MS             says "ready", waits for the end of its input; then requests completed in MS
 *
 * OPCODE: write, read, add (FETCH_AND_ADD) or send.
 */
#include "bench_far.h"
#include "bench_time.h"

#include <stdatomic.h>
#include <string.h>
#include <unistd.h>
#include <x86intrin.h>

enum { WALK = 64 << 20, BATCH = 32, ROUNDS = 3 };

static enum ibv_wr_opcode opcode_of(const char *name)
{
	static const struct {
		const char *name;
		enum ibv_wr_opcode opcode;
	} all[] = {{"write", IBV_WR_RDMA_WRITE},
		   {"read", IBV_WR_RDMA_READ},
		   {"add", IBV_WR_ATOMIC_FETCH_AND_ADD},
		   {"send", IBV_WR_SEND}};

	for (size_t i = 0; i < sizeof all / sizeof *all; i++)
		if (!strcmp(name, all[i].name))
			return all[i].opcode;
	CHECK(false, "no opcode %s", name);
	return 0;
}

static void latency(bool is_inline, int idle)
{
	static uint64_t ticks[TIMED];
	size_t samples = amount(TIMED), warm_up = amount(TIMED_WARM_UP);
	struct rounds rounds = {0};
	struct road road = road_open((struct road_options){.bytes = 4096, .qps = 1 + idle});
	struct ibv_sge sge = {.length = 8};
	struct ibv_send_wr wr = road_request(&road, IBV_WR_RDMA_WRITE, &sge), *bad;
	struct ibv_wc wc;
	int found;

	if (is_inline)
		wr.send_flags |= IBV_SEND_INLINE;
	pin(0);
	for (int round = 0; round < TIMED_ROUNDS; round++) {
		for (size_t i = 0; i < warm_up + samples; i++) {
			uint64_t start = __rdtsc();

			CHECK(ibv_post_send(road.qps[0], &wr, &bad) == 0, "ibv_post_send");
			while ((found = ibv_poll_cq(road.cq, 1, &wc)) == 0)
				;
			if (i >= warm_up)
				ticks[i - warm_up] = __rdtsc() - start;
			CHECK(found == 1, "ibv_poll_cq: %d", found);
			CHECK(wc.status == IBV_WC_SUCCESS, "%s", ibv_wc_status_str(wc.status));
		}
		rounds_take(&rounds, ticks, samples);
	}
	rounds_print(&rounds);
	road_close(&road);
}

static void rate(enum ibv_wr_opcode opcode, int idle)
{
	struct road road = road_open((struct road_options){
		.bytes = 4096, .qps = 1 + idle, .receive_bytes = opcode == IBV_WR_SEND ? 8 : 0});
	struct ibv_sge sge = {.length = 8};
	struct ibv_send_wr wr[BATCH], *bad;
	uint64_t posted = 0, completed = 0;

	for (int i = 0; i < BATCH; i++) {
		wr[i] = road_request(&road, opcode, &sge);
		wr[i].send_flags = i == BATCH - 1 ? IBV_SEND_SIGNALED : 0;
		wr[i].next = i == BATCH - 1 ? NULL : &wr[i + 1];
	}
	pin(0);
	for (int measured = 0; measured < 2; measured++) {
		uint64_t base = completed, start = now_ns();
		uint64_t end = start + amount(measured ? 750000000u : 250000000u);

		while (now_ns() < end) {
			/* Three batches under way keep the worker busy while this side polls. */
			while (posted - completed < 3 * BATCH) {
				CHECK(ibv_post_send(road.qps[0], wr, &bad) == 0, "ibv_post_send");
				posted += BATCH;
			}
			poll_for(road.cq, 1);
			completed += BATCH;
		}
		if (measured)
			printf("rate %.0f\n", (double)(completed - base) * 1e9 / (double)(now_ns() - start));
	}
	poll_for(road.cq, (int)((posted - completed) / BATCH));
	road_close(&road);
}

/* All of the memory, in requests of so many bytes. */
static void walk(struct road *road, struct ibv_send_wr *wr, uint32_t bytes)
{
	struct ibv_send_wr *bad;
	int outstanding = 0;

	for (size_t at = 0; at < WALK; at += bytes) {
		wr->sg_list->addr = (uintptr_t)road->near->addr + at;
		wr->wr.rdma.remote_addr = road->far_addr + at;
		if (outstanding == BATCH) {
			poll_for(road->cq, 1);
			outstanding--;
		}
		CHECK(ibv_post_send(road->qps[0], wr, &bad) == 0, "ibv_post_send");
		outstanding++;
	}
	poll_for(road->cq, outstanding);
}

static void bandwidth(enum ibv_wr_opcode opcode, uint32_t bytes, size_t offset)
{
	char *plain_from = memory(WALK), *plain_to = memory(WALK);
	struct road road = road_open((struct road_options){
		.bytes = WALK, .offset = offset, .receive_bytes = opcode == IBV_WR_SEND ? bytes : 0});
	struct ibv_sge sge = {.length = bytes};
	struct ibv_send_wr wr = road_request(&road, opcode, &sge);
	double copied[ROUNDS], moved[ROUNDS];
	int rounds = (int)amount(ROUNDS * 100) / 100, walks = (int)amount(400) / 100;

	if (rounds < 1)
		rounds = 1;
	if (walks < 1)
		walks = 1;
	pin(0);
	/* Floor and figure take turns, so that a change of the machine's mood meets both; the first round warms up. */
	for (int round = -1; round < rounds; round++) {
		uint64_t start = now_ns();
		for (int i = 0; i < walks; i++)
			for (size_t at = 0; at < WALK; at += bytes)
				memcpy(plain_to + at, plain_from + at, bytes);
		uint64_t middle = now_ns();
		for (int i = 0; i < walks; i++)
			walk(&road, &wr, bytes);
		uint64_t end = now_ns();
		if (round >= 0) {
			copied[round] = (double)walks * WALK * 1e9 / (double)(middle - start);
			moved[round] = (double)walks * WALK * 1e9 / (double)(end - middle);
		}
	}
	printf("memcpy %.0f\nmoved %.0f\n", median(copied, (size_t)rounds), median(moved, (size_t)rounds));
	road_close(&road);
}

/*
 * For how long each processor did not run a thread that nothing in this kernel goes before, since somebody last asked: a hypervisor
 * runs something else on it then, and this kernel moves nobody elsewhere, as it does not know.
 */
static _Atomic uint64_t away[64];

static void *watch(void *argument)
{
	const uint64_t period = 200000, usual = period / 4;
	size_t processor = (size_t)argument;

	pin((int)processor);
	for (uint64_t last = now_ns();;) {
		uint64_t due = last + period;
		struct timespec at = {(time_t)(due / 1000000000u), (long)(due % 1000000000u)};

		clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &at, NULL);
		last = now_ns();
		if (last - due > usual)
			atomic_fetch_add(&away[processor], last - due);
	}
	return NULL;
}

/* Whether there is such a thread on each processor. */
static bool watch_processors(void)
{
	const struct sched_param first = {.sched_priority = 1};
	pthread_attr_t attributes;
	cpu_set_t allowed;
	bool works = true;

	CHECK_EQ(sched_getaffinity(0, sizeof allowed, &allowed), 0);
	pthread_attr_init(&attributes);
	pthread_attr_setinheritsched(&attributes, PTHREAD_EXPLICIT_SCHED);
	pthread_attr_setschedpolicy(&attributes, SCHED_FIFO);
	pthread_attr_setschedparam(&attributes, &first);
	for (size_t i = 0; i < sizeof away / sizeof *away; i++) {
		pthread_t thread;

		works = works && (!CPU_ISSET(i, &allowed) || pthread_create(&thread, &attributes, watch, (void *)i) == 0);
	}
	return works;
}

static uint64_t longest_away(void)
{
	uint64_t longest = 0;

	for (size_t i = 0; i < sizeof away / sizeof *away; i++) {
		uint64_t of_this = atomic_exchange(&away[i], 0);

		longest = of_this > longest ? of_this : longest;
	}
	return longest;
}

static void cap(uint32_t bytes, int seconds, enum ibv_wr_opcode opcode)
{
	struct road road = road_open((struct road_options){.bytes = 1 << 20});
	struct ibv_sge sge = {.length = bytes};
	struct ibv_send_wr wr = road_request(&road, opcode, &sge), *bad;
	const uint64_t window = 100000000;
	struct ibv_wc wc[16];
	uint64_t total = 0;
	int outstanding = 0;
	bool watched = watch_processors();

	/* The first window is a warm-up, which also empties the bucket. */
	uint64_t edge = now_ns() + window, stop = edge + (uint64_t)seconds * 1000000000u;
	for (int windows = -1; edge <= stop;) {
		for (; outstanding < BATCH; outstanding++)
			CHECK(ibv_post_send(road.qps[0], &wr, &bad) == 0, "ibv_post_send");
		int got = ibv_poll_cq(road.cq, 16, wc);
		uint64_t now = now_ns();
		if (now >= edge) {
			uint64_t longest = longest_away();
			if (windows++ >= 0) {
				printf("window %.0f\n", (double)total * (double)window / (double)(now - edge + window));
				if (watched)
					printf("away %llu\n", (unsigned long long)longest);
			}
			total = 0;
			edge = now + window;
		}
		for (int i = 0; i < got; i++)
			CHECK(wc[i].status == IBV_WC_SUCCESS, "%s", ibv_wc_status_str(wc[i].status));
		outstanding -= got;
		total += (uint64_t)got * bytes;
	}
	/* What is still under way does not meet the end of its queue pair's peer. */
	while (outstanding > 0) {
		int got = ibv_poll_cq(road.cq, 16, wc);

		for (int i = 0; i < got; i++)
			CHECK(wc[i].status == IBV_WC_SUCCESS, "%s", ibv_wc_status_str(wc[i].status));
		outstanding -= got;
	}
	road_close(&road);
}

static void share(uint32_t bytes, int qps, uint64_t ms)
{
	struct road road = road_open((struct road_options){.bytes = bytes ? bytes : 1, .qps = qps});
	struct ibv_sge sge = {.length = bytes};
	struct ibv_send_wr wr = road_request(&road, IBV_WR_RDMA_WRITE, &sge), *bad;
	struct ibv_wc wc[32];
	uint64_t completed = 0;
	/* Whoever sends little more than headers needs many under way to want as much of the link as others. */
	int deep = qps > 1 || bytes >= 4096 ? 16 : DEPTH;
	char byte;

	printf("ready\n");
	fflush(stdout);
	while (read(STDIN_FILENO, &byte, 1) > 0)
		;
	for (int i = 0; i < qps; i++)
		for (int posted = 0; posted < deep; posted++) {
			wr.wr_id = (uint64_t)i;
			CHECK(ibv_post_send(road.qps[i], &wr, &bad) == 0, "ibv_post_send");
		}
	/* What comes before and after is not counted, but is there for whoever else counts. */
	uint64_t start = now_ns() + amount(500000000), end = start + ms * 1000000, leave = end + amount(500000000);
	for (uint64_t now = 0; now < leave;) {
		int got = ibv_poll_cq(road.cq, 32, wc);

		CHECK(got >= 0, "ibv_poll_cq");
		now = now_ns();
		for (int i = 0; i < got; i++) {
			CHECK(wc[i].status == IBV_WC_SUCCESS, "%s", ibv_wc_status_str(wc[i].status));
			wr.wr_id = wc[i].wr_id;
			CHECK(ibv_post_send(road.qps[wr.wr_id], &wr, &bad) == 0, "ibv_post_send");
		}
		if (now >= start && now < end)
			completed += (uint64_t)got;
	}
	printf("requests %llu\n", (unsigned long long)completed);
	fflush(stdout);
	/* Requests are under way, and the far end has nothing to wait for. */
	_exit(0);
}

int main(int argc, char **argv)
{
	const char *what = argc > 1 ? argv[1] : "", *second = argc > 2 ? argv[2] : "";
	bool idles = argc > 4 && !strcmp(argv[argc - 2], "idle");
	int idle = idles || (argc > 3 && !strcmp(second, "idle")) ? atoi(argv[argc - 1]) : 0;

	if (!strcmp(what, "latency"))
		latency(!strcmp(second, "inline"), idle);
	else if (!strcmp(what, "rate") && argc > 2)
		rate(opcode_of(second), idle);
	else if (!strcmp(what, "bandwidth") && argc > 3)
		bandwidth(opcode_of(second), (uint32_t)strtoul(argv[3], NULL, 0), argc > 4 ? strtoul(argv[4], NULL, 0) : 0);
	else if (!strcmp(what, "cap") && argc > 3)
		cap((uint32_t)strtoul(second, NULL, 0), atoi(argv[3]), argc > 4 ? IBV_WR_RDMA_READ : IBV_WR_RDMA_WRITE);
	else if (!strcmp(what, "share") && argc > 4)
		share((uint32_t)strtoul(second, NULL, 0), atoi(argv[3]), strtoull(argv[4], NULL, 0));
	else
		return fprintf(stderr, "usage: see the head of bench_pair.c\n"), 2;
	return 0;
}
