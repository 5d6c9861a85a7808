/* Data arrives whole, where it should, and nowhere else. */
#include "sides.h"

#include <arpa/inet.h>
#include <string.h>

enum { ALL = IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_WRITE | IBV_ACCESS_REMOTE_READ | IBV_ACCESS_REMOTE_ATOMIC };

static struct region whole(struct side *side)
{
	return side_reg(side, 0, ARENA_BYTES, ALL);
}

/* Lengths around the path MTU, the page and the chunk sizes of a scheduler. */
static const uint32_t lengths[] = {1, 7, 8, 63, 64, 65, 255, 1023, 1024, 1025, 4095, 4096, 4097, 65537, 1 << 20, (3 << 20) + 5};
enum { LENGTHS = sizeof(lengths) / sizeof(*lengths) };

static void send_receive(struct pair *p)
{
	connect_pair(p, link_defaults);
	struct region a = whole(p->a), b = whole(p->b);

	for (int i = 0; i < LENGTHS; i++) {
		uint32_t n = lengths[i];

		side_fill(p->a, 13, n, i);
		side_fill(p->b, 0, n + 64, 1000);
		side_recv(p->b, p->qb, 100 + i, b, 7, n + 10);
		side_post(p->a, p->qa, message(200 + i, a, 13, n));

		struct ibv_wc sent = side_wc(p->a, SEND_CQ, 200 + i, IBV_WC_SUCCESS);
		struct ibv_wc received = side_wc(p->b, RECV_CQ, 100 + i, IBV_WC_SUCCESS);

		CHECK_EQ(sent.opcode, IBV_WC_SEND);
		CHECK_EQ(sent.qp_num, side_qp_num(p->a, p->qa));
		CHECK_EQ(received.opcode, IBV_WC_RECV);
		CHECK_EQ(received.byte_len, n);
		CHECK_EQ(received.wc_flags & IBV_WC_WITH_IMM, 0);
		CHECK_EQ(received.qp_num, side_qp_num(p->b, p->qb));
		CHECK_EQ(side_differs(p->b, 7, n, i), -1);
		/* One byte before and one after are as they were. */
		CHECK_EQ(side_differs(p->b, 0, 7, 1000), -1);
	}
}

static void send_with_immediate(struct pair *p)
{
	connect_pair(p, link_defaults);
	struct region a = whole(p->a), b = whole(p->b);
	struct send send = message(1, a, 0, 100);

	side_fill(p->a, 0, 100, 5);
	side_recv(p->b, p->qb, 2, b, 0, 100);
	send.opcode = IBV_WR_SEND_WITH_IMM;
	send.imm = htonl(0xdeadbeef);
	side_post(p->a, p->qa, send);
	CHECK_EQ(side_wc(p->a, SEND_CQ, 1, IBV_WC_SUCCESS).opcode, IBV_WC_SEND);

	struct ibv_wc wc = side_wc(p->b, RECV_CQ, 2, IBV_WC_SUCCESS);

	CHECK_EQ(wc.opcode, IBV_WC_RECV);
	CHECK(wc.wc_flags & IBV_WC_WITH_IMM);
	CHECK_EQ(ntohl(wc.imm_data), 0xdeadbeef);
	CHECK_EQ(wc.byte_len, 100);
	CHECK_EQ(side_differs(p->b, 0, 100, 5), -1);
}

static void write_reaches_remote_memory(struct pair *p)
{
	connect_pair(p, link_defaults);
	struct region a = whole(p->a), b = whole(p->b);

	for (int i = 0; i < LENGTHS; i++) {
		uint32_t n = lengths[i];

		side_fill(p->a, 3, n, i);
		side_fill(p->b, 0, 4096, 77);
		side_post(p->a, p->qa, rdma(IBV_WR_RDMA_WRITE, i, a, 3, n, b, 4096 + 9));
		CHECK_EQ(side_wc(p->a, SEND_CQ, i, IBV_WC_SUCCESS).opcode, IBV_WC_RDMA_WRITE);
		CHECK_EQ(side_differs(p->b, 4096 + 9, n, i), -1);
		CHECK_EQ(side_differs(p->b, 0, 4096, 77), -1);
	}
	side_silent(p->b, RECV_CQ);
}

