/*
 * What a program finds of partitions; does in turn what the words say:
 *
 *   partitions [table] [FIRST:SECOND] [change]
 *
 * table: prints the port's P_Keys, and where ibv_get_pkey_index finds each. FIRST:SECOND: connects two queue pairs with each other that
 * are in the partitions of these indices, and prints what comes of a WRITE, or "-" and an errno if there is no such partition. change:
 * has the card's partitions change, and prints the event that comes, and what has become of a queue pair that was in the first.
 */
#include "check.h"

#include <arpa/inet.h>
#include <errno.h>
#include <infiniband/verbs.h>
#include <poll.h>
#include <string.h>

static struct ibv_context *context;
static struct ibv_pd *pd;
static struct ibv_cq *cq;
static struct ibv_mr *mr;
static uint64_t words[2];

static void table(void)
{
	struct ibv_port_attr port;
	__be16 key;

	CHECK_EQ(ibv_query_port(context, 1, &port), 0);
	for (int i = 0; i < port.pkey_tbl_len; i++) {
		CHECK_EQ(ibv_query_pkey(context, 1, i, &key), 0);
		printf("0x%04x@%d ", ntohs(key), ibv_get_pkey_index(context, 1, key));
	}
	CHECK(ibv_query_pkey(context, 1, port.pkey_tbl_len, &key) == -1 && errno == ENOENT, "errno %d", errno);
	CHECK(ibv_query_pkey(context, 1, -1, &key) == -1, "there is an entry before the first");
	CHECK(ibv_get_pkey_index(context, 1, htons(0x7777)) == -1, "there is a partition of nobody's");
}

/* NULL if there is no such partition. */
static struct ibv_qp *made(int index)
{
	struct ibv_qp_init_attr init = {.send_cq = cq, .recv_cq = cq, .cap = {4, 4, 1, 1, 0}, .qp_type = IBV_QPT_RC};
	struct ibv_qp_attr attr = {.qp_state = IBV_QPS_INIT, .port_num = 1, .pkey_index = (uint16_t)index,
				   .qp_access_flags = IBV_ACCESS_REMOTE_WRITE};
	struct ibv_qp *qp = ibv_create_qp(pd, &init);

	CHECK(qp, "errno %d", errno);
	errno = ibv_modify_qp(qp, &attr, IBV_QP_STATE | IBV_QP_PKEY_INDEX | IBV_QP_PORT | IBV_QP_ACCESS_FLAGS);
	if (!errno) {
		CHECK_EQ(ibv_query_qp(qp, &attr, IBV_QP_PKEY_INDEX, &init), 0);
		CHECK_EQ(attr.pkey_index, index);
		return qp;
	}
	int error = errno;

	CHECK_EQ(ibv_destroy_qp(qp), 0);
	errno = error;
	return NULL;
}

static void join(struct ibv_qp *qp, struct ibv_qp *other)
{
	struct ibv_qp_attr attr = {.qp_state = IBV_QPS_RTR, .path_mtu = IBV_MTU_1024, .dest_qp_num = other->qp_num,
				   .max_dest_rd_atomic = 1, .min_rnr_timer = 12,
				   .ah_attr = {.is_global = 1, .port_num = 1, .grh.hop_limit = 64}};

	CHECK_EQ(ibv_query_gid(context, 1, 0, &attr.ah_attr.grh.dgid), 0);
	CHECK_EQ(ibv_modify_qp(qp, &attr, IBV_QP_STATE | IBV_QP_AV | IBV_QP_PATH_MTU | IBV_QP_DEST_QPN | IBV_QP_RQ_PSN |
						  IBV_QP_MAX_DEST_RD_ATOMIC | IBV_QP_MIN_RNR_TIMER), 0);
	attr = (struct ibv_qp_attr){.qp_state = IBV_QPS_RTS, .timeout = 8, .retry_cnt = 1, .rnr_retry = 1, .max_rd_atomic = 1};
	CHECK_EQ(ibv_modify_qp(qp, &attr, IBV_QP_STATE | IBV_QP_TIMEOUT | IBV_QP_RETRY_CNT | IBV_QP_RNR_RETRY |
						  IBV_QP_SQ_PSN | IBV_QP_MAX_QP_RD_ATOMIC), 0);
}

