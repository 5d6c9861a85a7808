/*
 * Measures requests of one process to itself on whatever device it has: a proxy's, whose card is one that is not there, or that card
 * itself. Prints lines "name value". BENCH_QUICK in the environment makes it short, and of no use but to see that it works.
 *
 *   bench_card latency [inline]     8-byte WRITE, post to polled completion, ns, and a cache line's round trip between two cores
 *                                   meanwhile
 *   bench_card rate                 8-byte WRITEs in batches of 32, one of which is signaled, per second
 */
#include "bench_time.h"
#include "loop.h"

#include <string.h>
#include <x86intrin.h>

enum { BATCH = 32, UNDER_WAY = 3 };

static struct ibv_send_wr write_of(struct ibv_mr *to, struct ibv_sge *sge)
{
	return (struct ibv_send_wr){.sg_list = sge,
				    .num_sge = 1,
				    .opcode = IBV_WR_RDMA_WRITE,
				    .send_flags = IBV_SEND_SIGNALED,
				    .wr.rdma = {(uintptr_t)to->addr, to->rkey}};
}

static void take(struct loop *loop)
{
	struct ibv_wc wc;
	int found;

	while ((found = ibv_poll_cq(loop->cq, 1, &wc)) == 0)
		;
	CHECK(found == 1, "ibv_poll_cq: %d", found);
	CHECK(wc.status == IBV_WC_SUCCESS, "%s", ibv_wc_status_str(wc.status));
}

static void latency(struct loop *loop, struct ibv_mr *from, struct ibv_mr *to, bool is_inline)
{
	static uint64_t ticks[TIMED];
	size_t samples = amount(TIMED), warm_up = amount(TIMED_WARM_UP);
	struct rounds rounds = {0};
	struct ibv_sge sge = {(uintptr_t)from->addr, 8, from->lkey};
	struct ibv_send_wr wr = write_of(to, &sge), *bad;

	if (is_inline)
		wr.send_flags |= IBV_SEND_INLINE;
	for (int round = 0; round < TIMED_ROUNDS; round++) {
		for (size_t i = 0; i < warm_up + samples; i++) {
			uint64_t start = __rdtsc();

			CHECK(ibv_post_send(loop->from, &wr, &bad) == 0, "ibv_post_send");
			take(loop);
			if (i >= warm_up)
				ticks[i - warm_up] = __rdtsc() - start;
		}
		rounds_take(&rounds, ticks, samples);
	}
	rounds_print(&rounds);
}

/* So many completions of what `wr` is, a list whose last is signaled. */
static double per_second(struct loop *loop, struct ibv_send_wr *wr, uint64_t ns)
{
	struct ibv_send_wr *bad;
	uint64_t completed = 0, start = now_ns(), end = start + ns;
	int outstanding = 0;

	while (now_ns() < end) {
		for (; outstanding < UNDER_WAY; outstanding++)
			CHECK(ibv_post_send(loop->from, wr, &bad) == 0, "ibv_post_send");
		take(loop);
		completed++;
		outstanding--;
	}
	double rate = (double)completed * 1e9 / (double)(now_ns() - start);
	while (outstanding--)
		take(loop);
	return rate;
}

static void rate(struct loop *loop, struct ibv_mr *from, struct ibv_mr *to)
{
	struct ibv_sge sge = {(uintptr_t)from->addr, 8, from->lkey};
	struct ibv_send_wr wr[BATCH];

	for (int i = 0; i < BATCH; i++) {
		wr[i] = write_of(to, &sge);
		wr[i].send_flags = i == BATCH - 1 ? IBV_SEND_SIGNALED : 0;
		wr[i].next = i == BATCH - 1 ? NULL : &wr[i + 1];
	}
	per_second(loop, wr, amount(250000000));
	printf("rate %.0f\n", BATCH * per_second(loop, wr, amount(750000000)));
}

int main(int argc, char **argv)
{
	enum { BYTES = 4096 };
	const char *what = argc > 1 ? argv[1] : "";
	struct loop loop = loop_open();
	struct ibv_mr *from = loop_reg(&loop, memory(BYTES), BYTES), *to = loop_reg(&loop, memory(BYTES), BYTES);

	pin(0);
	if (!strcmp(what, "latency"))
		latency(&loop, from, to, argc > 2);
	else if (!strcmp(what, "rate"))
		rate(&loop, from, to);
	else
		return fprintf(stderr, "usage: see the head of bench_card.c\n"), 2;
	return 0;
}