static void write_with_immediate(struct pair *p)
{
	connect_pair(p, link_defaults);
	struct region a = whole(p->a), b = whole(p->b);

	for (int i = 0; i < LENGTHS; i++) {
		uint32_t n = lengths[i];
		struct send send = rdma(IBV_WR_RDMA_WRITE_WITH_IMM, 1, a, 0, n, b, 1 << 12);

		side_fill(p->a, 0, n, i);
		send.imm = htonl(i);
		/* The receive's own buffer stays untouched; even none at all is enough. */
		CHECK_EQ(side_try_recv(p->b, p->qb, 50 + i, NULL, 0), 0);
		side_post(p->a, p->qa, send);
		side_wc(p->a, SEND_CQ, 1, IBV_WC_SUCCESS);

		struct ibv_wc wc = side_wc(p->b, RECV_CQ, 50 + i, IBV_WC_SUCCESS);

		CHECK_EQ(wc.opcode, IBV_WC_RECV_RDMA_WITH_IMM);
		CHECK(wc.wc_flags & IBV_WC_WITH_IMM);
		CHECK_EQ(ntohl(wc.imm_data), i);
		CHECK_EQ(wc.byte_len, n);
		CHECK_EQ(side_differs(p->b, 1 << 12, n, i), -1);
	}
}

static void read_fetches_remote_memory(struct pair *p)
{
	connect_pair(p, link_defaults);
	struct region a = whole(p->a), b = whole(p->b);

	for (int i = 0; i < LENGTHS; i++) {
		uint32_t n = lengths[i];

		side_fill(p->b, 5, n, i);
		side_fill(p->a, 0, 8192, 99);
		side_post(p->a, p->qa, rdma(IBV_WR_RDMA_READ, i, a, 8192 + 1, n, b, 5));

		struct ibv_wc wc = side_wc(p->a, SEND_CQ, i, IBV_WC_SUCCESS);

		CHECK_EQ(wc.opcode, IBV_WC_RDMA_READ);
		CHECK_EQ(side_differs(p->a, 8192 + 1, n, i), -1);
		CHECK_EQ(side_differs(p->a, 0, 8192, 99), -1);
	}
}

static void compare_and_swap(struct pair *p)
{
	connect_pair(p, link_defaults);
	struct region a = whole(p->a), b = whole(p->b);
	struct send send = rdma(IBV_WR_ATOMIC_CMP_AND_SWP, 1, a, 64, 8, b, 128);

	side_poke(p->b, 128, 1000);
	send.compare_add = 999;
	send.swap = 5;
	side_post(p->a, p->qa, send);
	CHECK_EQ(side_wc(p->a, SEND_CQ, 1, IBV_WC_SUCCESS).opcode, IBV_WC_COMP_SWAP);
	CHECK_EQ(side_peek(p->a, 64), 1000);
	CHECK_EQ(side_peek(p->b, 128), 1000);

	send.compare_add = 1000;
	side_post(p->a, p->qa, send);
	side_wc(p->a, SEND_CQ, 1, IBV_WC_SUCCESS);
	CHECK_EQ(side_peek(p->a, 64), 1000);
	CHECK_EQ(side_peek(p->b, 128), 5);
}

static void fetch_and_add(struct pair *p)
{
	connect_pair(p, link_defaults);
	struct region a = whole(p->a), b = whole(p->b);
	struct send send = rdma(IBV_WR_ATOMIC_FETCH_AND_ADD, 1, a, 0, 8, b, 4096);

	side_poke(p->b, 4096, UINT64_MAX - 1);
	send.compare_add = 3;
	side_post(p->a, p->qa, send);
	CHECK_EQ(side_wc(p->a, SEND_CQ, 1, IBV_WC_SUCCESS).opcode, IBV_WC_FETCH_ADD);
	CHECK_EQ(side_peek(p->a, 0), UINT64_MAX - 1);
	CHECK_EQ(side_peek(p->b, 4096), 1);
}