/* What comes of a WRITE between queue pairs of these partitions, with immediate data if they are not zero. */
static void write_between(int first, int second, uint32_t imm)
{
	struct ibv_qp *qps[2] = {made(first), NULL};
	struct ibv_sge sge = {(uintptr_t)&words[0], 8, mr->lkey};
	struct ibv_send_wr wr = {.sg_list = &sge, .num_sge = 1, .send_flags = IBV_SEND_SIGNALED, .imm_data = htonl(imm),
				 .opcode = imm ? IBV_WR_RDMA_WRITE_WITH_IMM : IBV_WR_RDMA_WRITE,
				 .wr.rdma = {(uintptr_t)&words[1], mr->rkey}}, *bad;
	struct ibv_recv_wr receive = {.wr_id = 1}, *bad_receive;
	struct ibv_wc wc[4];
	int got = 0;

	if (qps[0])
		qps[1] = made(second);
	if (!qps[0] || !qps[1]) {
		printf("-%d ", errno);
	} else {
		join(qps[0], qps[1]);
		join(qps[1], qps[0]);
		words[1] = 0;
		words[0] = 42;
		CHECK_EQ(ibv_post_recv(qps[1], &receive, &bad_receive), 0);
		CHECK_EQ(ibv_post_send(qps[0], &wr, &bad), 0);
		/* That of the receive request, if there is one, says nothing more. */
		while ((got = ibv_poll_cq(cq, 1, wc)) == 0 || (got == 1 && wc->wr_id == 1))
			;
		CHECK_EQ(got, 1);
		CHECK_EQ(words[1], wc->status || imm ? words[1] : 42);
		printf("%s ", wc->status == IBV_WC_SUCCESS ? "reached" : wc->status == IBV_WC_RETRY_EXC_ERR ? "apart" : "?");
	}
	for (int i = 0; i < 2; i++)
		CHECK(!qps[i] || ibv_destroy_qp(qps[i]) == 0, "a queue pair stays");
}

static const char *becomes(struct ibv_qp *qp)
{
	struct ibv_qp_init_attr init;
	struct ibv_qp_attr attr;

	CHECK_EQ(ibv_query_qp(qp, &attr, IBV_QP_STATE, &init), 0);
	CHECK_EQ(ibv_destroy_qp(qp), 0);
	return attr.qp_state == IBV_QPS_ERR ? "failed" : attr.qp_state == IBV_QPS_RTS ? "lives" : "?";
}

static void change(void)
{
	struct pollfd fd = {.fd = context->async_fd, .events = POLLIN};
	struct ibv_qp *held = made(0);
	struct ibv_async_event event;

	CHECK(held, "errno %d", errno);
	join(held, held);

	/* Before which the path is established. The proxy cannot read the table at first. */
	write_between(0, 0, 0xeeee8000 | IBV_EVENT_PKEY_CHANGE);
	for (;;) {
		if (poll(&fd, 1, 500) <= 0) {
			printf("no event, it %s ", becomes(held));
			return;
		}
		CHECK_EQ(ibv_get_async_event(context, &event), 0);
		ibv_ack_async_event(&event);
		if (event.event_type == IBV_EVENT_PKEY_CHANGE)
			break;
	}
	printf("event of port %d, it %s ", event.element.port_num, becomes(held));
}

int main(int argc, char **argv)
{
	struct ibv_device **list = ibv_get_device_list(NULL);
	int first, second;

	CHECK(list && list[0], "no device: errno %d", errno);
	context = ibv_open_device(list[0]);
	CHECK(context, "errno %d", errno);
	pd = ibv_alloc_pd(context);
	cq = ibv_create_cq(context, 8, NULL, NULL, 0);
	CHECK(pd && cq, "errno %d", errno);
	mr = ibv_reg_mr(pd, words, sizeof(words), IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_WRITE);
	CHECK(mr, "errno %d", errno);
	for (int i = 1; i < argc; i++) {
		if (!strcmp(argv[i], "table"))
			table();
		else if (!strcmp(argv[i], "change"))
			change();
		else if (sscanf(argv[i], "%d:%d", &first, &second) == 2)
			write_between(first, second, 0);
		else
			CHECK(0, "what is %s?", argv[i]);
	}
	printf("\n");
	return 0;
}