/* Many queue pairs add to one word from both ends: nothing may get lost. */
static void atomics_are_atomic(struct pair *p)
{
	enum { QPS = 3, ROUNDS = 400 };
	struct pair pairs[QPS];
	struct region a = whole(p->a), b = whole(p->b);
	int from_a[QPS] = {0}, from_b[QPS] = {0};

	for (int i = 0; i < QPS; i++) {
		pairs[i] = *p;
		connect_pair(&pairs[i], link_defaults);
	}
	side_poke(p->b, 0, 0);
	/* `b` reaches its own memory too: a third pair within the side. */
	int q1 = side_qp(p->b, link_defaults.capacity), q2 = side_qp(p->b, link_defaults.capacity);

	join(p->b, q1, p->b, q2, link_defaults);
	for (int round = 0; round < ROUNDS; round++) {
		for (int i = 0; i < QPS; i++) {
			struct send send = rdma(IBV_WR_ATOMIC_FETCH_AND_ADD, i, a, 64 + 8 * i, 8, b, 0);

			send.compare_add = 1;
			side_post(p->a, pairs[i].qa, send);
			from_a[i]++;
		}
		struct send own = rdma(IBV_WR_ATOMIC_FETCH_AND_ADD, 9, b, 64, 8, b, 0);

		own.compare_add = 1;
		side_post(p->b, q1, own);
		from_b[0]++;
		for (int i = 0; i < QPS; i++) {
			struct ibv_wc wc;

			CHECK_EQ(side_poll(p->a, SEND_CQ, &wc, 1, 5000), 1);
			CHECK_EQ(wc.status, IBV_WC_SUCCESS);
		}
		side_wc(p->b, SEND_CQ, 9, IBV_WC_SUCCESS);
	}
	CHECK_EQ(side_peek(p->b, 0), (QPS + 1) * ROUNDS);
}

static void inline_data_is_taken_at_post(struct pair *p)
{
	connect_pair(p, link_defaults);
	struct region a = whole(p->a), b = whole(p->b);

	for (uint32_t n = 1; n <= (uint32_t)link_defaults.capacity.inline_bytes; n += 9) {
		struct send send = rdma(IBV_WR_RDMA_WRITE, n, a, 100, n, b, 200);

		side_fill(p->a, 100, n, n);
		send.flags |= IBV_SEND_INLINE;
		/* The key of inline data means nothing. */
		send.sge[0].lkey = 0xbad;
		side_post(p->a, p->qa, send);
		side_wc(p->a, SEND_CQ, n, IBV_WC_SUCCESS);
		CHECK_EQ(side_differs(p->b, 200, n, n), -1);
	}
	side_recv(p->b, p->qb, 7, b, 4096, 64);
	struct send send = message(8, a, 0, 33);

	side_fill(p->a, 0, 33, 3);
	send.flags |= IBV_SEND_INLINE;
	side_post(p->a, p->qa, send);
	side_wc(p->a, SEND_CQ, 8, IBV_WC_SUCCESS);
	CHECK_EQ(side_wc(p->b, RECV_CQ, 7, IBV_WC_SUCCESS).byte_len, 33);
	CHECK_EQ(side_differs(p->b, 4096, 33, 3), -1);
}

/* Gathered from three regions at the sender, scattered to three at the receiver, with other seams. */
static void scatter_and_gather(struct pair *p)
{
	connect_pair(p, link_defaults);
	struct region a = whole(p->a), a2 = side_reg(p->a, 1 << 20, 1 << 20, ALL), b = whole(p->b);
	enum { TOTAL = 10000 };
	struct send send = message(1, a, 0, 1);
	struct ibv_sge scatter[4] = {
		{b.addr + 100000, 4097, b.lkey},
		{b.addr + 200000, 1, b.lkey},
		{b.addr + 300000, 0, b.lkey},
		{b.addr + 400000, TOTAL, b.lkey},
	};

	/* A contiguous pattern, in three places that are contiguous only through the list. */
	side_fill(p->a, 1 << 20, TOTAL, 42);
	send.sges = 3;
	send.sge[0] = (struct ibv_sge){a.addr + (1 << 20), 1000, a.lkey};
	send.sge[1] = (struct ibv_sge){a2.addr + 1000, 5001, a2.lkey};
	send.sge[2] = (struct ibv_sge){a.addr + (1 << 20) + 6001, TOTAL - 6001, a.lkey};
	CHECK_EQ(side_try_recv(p->b, p->qb, 2, scatter, 4), 0);
	side_post(p->a, p->qa, send);
	side_wc(p->a, SEND_CQ, 1, IBV_WC_SUCCESS);
	CHECK_EQ(side_wc(p->b, RECV_CQ, 2, IBV_WC_SUCCESS).byte_len, TOTAL);

	/* Gather what was scattered, by a WRITE, and compare. */
	struct send back = rdma(IBV_WR_RDMA_WRITE, 3, b, 100000, 4097, a, 3 << 20);

	back.sges = 3;
	back.sge[1] = (struct ibv_sge){b.addr + 200000, 1, b.lkey};
	back.sge[2] = (struct ibv_sge){b.addr + 400000, TOTAL - 4098, b.lkey};
	side_post(p->b, p->qb, back);
	side_wc(p->b, SEND_CQ, 3, IBV_WC_SUCCESS);
	CHECK_EQ(side_differs(p->a, 3 << 20, TOTAL, 42), -1);

	/* READ scatters, too. */
	struct send read = rdma(IBV_WR_RDMA_READ, 4, a, 5 << 20, 3333, a, 0);

	read.remote_addr = b.addr + 100000;
	read.rkey = b.rkey;
	read.sges = 2;
	read.sge[1] = (struct ibv_sge){a.addr + (5 << 20) + 3333, 764, a.lkey};
	side_post(p->a, p->qa, read);
	side_wc(p->a, SEND_CQ, 4, IBV_WC_SUCCESS);
	CHECK_EQ(side_differs(p->a, 5 << 20, 4097, 42), -1);
}

static void empty_messages(struct pair *p)
{
	connect_pair(p, link_defaults);
	struct region a = whole(p->a), b = whole(p->b);
	struct send send = message(1, a, 0, 0);

	send.sges = 0;
	CHECK_EQ(side_try_recv(p->b, p->qb, 2, NULL, 0), 0);
	side_post(p->a, p->qa, send);
	side_wc(p->a, SEND_CQ, 1, IBV_WC_SUCCESS);
	CHECK_EQ(side_wc(p->b, RECV_CQ, 2, IBV_WC_SUCCESS).byte_len, 0);

	/* An RDMA request of no bytes is not checked against its key. */
	struct send write = rdma(IBV_WR_RDMA_WRITE, 3, a, 0, 0, b, 0);

	write.sges = 0;
	write.rkey = 0;
	side_post(p->a, p->qa, write);
	side_wc(p->a, SEND_CQ, 3, IBV_WC_SUCCESS);
}

/* Only every eighth request is signaled; all of them arrive, and the queue never fills up. */
static void unsignaled_requests_free_their_slots(struct pair *p)
{
	connect_pair(p, link_defaults);
	struct region a = whole(p->a), b = whole(p->b);

	for (int i = 1; i <= 800; i++) {
		struct send send = rdma(IBV_WR_RDMA_WRITE, i, a, 8 * (i % 64), 8, b, 8 * i);

		/* A slot is reused only after a signaled completion that follows it. */
		side_poke(p->a, 8 * (i % 64), i);
		send.flags = i % 8 ? 0 : IBV_SEND_SIGNALED;
		side_post(p->a, p->qa, send);
		if (i % 8 == 0)
			side_wc(p->a, SEND_CQ, i, IBV_WC_SUCCESS);
	}
	side_silent(p->a, SEND_CQ);
	for (int i = 1; i <= 800; i++)
		CHECK_EQ(side_peek(p->b, 8 * i), i);
}

/* A request is ordered after the READ before it only if it is fenced; then it sends what was read. */
static void fence_waits_for_reads(struct pair *p)
{
	connect_pair(p, link_defaults);
	struct region a = whole(p->a), b = whole(p->b);
	enum { LENGTH = 1 << 20 };

	for (int i = 0; i < 20; i++) {
		struct send chain[2] = {
			rdma(IBV_WR_RDMA_READ, 1, a, 0, LENGTH, b, 0),
			rdma(IBV_WR_RDMA_WRITE, 2, a, 0, LENGTH, b, 2 << 20),
		};

		side_fill(p->b, 0, LENGTH, 10 + i);
		chain[1].flags |= IBV_SEND_FENCE;
		CHECK_EQ(side_try_post(p->a, p->qa, chain, 2, NULL), 0);
		side_wc(p->a, SEND_CQ, 1, IBV_WC_SUCCESS);
		side_wc(p->a, SEND_CQ, 2, IBV_WC_SUCCESS);
		CHECK_EQ(side_differs(p->b, 2 << 20, LENGTH, 10 + i), -1);
	}
}

/* A WRITE's data is there before the message that follows it. */
static void messages_arrive_in_order(struct pair *p)
{
	connect_pair(p, link_defaults);
	struct region a = whole(p->a), b = whole(p->b);

	for (int i = 0; i < 32; i++)
		side_recv(p->b, p->qb, i, b, 4096 * i, 4096);
	for (int i = 0; i < 32; i++) {
		struct send chain[2] = {
			rdma(IBV_WR_RDMA_WRITE, 2 * i, a, 0, 300000, b, 1 << 20),
			message(2 * i + 1, a, 8 * i, 8),
		};

		side_fill(p->a, 0, 300000, i);
		CHECK_EQ(side_try_post(p->a, p->qa, chain, 2, NULL), 0);
		CHECK_EQ(side_wc(p->b, RECV_CQ, i, IBV_WC_SUCCESS).byte_len, 8);
		CHECK_EQ(side_differs(p->b, 1 << 20, 300000, i), -1);
		side_wc(p->a, SEND_CQ, 2 * i, IBV_WC_SUCCESS);
		side_wc(p->a, SEND_CQ, 2 * i + 1, IBV_WC_SUCCESS);
	}
}

static void both_directions_at_once(struct pair *p)
{
	connect_pair(p, link_defaults);
	struct region a = whole(p->a), b = whole(p->b);

	for (int i = 0; i < 200; i++) {
		side_fill(p->a, 0, 5000, i);
		side_fill(p->b, 0, 5000, i + 500);
		side_recv(p->a, p->qa, 1, a, 1 << 20, 5000);
		side_recv(p->b, p->qb, 2, b, 1 << 20, 5000);
		side_post(p->a, p->qa, message(3, a, 0, 5000));
		side_post(p->b, p->qb, message(4, b, 0, 5000));
		side_wc(p->a, SEND_CQ, 3, IBV_WC_SUCCESS);
		side_wc(p->b, SEND_CQ, 4, IBV_WC_SUCCESS);
		side_wc(p->a, RECV_CQ, 1, IBV_WC_SUCCESS);
		side_wc(p->b, RECV_CQ, 2, IBV_WC_SUCCESS);
		CHECK_EQ(side_differs(p->a, 1 << 20, 5000, i + 500), -1);
		CHECK_EQ(side_differs(p->b, 1 << 20, 5000, i), -1);
	}
}

const struct test_case data_cases[] = {
	{"send_receive", send_receive, false},
	{"send_with_immediate", send_with_immediate, false},
	{"write_reaches_remote_memory", write_reaches_remote_memory, false},
	{"write_with_immediate", write_with_immediate, false},
	{"read_fetches_remote_memory", read_fetches_remote_memory, false},
	{"compare_and_swap", compare_and_swap, false},
	{"fetch_and_add", fetch_and_add, false},
	{"atomics_are_atomic", atomics_are_atomic, false},
	{"inline_data_is_taken_at_post", inline_data_is_taken_at_post, false},
	{"scatter_and_gather", scatter_and_gather, false},
	{"empty_messages", empty_messages, false},
	{"unsignaled_requests_free_their_slots", unsignaled_requests_free_their_slots, false},
	{"fence_waits_for_reads", fence_waits_for_reads, false},
	{"messages_arrive_in_order", messages_arrive_in_order, false},
	{"both_directions_at_once", both_directions_at_once, false},
	{NULL, NULL, false},
};
